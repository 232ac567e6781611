"""Layout of the runs folder, and the driver's lock on a sweep.

The lock is a flock on `driver.lock`: the kernel releases it when the holding process ends. The file names the holder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

from orchestrator.errors import (
    JUDGING,
    InvalidRunsFolder,
    InvalidSweepName,
    NameTaken,
    NoSuchSweep,
    ReservedName,
    SweepHeld,
    SweepIsArchived,
    closest_match,
)
from trainer.storage.atomic_files import fsync, write_text
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock

FAILURE_FILE = "failure.txt"
"""In an attempt's folder: the traceback of the error that ended it."""
DATA_FILE = "data.json"
"""The data report."""
ENVIRONMENT_FILE = "environment.json"
"""Package versions, hardware and commit."""
RUNS_FILE = "runs.json"
"""MLflow run ids by the run names "sweep", "sft" and trial numbers."""
WAITING_FILE = "waiting.txt"
"""While the driver waits for a GPU: its process id, then for whom."""
CRASH_FILES = "internal-error-*.txt"
"""Tracebacks of internal errors that ended a driver; the name has the time."""
CRASHED_SWEEPS = ".set-aside"
"""In the runs folder: folders of sweeps that crashed before their first trial, moved so that their names are free."""
DETACHED_LOGS = ".detached"
"""In the runs folder: output of detached drivers, one file per sweep."""

ARCHIVED_SWEEPS = ".archived"
"""In the runs folder: a file about each archived sweep."""

RESERVED_NAMES = frozenset(
    {"artifacts", "cache", "mlflow-ui.log", "mlflow.db", "mlflow.db-journal", "mlflow.db-shm", "mlflow.db-wal"}
    | {"service"}
)
"""Files and folders in the runs folder that are no sweeps."""
SWEEP_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def runs_folder() -> Path:
    """Return the runs folder: $ORCHESTRATE_HOME with a leading `~` expanded, or ./runs.

    Raises InvalidRunsFolder if a URL of the databases in it would name another folder.
    """
    given = os.environ.get("ORCHESTRATE_HOME") or "runs"
    try:
        root = Path(given).expanduser().resolve()
    except (RuntimeError, ValueError) as error:
        raise InvalidRunsFolder(given, str(error)) from error
    if "?" in str(root) or unquote(str(root)) != str(root):
        raise InvalidRunsFolder(str(root), "in a URL of its databases, `?` or `%` and two digits mean something else")
    return root


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """Paths under `runs/<sweep>`: sweep.yaml, study.db, outbox/, trials/<number>/<attempt>/, report.html."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        """The sweep's own folder."""
        return self.root / self.name

    @property
    def spec(self) -> Path:
        """The resolved sweep file, with all defaults."""
        return self.path / "sweep.yaml"

    @property
    def database(self) -> Path:
        """The study's SQLite database."""
        return self.path / "study.db"

    @property
    def outbox(self) -> Path:
        """Messages that are not delivered to MLflow yet."""
        return self.path / "outbox"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        """The lock file, held by the driver while it runs."""
        return self.path / "driver.lock"

    @property
    def log(self) -> Path:
        """Output of the sweep's detached drivers."""
        return self.root / DETACHED_LOGS / f"{self.name}.log"

    @property
    def cache(self) -> Path:
        """Content-addressed cache of data and models, shared by all sweeps."""
        return self.root / "cache"

    @property
    def forks(self) -> Path:
        """Pinned checkpoints that cloned trials continue from, each in a run folder of its own."""
        return self.path / "forks"

    def trial(self, number: int) -> Path:
        """Return the folder of one trial, with a folder for each of its attempts."""
        return self.path / "trials" / f"{number:04d}"

    def attempt(self, number: int, attempt: int) -> Path:
        """Return the folder that one attempt writes to; no other attempt does."""
        return self.trial(number) / f"{attempt}"


def known_sweeps(root: Path) -> list[str]:
    """Return the sorted names of the sweeps under `root`."""
    if not root.is_dir():
        return []
    return sorted(
        p.name for p in root.iterdir() if SWEEP_NAME_PATTERN.fullmatch(p.name) and (p / "sweep.yaml").is_file()
    )


