"""Worker processes: one trial, several trials in turn, or one of several processes of a trial."""
