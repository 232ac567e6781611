"""Benchmarks against TRL and Ray Tune on one machine. `make bench`."""
