"""What the YAML means. Pure: no torch, no ray, no optuna, no mlflow."""
