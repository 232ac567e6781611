"""Files that are complete or absent: checkpoints, run results, locks."""
