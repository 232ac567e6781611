"""Artifact locations of MLflow's SQLite store, as absolute paths that follow the runs folder."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

_log = logging.getLogger(__name__)

ARTIFACTS = "artifacts"
"""Folder of all artifacts, inside the runs folder."""
_BUSY_SECONDS = 20.0


def default_location(root: Path, experiment: str) -> str:
    """Return the artifact location of an experiment in the runs folder `root`, as a URI; never outside of it."""
    leads_out = experiment.startswith("/") or ".." in experiment.split("/")
    return (root.resolve() / ARTIFACTS / (quote(experiment, safe="") if leads_out else experiment)).as_uri()


def adopt_artifacts(database: Path, root: Path, *, home: Path | None = None) -> int:
    """Point experiments and runs to their artifacts in the runs folder `root` after it was moved, renamed or copied.

    Only locations in the runs folder in which an experiment was created change: a location that no longer exists, or in
    the folder that this one was copied from. Locations set by `tracking.artifacts` stay.

    Args:
        database: MLflow's SQLite database.
        root: The runs folder.
        home: The folder in which the database belongs, by default its own; another one for a copy of it.

    Returns:
        The number of experiments whose location changed.
    """
    is_own = (home or database.parent).resolve() == root.resolve()
    changed = 0
    with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
        known = connection.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for number, name, old in known:
            new = default_location(root, name)
            if not _has_moved(old or "", new, root, database.name, is_own=is_own):
                continue
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, number))
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
                (new, len(old) + 1, len(old) + 1, f"{old}/"),
            )
            connection.execute("COMMIT")
            changed += 1
            _log.warning("the runs folder was moved: artifacts of the experiment %s are now in %s", name, new)
    return changed


def _has_moved(old: str, new: str, root: Path, database: str, *, is_own: bool) -> bool:
    """Return whether this experiment was created in the runs folder before it got its present place."""
    shared_end = new.removeprefix(root.resolve().as_uri())
    if old == new or not old.startswith("file:") or not old.endswith(shared_end):
        return False
    if not is_own and not _path(new).is_dir():
        return False  # a store outside of the runs folder may serve several of them
    if not _path(old).is_dir():
        return True
    source = _path(old.removesuffix(shared_end)) / database
    return is_own and source.is_file() and not source.samefile(root / database)


def _path(uri: str) -> Path:
    return Path(url2pathname(urlsplit(uri).path))
