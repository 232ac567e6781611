"""What is measured on held-out pairs and prompts, and what is known of the start model."""
