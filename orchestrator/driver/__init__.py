"""One driver's life: lock, stages, trials, what stays on disk."""
