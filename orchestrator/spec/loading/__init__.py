"""A sweep file to a `SweepSpec`, every error with its line."""
