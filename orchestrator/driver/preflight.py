"""Checks before a sweep starts: disk space, object storage, optional packages.

Also restores a sweep from its mirror to a new disk.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from orchestrator.errors import InvalidSweepName, SpecError, SpecProblem, StorageRefused
from orchestrator.execution.slots import Slots
from orchestrator.folders import DATA_FILE, SWEEP_NAME_PATTERN, SweepFolder, create_sweep_folder
from orchestrator.interfaces import MessageRejected, TrackingUnavailable
from orchestrator.mirror import SPEC, STUDY, MirrorError, probe_mirror, sweep_mirror
from orchestrator.spec.estimates.disk_space import disk_need, format_bytes
from orchestrator.spec.estimates.input_checks import check_inputs
from orchestrator.spec.estimates.sweep_plan import sweep_disk_need
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.validation_errors import read_document
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.database.study_database import check_study_storage, hide_password, store_study_url, study_exists
from orchestrator.tracking.mlflow_client import fixed_artifact_location
from orchestrator.tracking.tracking_store import check_tracking_store, sweep_tracking_uri
from trainer.config.hub_cache import model_type
from trainer.config.trial import (
    FUSED_ARCHITECTURES,
    LIGER_MISSING,
    ZERO3_REMOVED,
    is_removed_distributed,
    unknown_architecture,
)
from trainer.config.yaml_files import Location
from trainer.storage.atomic_files import write_text


class DiskTooSmall(StorageRefused):
    """The disk would be full before the sweep's end."""


def check_disk_space(folder: SweepFolder, spec: SweepSpec, slots: Slots) -> None:
    """Check that the sweep's peak disk use fits into the free space.

    Raises:
        DiskTooSmall: with settings that reduce the need.
    """
    need = sweep_disk_need(spec, slots.count)
    if need is None:  # unknown size: the model is not downloaded and its name has no size
        return
    path = folder.root
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free + _existing_bytes(folder.path / "trials")
    if need.bytes <= free:
        return
    remedies = ["a larger disk for the runs folder ($ORCHESTRATE_HOME)"]
    sequential_need = disk_need(spec, 1)
    if slots.count > 1 and sequential_need is not None:
        remedies.append(f"--set budget.concurrency=1 ({format_bytes(sequential_need.bytes)})")
    min_models = 1 if spec.judge is None else spec.judge.top
    if spec.keep_models > min_models:
        remedies.append(
            f"--set keep_models={min_models} ({format_bytes((spec.keep_models - min_models) * need.model)} less)"
        )
    if spec.models_kept > spec.keep_models:
        remedies.append(f"--set judge.top=1 ({format_bytes((spec.models_kept - spec.keep_models) * need.model)} less)")
    if spec.base.lora is None:
        remedies.append("adapters instead of full weights (base.lora)")
    raise DiskTooSmall(
        f"{spec.name} needs {need}; {format_bytes(free)} are free in {path}; use {', or '.join(remedies)}"
    )


