"""What to try next: one module for each way of choosing."""
