"""What MLflow's own pages show of a sweep: the parent run's description and the saved view of charts."""
