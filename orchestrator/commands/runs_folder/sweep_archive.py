"""`archive` and `unarchive`: a sweep's folder at an fsspec URL, and back.

The copy is below `URL/archived-sweeps/NAME`: `id`, the sweep's, and `files/` with the digest of each file. Every file
is read back and compared before the folder on this machine is removed. Both ways an interrupted call is continued by
the same call. The runs in MLflow stay where they are. `.archived/NAME.json` in the runs folder says where a sweep is.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.commands.runs_folder.archive_records import (
    ArchivedSweep,
    archived_sweeps,
    find_record,
    remove_record,
    write_record,
)
from orchestrator.commands.runs_folder.sweep_deletion import (
    DELETION_LIST,
    finish_deletion,
    half_deleted,
    move_to_deleted,
    references,
)
from orchestrator.errors import NameTaken, OrchestrateError, StorageRefused, closest_match
from orchestrator.folders import (
    DETACHED_LOGS,
    SweepFolder,
    disk_usage,
    existing_sweep,
    known_sweeps,
    new_sweep_folder,
    sweep_lock,
)
from orchestrator.mirror import Mirror, probe_mirror
from orchestrator.spec.estimates.disk_space import format_bytes
from orchestrator.study.database.study_database import has_own_database, hide_password, study_url
from orchestrator.study.study import Study
from trainer.storage.atomic_files import digest_of, fsync
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock

_AT_URL = "archived-sweeps"
_FILES, _ID = "files", "id"
_NOT_COPIED = frozenset({"driver.lock", DELETION_LIST})
_LOCK = ".unarchive.lock"
"""In the folder that an archive is fetched into."""

Log = Callable[[str], None]


class ArchiveRefused(OrchestrateError):
    """The sweep cannot be archived, or there is no such archive."""


def archive_sweep(name: str, root: Path, url: str, log: Log) -> None:
    """Copy a sweep to the URL, compare the copy by digest, then remove its folder here.

    Raises:
        ArchiveRefused: its study is in another database, it has symbolic links, or the URL has another sweep's archive.
        SweepHeld: a driver runs it.
        MirrorError, MirrorRefused: the URL cannot be used; nothing was removed.
    """
    if name in half_deleted(root) and name not in known_sweeps(root) and find_record(root, name) is not None:
        freed = format_bytes(finish_deletion(root, name))
        log(f"the copy of {name} is complete; what was left of it here is removed ({freed})")
        return
    folder = existing_sweep(root, name)
    with sweep_lock(folder):
        began, sweep_id = _identity(folder)
        files = _files(folder)
        probe_mirror(url)
        mirror = Mirror(url).at(f"{_AT_URL}/{name}")
        other = mirror.read(_ID)
        if other is not None and other.decode() != sweep_id:
            raise ArchiveRefused(f"{url} has the archive of another sweep named {name}; give another --to")
        mirror.write(_ID, sweep_id.encode())
        before, sent = _states(files), list[str]()
        mirror.put_verified(_FILES, files, lambda file, is_new: sent.append(file) if is_new else None)
        size = sum(path.stat().st_size for path in files.values())
        log(
            f"{len(files)} files ({format_bytes(size)}) are in {mirror.url}, each compared by its digest"
            + (f"; {len(files) - len(sent)} were there already" if len(sent) < len(files) else "")
        )
        for notice in references(folder):
            log(notice)
        earlier = find_record(root, name)
        if earlier is not None and earlier.id != sweep_id:
            log(
                f"an earlier sweep named {name} is at {earlier.url}; "
                f"`orchestrate unarchive {name} --from {earlier.url}` brings that one back"
            )
        record = ArchivedSweep(name, url, sweep_id, began, time.time(), size, folder.spec.read_text(encoding="utf-8"))
        if _states(_files(folder)) != before:
            raise StorageRefused(f"files of {name} changed while they were copied; nothing was removed: archive again")
        write_record(root, record)
        failpoint("archive.copied")
        freed = disk_usage(folder.path)
        move_to_deleted(folder, None)
        finish_deletion(root, name)
    log(
        f"{name} is archived, {format_bytes(freed)} freed; its runs in MLflow stay; "
        f"`orchestrate unarchive {name}` brings it back"
    )


def unarchive_sweep(name: str, root: Path, url: str | None, log: Log) -> None:
    """Bring an archived sweep back, each file compared by its digest; the copy at the URL stays.

    Args:
        name: the sweep's name.
        root: the runs folder.
        url: the URL of `archive --to`; None: the one to which it was archived from this runs folder.
        log: receives messages.

    Raises:
        ArchiveRefused: no archive is known, or the URL has none of this name.
        NameTaken: a sweep of this name exists.
    """
    if url is None:
        record = find_record(root, name)
        if record is None:
            known = [each.name for each in archived_sweeps(root)]
            nearest = closest_match(name, known)
            hint = f"; did you mean {nearest!r}?" if nearest else ""
            listed = f"archived from here: {', '.join(known)}" if known else "none was archived from here"
            raise ArchiveRefused(f"no archive of {name!r} is recorded in {root} ({listed}{hint}); or give --from URL")
        url = record.url
    folder = new_sweep_folder(root, name)
    probe = Mirror(url).at(f"{_AT_URL}/{name}")
    listed = probe.complete_files(_FILES)
    if listed is None:
        raise ArchiveRefused(f"{url} has no complete archive of {name}")
    temporary = root / f".{name}.unarchive"
    temporary.mkdir(parents=True, exist_ok=True)
    lock = FileLock(temporary / _LOCK)
    if not lock.acquire(0):
        raise StorageRefused(f"another process is bringing {name} back")
    try:
        missing = sum(size for file, size in listed.items() if not (temporary / file).is_file())
        if missing > (free := shutil.disk_usage(root).free):
            raise StorageRefused(f"{name} needs {format_bytes(missing)}; {format_bytes(free)} are free in {root}")
        probe.get_resumed(_FILES, temporary)
        failpoint("unarchive.fetched")
        output = temporary / DETACHED_LOGS / folder.log.name
        if output.is_file() and not folder.log.exists():
            folder.log.parent.mkdir(exist_ok=True)
            output.rename(folder.log)
        shutil.rmtree(output.parent, ignore_errors=True)
        if folder.path.exists():
            raise NameTaken(name, folder.path)
        (temporary / _LOCK).unlink()
        temporary.rename(folder.path)
        fsync(root)
    finally:
        lock.release()
    remove_record(root, name)
    log(f"{name} is back in {folder.path} ({format_bytes(sum(listed.values()))}); the copy at {url} stays")


def _identity(folder: SweepFolder) -> tuple[float, str]:
    """Return when the sweep began, and its id; opening the study also empties its write-ahead log."""
    if not has_own_database(folder):
        where = hide_password(study_url(folder))
        raise ArchiveRefused(f"the study of {folder.name} is in {where}, which a copy of its folder would not have")
    if not Study.exists(folder):
        return folder.spec.stat().st_mtime, digest_of(folder.spec.read_text(encoding="utf-8"))
    with Study.open(folder) as study:
        return study.spec_history()[0].at, study.id


def _files(folder: SweepFolder) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.path.rglob("*")):
        name = str(path.relative_to(folder.path))
        if path.is_symlink():
            raise ArchiveRefused(f"{path} is a symbolic link; an archive has files only: remove it or copy its target")
        if path.is_file() and name not in _NOT_COPIED:
            found[name] = path
    if folder.log.is_file():
        found[f"{DETACHED_LOGS}/{folder.log.name}"] = folder.log
    return found


def _states(files: dict[str, Path]) -> dict[str, tuple[int, int]]:
    return {name: (path.stat().st_mtime_ns, path.stat().st_size) for name, path in files.items()}
