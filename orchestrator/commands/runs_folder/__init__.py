"""Commands about whole sweeps of the runs folder: list, logs, delete, archive, and the caches that sweeps share."""
