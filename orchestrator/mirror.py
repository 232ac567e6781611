"""`Mirror`: copies of checkpoints and final models at an fsspec URL (s3://, gs://, file://), which outlive the machine.

A folder in the mirror counts only when complete: its files are uploaded first, the list of their digests last, and
removed in reverse order. An interrupted upload leaves files that no list names.

Layout: <sweep>/{sweep.yaml,data.json,study}, <sweep>/trials/<number>/<attempt>/...; in an attempt's folder
`checkpoints/<step>/`, `model/` and `end/`, each complete or absent, with files named as in the attempt's local folder.

`probe_mirror` checks before anything is spent that a mirror can be written, read and deleted from.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
from fsspec.registry import known_implementations

from orchestrator.errors import OrchestrateError, StorageRefused, closest_match
from trainer.results import clause
from trainer.storage.atomic_files import digest_of_stream, fsync, sha256_of
from trainer.storage.failpoints import failpoint

COMPLETE_LIST = "whole.json"
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}},
}
"""Few retries inside the library: mirror_upload retries by itself and logs each failure."""


class MirrorRefused(StorageRefused):
    """The storage behind the URL refused a read or a write."""


class MirrorDamaged(MirrorRefused):
    """A file in the mirror is missing or differs from its digest."""


class UploadCancelled(Exception):
    """The upload is no longer needed; the files uploaded so far belong to no complete folder."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """Folders under one URL. The storage's library (s3fs, gcsfs) reads credentials from the environment."""

    url: str

    def at(self, prefix: str) -> Mirror:
        """Return the mirror at `prefix` below this URL."""
        return Mirror(f"{self.url.rstrip('/')}/{prefix}")

    def put(self, prefix: str, files: Mapping[str, Path], required: Callable[[], bool] = lambda: True) -> None:
        """Upload `files`, named relative to `prefix`; the folder is complete once this returns.

        `required` is called after each file; if it returns False, UploadCancelled is raised.
        """
        with _TranslatedErrors(self.url):
            store, root = self._open()
            self._invalidate(store, f"{root}/{prefix}")
            listed: dict[str, dict[str, Any]] = {}
            for name, file in sorted(files.items()):
                to = f"{root}/{prefix}/{name}"
                store.makedirs(to.rpartition("/")[0], exist_ok=True)
                store.put_file(str(file), to)
                listed[name] = {"bytes": file.stat().st_size, "sha256": sha256_of([file])}
                failpoint("mirror.file")
                if not required():
                    raise UploadCancelled
            failpoint("mirror.list")
            store.pipe_file(f"{root}/{prefix}/{COMPLETE_LIST}", json.dumps(listed, indent=1).encode())
        failpoint("mirror.whole")

    def get(self, prefix: str, folder: Path) -> bool:
        """Download the complete folder `prefix` to `folder` atomically; return False if there is none.

        Raises MirrorDamaged if a file is missing or differs from its digest, OSError if the local disk is full; then
        `folder` is unchanged.
        """
        with _TranslatedErrors(self.url):
            store, root = self._open()
            listed = self._read_list(store, f"{root}/{prefix}")
            if listed is None:
                return False
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.tmp")
            try:
                temporary.mkdir()
                for name, entry in listed.items():
                    file = temporary / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        store.get_file(f"{root}/{prefix}/{name}", str(file))
                    except FileNotFoundError:
                        raise MirrorDamaged(f"{self.url}/{prefix}/{name}: missing, though in {COMPLETE_LIST}") from None
                    if file.stat().st_size != entry["bytes"] or sha256_of([file]) != entry["sha256"]:
                        raise MirrorDamaged(f"{self.url}/{prefix}/{name}: differs from its digest in {COMPLETE_LIST}")
                    fsync(file)
                failpoint("mirror.fetched")
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return True

    def put_verified(
        self, prefix: str, files: Mapping[str, Path], log: Callable[[str, bool], None] = lambda _name, _sent: None
    ) -> None:
        """Upload `files` as `put`, each read back and compared by digest; files that are there and equal are not sent.

        So a call that was interrupted is continued by the same call. What the folder has besides `files` is deleted.

        Args:
            prefix: the folder below the URL.
            files: by their names below it.
            log: called after each file with its name and whether it was sent.

        Raises:
            MirrorDamaged: a file that was just sent reads back differently.
        """
        with _TranslatedErrors(self.url):
            store, root = self._open()
            self._invalidate(store, f"{root}/{prefix}")
            listed: dict[str, dict[str, Any]] = {}
            for name, file in sorted(files.items()):
                to, size, digest = f"{root}/{prefix}/{name}", file.stat().st_size, sha256_of([file])
                if is_new := _remote_digest(store, to, size) != digest:
                    store.makedirs(to.rpartition("/")[0], exist_ok=True)
                    store.put_file(str(file), to)
                    failpoint("mirror.file")
                    if _remote_digest(store, to, size) != digest:
                        raise MirrorDamaged(f"{self.url}/{prefix}/{name}: reads back differently from {file}")
                listed[name] = {"bytes": size, "sha256": digest}
                log(name, is_new)
            for path in map(str, store.find(f"{root}/{prefix}")):
                if path.removeprefix(f"{root}/{prefix}/") not in listed:
                    _delete_if_exists(store, path)
            failpoint("mirror.list")
            store.pipe_file(f"{root}/{prefix}/{COMPLETE_LIST}", json.dumps(listed, indent=1).encode())
        failpoint("mirror.whole")

    def complete_files(self, prefix: str) -> dict[str, int] | None:
        """Return the bytes of each file of the complete folder `prefix`; None if there is none."""
        with _TranslatedErrors(self.url):
            store, root = self._open()
            listed = self._read_list(store, f"{root}/{prefix}")
        return None if listed is None else {name: entry["bytes"] for name, entry in listed.items()}

    def get_resumed(self, prefix: str, folder: Path) -> None:
        """Download the complete folder `prefix` into `folder`; files that are there and equal are not fetched again.

        So a call that was interrupted is continued by the same call. Raises MirrorDamaged if there is no such folder,
        or if a file is missing or differs from its digest.
        """
        with _TranslatedErrors(self.url):
            store, root = self._open()
            listed = self._read_list(store, f"{root}/{prefix}")
            if listed is None:
                raise MirrorDamaged(f"{self.url}/{prefix} has no {COMPLETE_LIST}: there is no complete copy")
            for name, entry in listed.items():
                file = folder / name
                if file.is_file() and sha256_of([file]) == entry["sha256"]:
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    store.get_file(f"{root}/{prefix}/{name}", str(file))
                except FileNotFoundError:
                    raise MirrorDamaged(f"{self.url}/{prefix}/{name}: missing, though in {COMPLETE_LIST}") from None
                if sha256_of([file]) != entry["sha256"]:
                    raise MirrorDamaged(f"{self.url}/{prefix}/{name}: differs from its digest in {COMPLETE_LIST}")
                fsync(file)
                failpoint("mirror.file-fetched")

    def files(self, prefix: str = "") -> list[str]:
        """Return the path below the URL of every file under `prefix`, files of incomplete folders included."""
        with _TranslatedErrors(self.url):
            store, root = self._open()
            return sorted(str(path)[len(root) + 1 :] for path in store.find(f"{root}/{prefix}".rstrip("/")))

    def complete_paths(self, prefix: str = "") -> list[str]:
        """Return the path below the URL of every complete folder under `prefix`."""
        return [path[: -len(COMPLETE_LIST) - 1] for path in self.files(prefix) if path.endswith(f"/{COMPLETE_LIST}")]

    def remove(self, prefix: str) -> None:
        """Delete everything under `prefix`, lists of complete folders first. Does nothing if there is nothing."""
        with _TranslatedErrors(self.url):
            store, root = self._open()
            found = [str(path) for path in store.find(f"{root}/{prefix}")]
            for path in sorted(found, key=lambda path: not path.endswith(f"/{COMPLETE_LIST}")):
                _delete_if_exists(store, path)
            if store.isdir(f"{root}/{prefix}"):  # a file system has folders, an object store only names
                store.rm(f"{root}/{prefix}", recursive=True)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        with _TranslatedErrors(self.url):
            store, root = self._open()
            store.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            store.pipe_file(f"{root}/{name}", content)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if it does not exist."""
        with _TranslatedErrors(self.url):
            store, root = self._open()
            try:
                found: bytes = store.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return None
            return found

    def delete_file(self, name: str) -> None:
        """Delete a small file if it exists."""
        with _TranslatedErrors(self.url):
            store, root = self._open()
            _delete_if_exists(store, f"{root}/{name}")

    def _open(self) -> tuple[Any, str]:
        protocol = self.url.partition("://")[0]
        store, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **_OPTIONS.get(protocol, {}))
        return store, str(root).rstrip("/")

    def _invalidate(self, store: Any, prefix: str) -> None:
        """Mark an earlier upload to the same folder as incomplete."""
        if store.isfile(f"{prefix}/{COMPLETE_LIST}"):
            _delete_if_exists(store, f"{prefix}/{COMPLETE_LIST}")

    def _read_list(self, store: Any, prefix: str) -> dict[str, dict[str, Any]] | None:
        try:
            content = store.cat_file(f"{prefix}/{COMPLETE_LIST}")
        except FileNotFoundError:
            return None
        try:
            listed: dict[str, dict[str, Any]] = {
                str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                for name, entry in json.loads(content).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MirrorDamaged(
                f"{self.url}: {prefix.rpartition('/')[2]}/{COMPLETE_LIST} is not a list of files"
            ) from error
        for name in listed:
            if not name or name.startswith("/") or ".." in name.split("/"):
                raise MirrorDamaged(f"{self.url}: {name!r} points outside of its folder")
        return listed


def _remote_digest(store: Any, path: str, size: int) -> str:
    """Return the digest of a stored file as `sha256_of` has it, read from the store; empty if it has another size."""
    try:
        if store.size(path) != size:
            return ""
        with store.open(path, "rb") as stream:
            return digest_of_stream(path.rpartition("/")[2], size, stream)
    except FileNotFoundError:
        return ""


def _delete_if_exists(store: Any, path: str) -> None:
    try:
        store.rm_file(path)
    except FileNotFoundError:
        return


class _TranslatedErrors:
    """Raises errors of the storage's library as MirrorRefused; errors of the local disk pass."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, (StorageRefused, UploadCancelled)):
            return
        if isinstance(error, OSError) and error.errno in _DISK:
            return
        message = " ".join(str(error).split()) or "no message"
        raise MirrorRefused(f"{self._url} refused: {type(error).__name__}: {message}") from error


