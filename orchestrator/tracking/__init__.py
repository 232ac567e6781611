"""How trials are shown to others: the only room with MLflow."""
