"""Locks of GPUs, so that no two sweeps of one machine, of any users, take the same one.

Each GPU has two files in a folder that all users share. The driver of a sweep holds a flock on `KEY.lock`, whose text
names the sweep. Every process that computes on the GPU holds a shared flock on `KEY.used`: where a driver is killed,
its workers end a few seconds later, and the GPU is free only then. The kernel releases both with their processes. Who
takes or reads locks holds a flock on the folder meanwhile, so that of two drivers that start at once each gets either
all GPUs of a trial or none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import re
import socket
import stat
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from orchestrator.errors import ExitCode, OrchestrateError, StorageRefused
from orchestrator.gpus import Gpu, visibility_variable, visible_devices
from trainer.results import clause

_VARIABLE = "ORCHESTRATE_GPU_LOCKS"
"""Names another folder than the default, as for containers that share a machine's GPUs."""
_FOLDER = "/tmp/orchestrate-gpus"
_OWN_LOCKS = "PREFSWEEP_OWN_GPU_LOCKS"
"""Tells workers of this machine, as JSON, which locks their driver holds."""
_POLL_SECONDS = 0.5
_FOLDER_SECONDS = 10.0
"""Longest wait for another process that takes or reads locks, which needs milliseconds."""
_LONGEST_TEXT = 4096


class GpusBusy(OrchestrateError):
    """Other sweeps have the GPUs, and this one was asked not to wait."""

    code = ExitCode.LOCKED

    def __init__(self, sentence: str) -> None:
        super().__init__(f"{sentence}; without --no-wait it waits for them, and resources.gpus_per_trial=0 needs none")


class GpuTaken(Exception):
    """Another sweep has taken the GPU of this worker, whose driver has ended."""


@dataclass(frozen=True, slots=True)
class GpuHolder:
    """Who has a GPU; "" where unknown."""

    sweep: str = ""
    user: str = ""
    pid: int = 0
    since: str = ""
    host: str = ""
    has_ended: bool = False
    """Whether the driver has ended and only its workers still use the GPU."""
    problem: str = ""
    """Why the lock's file cannot be used."""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        if not self.sweep:
            return "a sweep that is just starting or ending"
        where = f" on {self.host}" if self.host not in ("", socket.gethostname()) else ""
        end = ", which has ended: its workers still compute" if self.has_ended else ""
        return f"sweep {self.sweep} of {self.user} (pid {self.pid}{where}, since {self.since}){end}"


def gpu_holders(devices: Sequence[Gpu]) -> dict[Gpu, GpuHolder]:
    """Return who has each of these GPUs; free ones are left out.

    Raises:
        StorageRefused: the folder of locks cannot be used.
    """
    if not devices or not locks_folder().exists():
        return {}
    with _locked_folder() as folder:
        found = {device: _holder(folder, device) for device in devices}
    return {device: holder for device, holder in found.items() if holder is not None}


def holders_text(devices: Sequence[Gpu], holders: Mapping[Gpu, GpuHolder]) -> str:
    """Return how many of these GPUs are in use, and who has them; "" where all are free."""
    if not holders:
        return ""
    by_holder: dict[str, list[str]] = {}
    for device, holder in holders.items():
        by_holder.setdefault(str(holder), []).append(device.index)
    listed = ", ".join(
        f"GPU{'s' if len(indices) > 1 else ''} {', '.join(indices)} by {holder}"
        for holder, indices in by_holder.items()
    )
    many = "1 GPU" if len(devices) == 1 else f"{len(holders)} of {len(devices)} GPUs"
    return f"{many} {'is' if len(holders) == 1 else 'are'} in use: {listed}"


