"""The sweep file: its types, its loader, its search space and estimates. Imports no torch, Ray, Optuna or MLflow."""
