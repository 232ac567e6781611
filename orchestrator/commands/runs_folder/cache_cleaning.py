"""`clean`: which entries of the shared cache and which uploaded files no sweep needs, and their removal.

An entry of the cache is one prepared data set, generated model, set of reference log-probs, SFT model, set of answers,
of reward scores, or of advice. All but SFT models can be computed again; they are kept as long as a sweep that runs or
can be resumed may need them. An SFT model is kept as long as a sweep with such a stage is there or archived, and a file
that was sent to a service with a sweep as long as the file of a sweep names it: one that is there, archived or queued.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from orchestrator.commands.runs_folder.archive_records import archived_sweeps
from orchestrator.commands.runs_folder.queue_records import SERVICE_FOLDER, UPLOADS_FOLDER, queued_files
from orchestrator.commands.runs_folder.sweep_deletion import DELETED_SWEEPS, finish_deletion, half_deleted
from orchestrator.commands.runs_folder.sweep_list import summary
from orchestrator.driver.data_stage import load_data_report
from orchestrator.driver.sft_stage import STAGE_CONFIG, sft_config, stored_stage_config
from orchestrator.errors import OrchestrateError, StorageRefused
from orchestrator.execution.sft_cache_key import settings_of_weights
from orchestrator.folders import CRASHED_SWEEPS, SweepFolder, disk_usage, known_sweeps
from orchestrator.spec.loading.loader import load_spec, load_spec_text
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.trial_records import ABANDONED
from trainer.storage.failpoints import failpoint

_ENDED = frozenset({"finished", ABANDONED})
_KINDS = ("advice", "answers", "data", "models", "reference", "rewards", "sft")
"""Folders of the cache with an entry for each file or folder in them; others are left alone."""
_UPLOAD = "upload"
"""Kind of an uploaded file or model, in the folder of its digest."""
_REMOVED = ".removed-"
"""Prefix of entries whose removal has begun, in the folder where they were."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A file or folder that may be removed; `used`: its last use, in seconds since 1970."""

    path: Path
    kind: str
    bytes: int
    used: float
    needed_by: str = ""
    """Why it is kept; empty if nothing needs it."""


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What cleaning removes, the entries that nothing needs but that are too new, and those that a sweep needs."""

    removed: tuple[CacheEntry, ...]
    recent: tuple[CacheEntry, ...]
    needed: tuple[CacheEntry, ...]

    @property
    def frees(self) -> int:
        """Bytes."""
        return sum(entry.bytes for entry in self.removed)


def plan_cleaning(root: Path, *, older_than: float, max_bytes: float | None = None) -> Cleaning:
    """Return what `clean` would remove; changes nothing.

    Args:
        root: the runs folder.
        older_than: seconds since the last use; what was used later stays. What was half removed is removed in any case.
        max_bytes: remove only until cache and uploads are this small, the entries that were used longest ago first.
    """
    keep, entries = _Needs(root), list[CacheEntry]()
    cache, now = SweepFolder(root, "").cache, time.time()
    for kind in _KINDS:
        for path in _children(cache / kind):
            entries.append(CacheEntry(path, kind, disk_usage(path), _last_use(path), keep.reason(kind, path)))
    for path in _children(root / CRASHED_SWEEPS):
        entries.append(CacheEntry(path, "crashed sweep", disk_usage(path), _last_use(path)))
    entries += _uploads(root)
    unneeded = sorted((e for e in entries if not e.needed_by), key=lambda e: e.used)
    begun = [CacheEntry(root / DELETED_SWEEPS / n, "deleted sweep", 0, 0.0) for n in half_deleted(root)]
    begun += [
        CacheEntry(path, "removed", 0, 0.0)
        for folder, pattern in ((cache, "*/"), (root / CRASHED_SWEEPS, ""), (_uploads_folder(root), "*/"))
        for path in folder.glob(f"{pattern}{_REMOVED}*")
    ]
    removed = [CacheEntry(e.path, e.kind, disk_usage(e.path), 0.0) for e in begun]
    total, recent = sum(entry.bytes for entry in entries), list[CacheEntry]()
    for entry in unneeded:
        is_small = max_bytes is not None and total <= max_bytes
        if is_small or now - entry.used < older_than:
            recent.append(entry)
        else:
            removed.append(entry)
            total -= entry.bytes
    return Cleaning(tuple(removed), tuple(recent), tuple(e for e in entries if e.needed_by))


def clean(root: Path, cleaning: Cleaning) -> None:
    """Remove what was planned. Each entry is renamed first, so that no reader finds half of one."""
    for entry in cleaning.removed:
        if entry.kind == "deleted sweep":
            finish_deletion(root, entry.path.name)
            continue
        to = entry.path
        if entry.kind != "removed":
            to = entry.path.with_name(f"{_REMOVED}{uuid4().hex[:8]}")
            entry.path.rename(to)
        failpoint("clean.renamed")
        if to.is_dir():
            shutil.rmtree(to)
        else:
            to.unlink()


def _uploads_folder(root: Path) -> Path:
    return root / SERVICE_FOLDER / UPLOADS_FOLDER


def _uploads(root: Path) -> list[CacheEntry]:
    """Return the uploaded files and models of all people.

    The files of a model are links to uploaded files: those are kept and removed with it, and count nothing.
    """
    found = [path for person in _children(_uploads_folder(root)) for path in _children(person)]
    if not found:
        return []
    named = _files_of_sweeps(root)
    entries = {
        path: CacheEntry(path, _UPLOAD, disk_usage(path), _last_use(path), _named_by(path, named)) for path in found
    }
    models = {
        file.stat().st_ino: entries[path]
        for path in found
        for file in path.glob("*/*")
        if file.is_file() and not file.is_symlink()
    }
    for path in found:
        for file in _children(path):
            if file.is_file() and (model := models.get(file.stat().st_ino)) is not None:
                used = max(entries[path].used, model.used)
                entries[path] = replace(entries[path], bytes=0, used=used, needed_by=model.needed_by)
    return list(entries.values())


def _files_of_sweeps(root: Path) -> list[tuple[str, str]] | str:
    """Return each sweep with its file: here, archived and queued; why nothing may be removed where one is unknown."""
    named: list[tuple[str, str]] = [(f"{record.name} (archived)", record.spec) for record in archived_sweeps(root)]
    try:
        named += [(f"{name} (in the queue)", text) for name, text in queued_files(root)]
        for name in known_sweeps(root):
            named.append((name, SweepFolder(root, name).spec.read_text(encoding="utf-8")))
    except StorageRefused:
        return "a sweep of the queue, which cannot be read,"
    except (OSError, UnicodeDecodeError):
        return "a sweep whose file cannot be read"
    return named


def _named_by(path: Path, named: list[tuple[str, str]] | str) -> str:
    """Return which sweep's file has the digest of an upload; empty if none does."""
    return named if isinstance(named, str) else next((sweep for sweep, text in named if path.name in text), "")


