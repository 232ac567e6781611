"""What the commands do that drive nothing."""
