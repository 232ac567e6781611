"""HTML report of a sweep: one self-contained file."""
