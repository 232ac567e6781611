"""The study: the database that records a sweep, with sampling and pruning. The only package that imports Optuna."""
