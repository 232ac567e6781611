"""Measurements on held-out pairs and prompts, and what is known of the initial model."""
