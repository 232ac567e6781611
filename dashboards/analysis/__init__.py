"""`SweepFrame` (a sweep loaded from its study) and the statistics computed from it."""