def _existing_bytes(path: Path) -> int:
    """Return the bytes of this sweep's existing trials, which are part of its need."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


_COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")


def check_layers(spec: SweepSpec, slots: Slots) -> None:
    """Check that this machine has what `model.kernels` and `model.compile` need.

    Raises:
        SpecError: with the command that installs it.
    """
    found: list[SpecProblem] = []
    kernels = {spec.base.model.kernels, *spec.search.listed_values("model.kernels")}
    if "liger" in kernels | {given.get("model.kernels") for given in spec.enqueue}:
        path = "base.model.kernels"
        if not _installed("liger_kernel"):
            found.append(SpecProblem("", path, LIGER_MISSING.partition(": ")[2]))
        if not slots.gpus:
            found.append(SpecProblem("", path, "liger runs on a GPU, and trials here run on the CPU", "write auto"))
        kind = model_type(spec.base.model.name_or_path, spec.base.model.revision)
        if kind is not None and kind not in FUSED_ARCHITECTURES:
            found.append(SpecProblem("", path, f"liger: {unknown_architecture(kind)}"))
    compiles = {spec.base.model.compile, *spec.search.listed_values("model.compile")}
    set_compilers = [os.environ[name] for name in ("CXX", "CC") if os.environ.get(name)]
    if True in compiles and not any(map(shutil.which, (*set_compilers, *_COMPILERS))):
        problem = "torch.compile needs a C++ compiler, and none of g++, clang++, gcc and clang is installed"
        found.append(SpecProblem("", "base.model.compile", problem, "apt-get install g++, or write false"))
    if found:
        raise SpecError(found)


_CLIENTS = {"s3": ("boto3", "s3"), "gs": ("google.cloud.storage", "gs")}
"""URL scheme -> module that MLflow needs for such artifacts, and the extra of prefsweep that installs it."""


def check_access(folder: SweepFolder, spec: SweepSpec, *, is_new: bool) -> None:
    """Check what the sweep reads and where it writes, as far as this takes a moment, before anything is started.

    Raises:
        ModelError, DataError: see `check_inputs`.
        StorageRefused, NetworkDisk, NameTaken: the study of a new sweep cannot be created.
        MirrorError, SpecError: see `check_remote_storage`.
    """
    check_inputs(spec, is_new=is_new)
    if is_new:
        check_study_storage(folder, spec.storage)
    check_remote_storage(spec, folder.root)


def check_remote_storage(spec: SweepSpec, root: Path) -> None:
    """Check that the mirror and the artifact storage can be written, read and deleted, and the tracking store opened.

    Raises:
        MirrorError: they cannot be used as configured.
        SpecError: MLflow refuses the tracking store.
    """
    uri = sweep_tracking_uri(SweepFolder(root, spec.name), spec.tracking.uri)
    check_tracking_store(uri, spec.tracking.uri)
    if spec.mirror is not None:
        probe_mirror(spec.mirror)
    artifacts = spec.tracking.artifacts
    if artifacts is None:
        return
    client, extra = _CLIENTS.get(artifacts.partition("://")[0], ("", ""))
    if client and not _installed(client):
        raise MirrorError(
            f"tracking.artifacts: {artifacts} needs {client}, which is not installed: pip install 'prefsweep[{extra}]'"
        )
    try:
        probe_mirror(artifacts)
    except MirrorError as error:
        raise MirrorError(f"tracking.artifacts: {str(error).removeprefix('mirror: ')}") from error
    try:
        stored = fixed_artifact_location(root, uri, spec.tracking.experiment, artifacts)
    except (TrackingUnavailable, MessageRejected):
        return  # an unreachable tracking server does not stop a sweep: messages are queued in the outbox
    if stored is not None:
        raise MirrorError(
            f"tracking.artifacts: the experiment {spec.tracking.experiment!r} was created with artifact location "
            f"{stored}; set tracking.experiment to another name, or remove tracking.artifacts"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def check_mirror_free(spec: SweepSpec) -> None:
    """Check that the mirror has no sweep of this name.

    Raises:
        MirrorError: it has one.
    """
    if spec.mirror is None:
        return
    sweep = sweep_mirror(spec.mirror, spec.name)
    if sweep.read(STUDY) is not None:
        raise MirrorError(
            f"mirror: a sweep named {spec.name!r} has its files in {sweep.url}; continue it with `orchestrate resume "
            f"{spec.name} --mirror {spec.mirror}`, start another with `--name OTHER`, or remove them"
        )


def restore_from_mirror(name: str, root: Path, url: str) -> SweepFolder | None:
    """Create the folder of a sweep that another machine started, from its mirror.

    Results and models are downloaded when the sweep is resumed.

    Returns:
        None where the mirror has no such sweep.

    Raises:
        InvalidSweepName: the name is invalid.
        MirrorError: the study was in the runs folder of the other machine, or the mirror cannot be read.
        StorageRefused: the study is not in its database.
    """
    if not SWEEP_NAME_PATTERN.fullmatch(name):
        raise InvalidSweepName(name)
    probe_mirror(url)
    sweep = sweep_mirror(url, name)
    content = sweep.read(SPEC)
    if sweep.read(STUDY) is None or content is None:
        return None
    spec = load_spec_text(content.decode(), root, source=f"{sweep.url}/{SPEC}", is_new=False)
    if spec.storage is None:
        raise MirrorError(
            f"{name} cannot be resumed here: its study was SQLite in the runs folder of another disk, and a mirror has "
            "only checkpoints and models; use `storage:` (PostgreSQL) for sweeps that change machines"
        )
    if not study_exists(spec.storage, name):
        raise StorageRefused(f"the study of {name} is not in {hide_password(spec.storage)}")
    data = sweep.read(DATA_FILE)
    folder = SweepFolder(root, name)
    create_sweep_folder(folder, content.decode())
    if data is not None:
        write_text(folder.path / DATA_FILE, data.decode())
    store_study_url(folder, spec.storage)
    return folder


def check_no_removed_values(folder: SweepFolder, spec: SweepSpec) -> None:
    """Raise SpecError where a sweep of an earlier version has a setting that was removed."""
    path = "training.distributed"
    at: list[Location] = []
    if is_removed_distributed(spec.base.training.distributed):
        at.append(("base", "training", "distributed"))
    if any(map(is_removed_distributed, spec.search.listed_values(path))):
        at.append(("search", path))
    at += [("enqueue", i, path) for i, given in enumerate(spec.enqueue) if is_removed_distributed(given.get(path))]
    if spec.sft is not None and is_removed_distributed(spec.sft.training.distributed):
        at.append(("sft", "training", "distributed"))
    if at:
        document = read_document(folder.spec)
        raise SpecError([SpecProblem(document.location(loc), ".".join(map(str, loc)), ZERO3_REMOVED) for loc in at])