def existing_sweep(root: Path, name: str) -> SweepFolder:
    """Return the folder of an existing sweep. Raises NoSuchSweep with the most similar name, SweepIsArchived."""
    folder = _folder(root, name)
    if not folder.spec.is_file():
        known = known_sweeps(root)
        if (root / ARCHIVED_SWEEPS / f"{name}.json").is_file():
            raise SweepIsArchived(name, root)
        raise NoSuchSweep(name, root, known, closest_match(name, known))
    return folder


def new_sweep_folder(root: Path, name: str) -> SweepFolder:
    """Return the paths of a sweep to begin without creating them.

    Raises NameTaken if the folder exists, ReservedName if the runs folder uses the name itself.
    """
    folder = _folder(root, name)
    if name.lower() in RESERVED_NAMES:
        raise ReservedName(name)
    if folder.path.exists():
        raise NameTaken(name, folder.path)
    return folder


def create_sweep_folder(folder: SweepFolder, spec: str) -> None:
    """Create the sweep's folder and the resolved file `spec` in it atomically.

    Raises NameTaken if another process created the folder first.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    temporary = folder.root / f".{folder.name}.{uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        write_text(temporary / folder.spec.name, spec)
        failpoint("sweep.folder")
        temporary.rename(folder.path)
        fsync(folder.root)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise NameTaken(folder.name, folder.path) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    failpoint("sweep.made")


def _folder(root: Path, name: str) -> SweepFolder:
    """Symbolic links are refused, as they could point outside of the runs folder."""
    folder = SweepFolder(root, name)
    if not SWEEP_NAME_PATTERN.fullmatch(name) or folder.path.is_symlink():
        raise InvalidSweepName(name)
    return folder


def disk_usage(path: Path) -> int:
    """Return the bytes on disk of a file, or of all files under a folder; hard links to one file count once.

    What is removed meanwhile counts nothing. Links to other places are not followed.
    """
    seen, total, waiting = set[tuple[int, int]](), 0, [path]
    while waiting:
        entry = waiting.pop()
        try:
            found = entry.lstat()
            if stat.S_ISDIR(found.st_mode):
                waiting += entry.iterdir()
        except FileNotFoundError:
            continue
        if (found.st_dev, found.st_ino) not in seen:
            seen.add((found.st_dev, found.st_ino))
            total += found.st_blocks * 512
    return total


NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "beegfs", "gpfs", "glusterfs", "afs", "9p"}
    | {"fuse.sshfs", "fuse.glusterfs"}
)
"""File systems of other machines, on which SQLite's locks do not hold."""


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that holds `path`, such as `ext4`; empty if the system does not tell."""
    import psutil

    path, best, kind = path.resolve(), -1, ""
    try:
        mounts = psutil.disk_partitions(all=True)
    except OSError:  # no /proc
        return ""
    for mount in mounts:
        depth = len(Path(mount.mountpoint).parts)
        if path.is_relative_to(mount.mountpoint) and depth >= best:  # a later mount covers an earlier one
            best, kind = depth, mount.fstype
    return kind


_LOCK_SECONDS = 0.5
"""Seconds. `status` briefly takes the lock; retry before concluding that a driver runs."""


@contextmanager
def sweep_lock(folder: SweepFolder, doing: str = "") -> Generator[None]:
    """Hold the sweep's driver lock while entered; `doing`: JUDGING. Raises SweepHeld, which names the holder."""
    since = f"{time.strftime('%F %T')}{doing}"
    lock = FileLock(folder.lock, f"pid {os.getpid()} on {socket.gethostname()}, since {since}, boot {boot_id()}")
    if not lock.acquire(_LOCK_SECONDS):
        raise SweepHeld(folder.name, _shown_holder(lock.holder() or ""))
    try:
        yield
    finally:
        lock.release()


def lock_holder(folder: SweepFolder) -> str | None:
    """Return the process that holds the sweep's lock, as text; None if no driver runs."""
    text = FileLock(folder.lock).holder()
    return None if text is None else _shown_holder(text)


def driver_of(folder: SweepFolder) -> str | None:
    """Return the driver that runs the sweep, as `lock_holder`; None also while its answers are judged."""
    holder = lock_holder(folder)
    return None if holder is None or holder.endswith(JUDGING) else holder


def _shown_holder(text: str) -> str:
    return text.partition(", boot")[0] or "a process that is just starting"


def boot_id() -> str:
    """Return what tells one start of this machine from another; "unknown" where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else "unknown"
