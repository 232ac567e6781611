"""What to try next: samplers, the sampling policy, warm start."""
