"""Files that are whole or not there: checkpoints, endings, locks."""