@contextmanager
def reserved_gpus(
    sweep: str, least: int, most: int, *, waits: bool, on_wait: Callable[[str], None]
) -> Generator[tuple[Gpu, ...]]:
    """Hold between `least` and `most` free GPUs for this process; this process and its children see only these.

    Args:
        sweep: name that other sweeps show.
        least: GPUs of one trial; 0 takes none and hides all.
        most: GPUs of all trials at a time.
        waits: whether to wait for GPUs that others have.
        on_wait: called again and again while it waits, with a sentence; may raise to give up.

    Raises:
        GpusBusy: fewer than `least` are free, and `waits` is false.
        StorageRefused: the folder of locks cannot be used.
    """
    devices = visible_devices()
    if not devices:
        yield ()
        return
    text = {
        "sweep": sweep,
        "user": _user_name(os.getuid()),
        "pid": os.getpid(),
        "since": time.strftime("%F %T"),
        "host": socket.gethostname(),
        "token": uuid4().hex,
    }
    locks: list[_Lock] = []
    try:
        while least:
            with _locked_folder() as folder:
                locks = _take(folder, devices, least, most, json.dumps(text))
                if locks:
                    break
                holders = {device: holder for device in devices if (holder := _holder(folder, device)) is not None}
            sentence = _sentence(devices, holders, least)
            if not waits:
                raise GpusBusy(sentence)
            on_wait(f"waiting for {_count(least)}: {sentence}")
            time.sleep(_POLL_SECONDS)
        with _environment(devices, [lock.device for lock in locks], str(text["token"])):
            yield tuple(lock.device for lock in locks)
    finally:
        for lock in locks:
            lock.release()


def _sentence(devices: Sequence[Gpu], holders: Mapping[Gpu, GpuHolder], least: int) -> str:
    free = len(devices) - len(holders)
    short = f"{free} {'is' if free == 1 else 'are'} free, and a trial needs {least}; " if free else ""
    return short + (holders_text(devices, holders) or "they have just become free")


def _count(number: int) -> str:
    return "a GPU" if number == 1 else f"{number} GPUs"


_CHANGED = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "ACCELERATE_USE_CPU")


@contextmanager
def _environment(devices: Sequence[Gpu], held: Sequence[Gpu], token: str) -> Generator[None]:
    """Let this process and its children see only the GPUs that it holds, and workers find their locks."""
    before = dict(os.environ)
    vendor = devices[0].vendor
    is_divided = any("." in gpu.index for gpu in held)
    # Ray accepts ROCR_VISIBLE_DEVICES only beside HIP's variable.
    if vendor == "amd" or is_divided or [gpu.key for gpu in held] != [gpu.key for gpu in devices]:
        os.environ[visibility_variable(vendor)] = ",".join(gpu.token for gpu in held)
    if vendor == "nvidia":
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # indices are those of nvidia-smi
    if vendor == "apple" and not held:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # no variable hides Apple's GPU
    os.environ[_OWN_LOCKS] = json.dumps({"folder": str(locks_folder()), "keys": [g.key for g in held], "token": token})
    try:
        yield
    finally:
        for name in (*_CHANGED, _OWN_LOCKS):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


_used: list[int] = []
"""File descriptors of the GPUs that this process uses, until it ends."""


