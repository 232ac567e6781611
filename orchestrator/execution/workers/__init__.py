"""Worker processes: for one trial, for several trials in turn, or one of several processes of a trial."""
