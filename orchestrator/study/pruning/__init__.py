"""Whether a trial is stopped because others do better: pure functions of its course and of what it may know."""