def use_own_gpus() -> None:
    """Mark the GPUs of this worker's driver as used until this process ends; no effect in a cluster of others.

    Raises:
        GpuTaken: the driver has ended, and another sweep has taken one of them.
    """
    if _used or not (own := os.environ.get(_OWN_LOCKS)):
        return
    found = json.loads(own)
    folder = os.open(found["folder"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with ExitStack() as stack:
        stack.callback(os.close, folder)
        opened = [_open(folder, f"{key}.used") for key in found["keys"]]
        try:
            for key, used in zip(found["keys"], opened, strict=True):
                fcntl.flock(used, fcntl.LOCK_SH)
                lock = _open(folder, f"{key}.lock")
                text = os.pread(lock, _LONGEST_TEXT, 0).decode(errors="replace")
                os.close(lock)
                # A driver writes its text before it looks for users: one of the two sees the other.
                if found["token"] not in text:
                    raise GpuTaken(f"another sweep has taken {key} after the driver of this worker ended")
        except BaseException:
            for used in opened:
                os.close(used)
            raise
    _used.extend(opened)


# --- the files -------------------------------------------------------------------------------------------------------


class _Lock:
    """A GPU's `KEY.lock`, held by this process."""

    def __init__(self, device: Gpu, fd: int) -> None:
        self.device, self._fd = device, fd

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def _take(folder: int, devices: Sequence[Gpu], least: int, most: int, text: str) -> list[_Lock]:
    """Take up to `most` free GPUs; none where fewer than `least` are free. The folder is locked."""
    taken: list[_Lock] = []
    for device in devices:
        if len(taken) < most and (lock := _try(folder, device, text)) is not None:
            taken.append(lock)
    if len(taken) >= least:
        return taken
    for lock in taken:
        lock.release()
    return []


def _try(folder: int, device: Gpu, text: str) -> _Lock | None:
    with ExitStack() as stack:
        try:
            fd = _open(folder, f"{device.key}.lock")
            stack.callback(os.close, fd)
            used = _open(folder, f"{device.key}.used")
            stack.callback(os.close, used)
        except OSError:  # `_holder` says why
            return None
        if not _flock(fd, fcntl.LOCK_EX):
            return None
        before = os.pread(fd, _LONGEST_TEXT, 0)
        _write(fd, text.encode())
        if not _flock(used, fcntl.LOCK_EX):  # by workers of a driver that has ended
            _write(fd, before)
            return None
        stack.pop_all()
        os.close(used)
        return _Lock(device, fd)


def _holder(folder: int, device: Gpu) -> GpuHolder | None:
    """Return who has the GPU; None if it is free. The folder is locked."""
    name = f"{device.key}.lock"
    try:
        with ExitStack() as stack:
            fd = _open(folder, name)
            stack.callback(os.close, fd)
            used = _open(folder, f"{device.key}.used")
            stack.callback(os.close, used)
            is_driven = not _flock(fd, fcntl.LOCK_SH)
            if not is_driven and _flock(used, fcntl.LOCK_EX):
                return None
            return _parsed(os.pread(fd, _LONGEST_TEXT, 0), has_ended=not is_driven)
    except OSError as error:
        path = locks_folder() / name
        return GpuHolder(problem=f"{_owner(folder, name)}, whose lock {path} cannot be used ({error.strerror})")


def _parsed(content: bytes, *, has_ended: bool) -> GpuHolder:
    """Parse a lock's text, which any user of the machine may have written."""
    try:
        found = json.loads(content)
        texts = {name: _printable(str(found[name])) for name in ("sweep", "user", "since", "host")}
        return GpuHolder(**texts, pid=int(found["pid"]), has_ended=has_ended)
    except (ValueError, TypeError, KeyError):
        return GpuHolder(has_ended=has_ended)


def _printable(text: str) -> str:
    return re.sub(r"[^\w.:@ ()+-]", "?", text)[:64]


def _open(folder: int, name: str) -> int:
    """Open a lock's file of any user, made where it is missing; raises OSError for anything but a regular file.

    Without O_CREAT first: in a folder like /tmp Linux refuses it for files of others (fs.protected_regular).
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    while True:
        try:
            fd = os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            with suppress(FileExistsError):  # by another user at this moment
                fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
                os.fchmod(fd, 0o666)  # whatever the umask
                return fd
            continue
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no file")
        return fd


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(fd: int, content: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, content, 0)


def locks_folder() -> Path:
    """Return the folder of the locks: $ORCHESTRATE_GPU_LOCKS, else one that all users of this machine share."""
    given = os.environ.get(_VARIABLE)
    return Path(given).expanduser().resolve() if given else Path(_FOLDER)


@contextmanager
def _locked_folder() -> Generator[int]:
    """Yield the folder's descriptor while this process alone takes and reads locks; makes the folder."""
    path = locks_folder()
    with ExitStack() as stack:
        try:
            with suppress(FileExistsError):
                path.mkdir(parents=True)
                path.chmod(0o1777)  # whatever the umask; users cannot remove each other's files
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(path, error.strerror or type(error).__name__) from error
        stack.callback(os.close, folder)
        until = time.monotonic() + _FOLDER_SECONDS
        while not _flock(folder, fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise _unusable(path, "another process has locked it for long")
            time.sleep(0.01)
        yield folder


def _unusable(path: Path, reason: str) -> StorageRefused:
    return StorageRefused(
        f"the folder {path}, by which sweeps share this machine's GPUs, cannot be used: {clause(reason)}; remove it, "
        f"or set {_VARIABLE} to a folder that all users may write"
    )


def _owner(folder: int, name: str) -> str:
    try:
        return _user_name(os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid)
    except OSError:  # it cannot be made
        return "somebody"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
