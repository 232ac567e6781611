"""The driver process: sweep lock, data and SFT stages, trials, judging, retention, tracking of the parent run."""
