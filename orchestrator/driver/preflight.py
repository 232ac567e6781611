"""Whether the disk has room for a sweep, asked before anything is spent.

What a sweep keeps on other machines, looked at before anything is spent; and a sweep brought to a new disk.

Packages that only some trials need: missing, a sweep is refused before anything is spent.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from orchestrator.errors import BadName, Finding, SpecError, StorageRefused
from orchestrator.execution.local_cluster import Slots
from orchestrator.folders import DATA_FILE, NAME, SweepFolder, make
from orchestrator.interfaces import Refused, Unreachable
from orchestrator.mirror import SPEC, STUDY, MirrorError, of_sweep, probe
from orchestrator.spec.estimates.disk_space import disk_need, size
from orchestrator.spec.loading.loader import loads
from orchestrator.spec.search.corners import placed
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database.study_database import is_made, masked, remember_location
from orchestrator.tracking.mlflow_sink import kept_elsewhere, tracking_uri
from trainer.config.trial import DEEPSPEED_INSTALL, TrainingConfig
from trainer.storage.atomic_files import write_text


class NoRoom(StorageRefused):
    """The disk would be full before the sweep's end."""


def check_room(folder: SweepFolder, spec: SweepSpec, slots: Slots) -> None:
    """NoRoom, with what would help, where the sweep's fullest moment does not fit beside what is there already."""
    need = disk_need(spec, slots.count)
    if need is None:  # a model that is not downloaded and whose name tells no size
        return
    place = folder.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + _held(folder.path / "trials")
    if need.bytes <= free:
        return
    ways = ["a larger disk for the runs folder ($ORCHESTRATE_HOME)"]
    fewer = disk_need(spec, 1)
    if slots.count > 1 and fewer is not None:
        ways.append(f"--set budget.concurrency=1 ({size(fewer.bytes)})")
    judged = 1 if spec.judge is None else spec.judge.top
    if spec.keep_models > judged:
        ways.append(f"--set keep_models={judged} ({size((spec.keep_models - judged) * need.model)} less)")
    if spec.kept > spec.keep_models:
        ways.append(f"--set judge.top=1 ({size((spec.kept - spec.keep_models) * need.model)} less)")
    if spec.base.lora is None:
        ways.append("adapters instead of full weights (base.lora)")
    raise NoRoom(f"{spec.name} needs {need}; {size(free)} are free in {place}. What helps: {', or '.join(ways)}")


def _held(place: Path) -> int:
    """Bytes of this sweep's trials that are on the disk already: they are part of what it needs."""
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) if place.is_dir() else 0


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


def check_extras(spec: SweepSpec) -> None:
    """SpecError where trials are divided by DeepSpeed and it is not installed here."""
    if wants_deepspeed(spec) and find_spec("deepspeed") is None:
        problem = "zero3 needs deepspeed, which is not installed here"
        raise SpecError([Finding(spec.name, "training.distributed", problem, DEEPSPEED_INSTALL)])


def wants_deepspeed(spec: SweepSpec) -> bool:
    """Whether some trial of several processes, or the SFT stage before them, has `training.distributed: zero3`."""
    return spec.resources.processes > 1 and any(t.distributed == "zero3" for t in _trainings(spec))


def _trainings(spec: SweepSpec) -> Iterator[TrainingConfig]:
    yield from (config.training for config in placed(spec.search, spec.base))
    if spec.sft is not None:
        yield spec.sft.training
