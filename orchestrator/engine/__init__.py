"""How trials are executed: the only room with Ray."""
