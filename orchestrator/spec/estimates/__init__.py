"""GPU memory, disk space, time and cost of a sweep by formula."""
