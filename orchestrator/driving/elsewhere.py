"""What a sweep keeps on other machines, looked at before anything is spent; and a sweep brought to a new disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from orchestrator.errors import BadName, StorageRefused
from orchestrator.folders import DATA_FILE, NAME, SweepFolder, make
from orchestrator.mirror.places import SPEC, STUDY, of_sweep
from orchestrator.mirror.probe import MirrorError, probe
from orchestrator.spec.load import loads
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.store import is_made, masked, remember_location
from orchestrator.tracking.mlflow import kept_elsewhere, tracking_uri
from orchestrator.tracking.sink import Refused, Unreachable
from trainer.storage.durable import write_text

_CLIENTS = {"s3": ("boto3", "s3"), "gs": ("google.cloud.storage", "gs")}
"""What MLflow writes such artifacts with, and our extra that brings it."""


def check_elsewhere(spec: SweepSpec, root: Path) -> None:
    """MirrorError where the mirror or the place of artifacts cannot be used as the file says."""
    if spec.mirror is not None:
        probe(spec.mirror)
    artifacts = spec.tracking.artifacts
    if artifacts is None:
        return
    client, extra = _CLIENTS.get(artifacts.partition("://")[0], ("", ""))
    if client and not _installed(client):
        raise MirrorError(
            f"tracking.artifacts: {artifacts} needs {client}, which is not installed: pip install 'prefsweep[{extra}]'"
        )
    try:
        probe(artifacts)
    except MirrorError as why:
        raise MirrorError(f"tracking.artifacts: {str(why).removeprefix('mirror: ')}") from why
    try:
        kept = kept_elsewhere(root, tracking_uri(root, spec.tracking.uri), spec.tracking.experiment, artifacts)
    except (Unreachable, Refused):
        return  # a tracking server that is down holds nothing up; metrics and files wait in the outbox
    if kept is not None:
        raise MirrorError(
            f"tracking.artifacts: the experiment {spec.tracking.experiment!r} keeps its files in {kept} since it was "
            "made; give tracking.experiment another name, or leave tracking.artifacts out"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def refuse_taken(spec: SweepSpec) -> None:
    """MirrorError where the mirror has copies of a sweep of this name: a new one would mix with it."""
    if spec.mirror is None:
        return
    sweep = of_sweep(spec.mirror, spec.name)
    if sweep.read(STUDY) is not None:
        raise MirrorError(
            f"mirror: a sweep named {spec.name!r} has its copies in {sweep.url}; continue it with `orchestrate resume "
            f"{spec.name} --mirror {spec.mirror}`, start another with `--name OTHER`, or remove them"
        )


def bring(name: str, root: Path, url: str) -> SweepFolder | None:
    """The folder of a sweep that another machine began, made on this disk; None where the mirror knows no such sweep.

    The study has to be in a database that outlived that machine. Endings and models follow when it is driven.
    """
    if not NAME.fullmatch(name):
        raise BadName(name)
    probe(url)
    sweep = of_sweep(url, name)
    said = sweep.read(SPEC)
    if sweep.read(STUDY) is None or said is None:
        return None
    spec = loads(said.decode(), root, source=f"{sweep.url}/{SPEC}")
    if spec.storage is None:
        raise MirrorError(
            f"{name} cannot go on here: its study was SQLite in the runs folder of another disk, and a mirror keeps "
            "checkpoints and models, not the study; sweeps with `storage:` (PostgreSQL) can"
        )
    if not is_made(spec.storage, name):
        raise StorageRefused(f"the study of {name} is not in {masked(spec.storage)}")
    data = sweep.read(DATA_FILE)
    folder = SweepFolder(root, name)
    make(folder, said.decode())
    if data is not None:
        write_text(folder.path / DATA_FILE, data.decode())
    remember_location(folder, spec.storage)
    return folder
