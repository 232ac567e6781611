"""A sweep as one value, and what can be concluded from it."""
