"""Side by side with TRL, in one run on one machine. `make bench`."""
