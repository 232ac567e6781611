"""Views of a sweep: statistics, diagnosis, HTML report, terminal output, MLflow pages."""