CHECKPOINTS, MODEL, RESULT, TRIALS = "checkpoints", "model", "end", "trials"
SPEC = "sweep.yaml"
STUDY = "study"
"""File with the id of the study that owns the mirror folder."""


def sweep_mirror(url: str, sweep: str) -> Mirror:
    """Return the mirror of one sweep."""
    return Mirror(url).at(sweep)


def trial_mirror(url: str, sweep: str, number: int) -> Mirror:
    """Return the mirror of one trial."""
    return sweep_mirror(url, sweep).at(f"{TRIALS}/{number:04d}")


def sft_mirror(url: str, sweep: str, key: str) -> Mirror:
    """Return the mirror of the SFT stage with this content key; retention never deletes it."""
    return sweep_mirror(url, sweep).at(f"sft/{key}")


EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""URL scheme -> extra of this package that installs its library."""
_PROBE_CONTENT = b"prefsweep checks whether it may write here\n"


class MirrorError(OrchestrateError):
    """The mirror cannot be used; no trial was started."""


def probe_mirror(url: str) -> None:
    """Check the mirror: raise MirrorError if a small object cannot be written, read back and deleted under this URL."""
    protocol, separator, _ = url.partition("://")
    if not separator:
        folder = f"; a folder is written as file://{url}" if url.startswith("/") else ", as s3://BUCKET/FOLDER is one"
        raise MirrorError(f"mirror: {url} is no URL{folder}")
    if protocol not in known_implementations:
        near = closest_match(protocol, known_implementations)
        raise MirrorError(f"mirror: {protocol}:// is not known{f'; did you mean {near}://?' if near else ''}")
    mirror, name = Mirror(url), f".probe-{uuid4().hex}"
    try:
        mirror.write(name, _PROBE_CONTENT)
        try:
            content = mirror.read(name)
        finally:
            with contextlib.suppress(MirrorRefused):  # the error of the read is the one to report
                mirror.delete_file(name)
        if content != _PROBE_CONTENT:
            raise MirrorError(f"mirror: {url}: the object read back differs from the one written")
        if mirror.read(name) is not None:
            raise MirrorError(f"mirror: {url}: cannot delete objects; grant permission to write, read, list and delete")
    except MirrorRefused as error:
        if isinstance(error.__cause__, ImportError):
            raise MirrorError(
                f"mirror: {url} needs a library that is not installed: {_check_library(protocol)}"
            ) from error
        raise MirrorError(f"mirror: {clause(error)}; grant permission to write, read, list and delete") from error


def _check_library(protocol: str) -> str:
    message = str(known_implementations[protocol].get("err", f"install the fsspec library for {protocol}://"))
    extra = EXTRAS.get(protocol)
    names = {"s3": "s3fs", "gs": "gcsfs"}
    return message if extra is None else f"pip install 'prefsweep[{extra}]' (or pip install {names[extra]})"
