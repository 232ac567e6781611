"""Measurements on held-out pairs and prompts, and cached outputs of the initial model."""
