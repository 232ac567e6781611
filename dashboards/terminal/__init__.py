"""Terminal output: tables of the commands and progress of a running sweep."""