class _Needs:
    """What the sweeps of a runs folder need of its cache."""

    def __init__(self, root: Path) -> None:
        self._all: dict[str, str] = {}
        """Kinds of which everything is kept, and why."""
        self._data: dict[str, str] = {}
        self._stages: list[tuple[dict[str, object], str]] = []
        for name in known_sweeps(root):
            folder = SweepFolder(root, name)
            self._add(name, folder, self._read(name, lambda folder=folder: load_spec(folder.spec, is_new=False)))
        for record in archived_sweeps(root):
            spec = self._read(record.name, lambda r=record: load_spec_text(r.spec, root, is_new=False))
            self._add_stage(f"{record.name} (archived)", spec)

    def _read(self, name: str, load: Callable[[], SweepSpec]) -> SweepSpec | None:
        try:
            return load()
        except OrchestrateError:
            for kind in _KINDS:
                self._all[kind] = f"{name}, whose file cannot be read"
            return None

    def _add(self, name: str, folder: SweepFolder, spec: SweepSpec | None) -> None:
        self._add_stage(name, spec)
        state = summary(folder)["state"]
        if spec is None or state in _ENDED:
            return
        who = f"{name} ({state})"
        self._all.setdefault("reference", who)
        if spec.judge is not None:
            self._all.setdefault("answers", who)
            self._all.setdefault("rewards", who)
        if spec.base.model.generated is not None:
            self._all.setdefault("models", who)
        report = load_data_report(folder)
        stage_has_other_data = spec.sft is not None and spec.sft.data is not None
        is_searched = any(path.startswith(("data.", "model.")) for path in spec.search.paths)
        if report is None or stage_has_other_data or is_searched:
            self._all.setdefault("data", who)  # more data sets than the report's
        else:
            self._data.setdefault(report.fingerprint, who)

    def _add_stage(self, name: str, spec: SweepSpec | None) -> None:
        config = None if spec is None else sft_config(spec)
        if config is not None:
            self._stages.append((settings_of_weights(config), name))

    def reason(self, kind: str, path: Path) -> str:
        """Return which sweep needs an entry; empty if none does."""
        if kind in self._all:
            return self._all[kind]
        if kind == "data":
            return self._data.get(path.name, "")
        if kind != "sft" or not self._stages:
            return ""
        found = [config for run in _children(path) if (config := stored_stage_config(run)) is not None]
        if not found:
            return self._stages[0][1]  # its settings are not recorded
        used = [settings_of_weights(config) for config in found]
        return next((name for settings, name in self._stages if settings in used), "")


def _children(folder: Path) -> list[Path]:
    """Return the entries of a folder without locks and temporary files, whose names begin with a dot."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []


def _last_use(path: Path) -> float:
    """Return when a file, or any file of a folder, was last read or written, as far as the file system says."""
    used = 0.0
    for each in [path, *path.rglob("*")]:
        state = each.lstat()
        is_read_here = each.is_dir() or each.name == STAGE_CONFIG  # by listing, and to find out who needs it
        used = max(used, state.st_mtime, 0.0 if is_read_here else state.st_atime)
    return used
