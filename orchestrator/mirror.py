"""A sweep's copy elsewhere, by URL: checkpoints and final models outlive the machine they were made on.

Folders elsewhere, by fsspec URL (s3://, gs://, file://): what is there is whole, or does not count.

Files of a folder are uploaded first, the list of them with their digests last; they are removed the other way round.
An upload that was cut short leaves files that no list names.

Where everything lies in a mirror: <sweep>/{sweep.yaml,data.json,study}, <sweep>/trials/<number>/<attempt>/...

In an attempt's place: `checkpoints/<step>/`, `model/` and `end/`, each whole or not there, with files named as in the
attempt's folder.

Whether a mirror takes, gives and lets go: asked before anything is spent.
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

from orchestrator.errors import OrchestrateError, StorageRefused, nearest
from trainer.storage.atomic_files import failpoint, sha256_of, sync

LIST = "whole.json"
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}},
}
"""A storage that does not answer is tried again by us, who say so, and not for minutes by its library."""


class MirrorRefused(StorageRefused):
    """The storage behind the URL did not take or give what was asked."""


class MirrorDamaged(MirrorRefused):
    """What is there is not what was put there."""


class Abandoned(Exception):
    """The copy is no longer wanted; what was uploaded so far does not count."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """Places under one URL. Credentials come from the environment, as the storage's own library takes them."""

    url: str

    def under(self, place: str) -> Mirror:
        """The places of this one that begin with `place`."""
        return Mirror(f"{self.url.rstrip('/')}/{place}")

    def put(self, place: str, files: Mapping[str, Path], wanted: Callable[[], bool] = lambda: True) -> None:
        """Upload these files, named relative to `place`; whole once this returns. Abandoned as soon as not `wanted`."""
        with _Refusals(self.url):
            store, root = self._open()
            self._unlist(store, f"{root}/{place}")
            listed: dict[str, dict[str, Any]] = {}
            for name, file in sorted(files.items()):
                to = f"{root}/{place}/{name}"
                store.makedirs(to.rpartition("/")[0], exist_ok=True)
                store.put_file(str(file), to)
                listed[name] = {"bytes": file.stat().st_size, "sha256": sha256_of([file])}
                failpoint("mirror.file")
                if not wanted():
                    raise Abandoned
            failpoint("mirror.list")
            store.pipe_file(f"{root}/{place}/{LIST}", json.dumps(listed, indent=1).encode())
        failpoint("mirror.whole")

    def get(self, place: str, folder: Path) -> bool:
        """Download what is whole under `place` into `folder`, which appears at once; False where nothing is.

        MirrorDamaged, and no folder, where a file differs from its digest. OSError where our own disk is full.
        """
        with _Refusals(self.url):
            store, root = self._open()
            listed = self._listed(store, f"{root}/{place}")
            if listed is None:
                return False
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.tmp")
            try:
                aside.mkdir()
                for name, said in listed.items():
                    file = aside / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        store.get_file(f"{root}/{place}/{name}", str(file))
                    except FileNotFoundError:
                        raise MirrorDamaged(f"{self.url}/{place}/{name} is gone") from None
                    if file.stat().st_size != said["bytes"] or sha256_of([file]) != said["sha256"]:
                        raise MirrorDamaged(f"{self.url}/{place}/{name} differs from its digest")
                    sync(file)
                failpoint("mirror.fetched")
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return True

    def files(self, place: str = "") -> list[str]:
        """Every file under this place, whole or half there, by its path below the URL."""
        with _Refusals(self.url):
            store, root = self._open()
            return sorted(str(path)[len(root) + 1 :] for path in store.find(f"{root}/{place}".rstrip("/")))

    def whole(self, place: str = "") -> list[str]:
        """Every place under this one that is whole, by its path below the URL."""
        return [path[: -len(LIST) - 1] for path in self.files(place) if path.endswith(f"/{LIST}")]

    def remove(self, place: str) -> None:
        """What is under `place` no longer counts, then is gone; nothing there is fine."""
        with _Refusals(self.url):
            store, root = self._open()
            found = [str(path) for path in store.find(f"{root}/{place}")]
            for path in sorted(found, key=lambda path: not path.endswith(f"/{LIST}")):
                _gone(store, path)
            if store.isdir(f"{root}/{place}"):  # where folders are more than a part of a name
                store.rm(f"{root}/{place}", recursive=True)

    def write(self, name: str, content: bytes) -> None:
        """One small file, whole or not there."""
        with _Refusals(self.url):
            store, root = self._open()
            store.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            store.pipe_file(f"{root}/{name}", content)

    def read(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""
        with _Refusals(self.url):
            store, root = self._open()
            try:
                found: bytes = store.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return None
            return found

    def erase(self, name: str) -> None:
        """The small file goes; nothing there is fine."""
        with _Refusals(self.url):
            store, root = self._open()
            _gone(store, f"{root}/{name}")

    def _open(self) -> tuple[Any, str]:
        protocol = self.url.partition("://")[0]
        store, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **_OPTIONS.get(protocol, {}))
        return store, str(root).rstrip("/")

    def _unlist(self, store: Any, place: str) -> None:
        """What may be there from an upload before this one no longer counts."""
        if store.isfile(f"{place}/{LIST}"):
            _gone(store, f"{place}/{LIST}")

    def _listed(self, store: Any, place: str) -> dict[str, dict[str, Any]] | None:
        try:
            said = store.cat_file(f"{place}/{LIST}")
        except FileNotFoundError:
            return None
        try:
            listed: dict[str, dict[str, Any]] = {
                str(name): {"bytes": int(told["bytes"]), "sha256": str(told["sha256"])}
                for name, told in json.loads(said).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as why:
            raise MirrorDamaged(f"{self.url}: {place.rpartition('/')[2]}/{LIST} is no list of files") from why
        for name in listed:
            if not name or name.startswith("/") or ".." in name.split("/"):
                raise MirrorDamaged(f"{self.url}: {name!r} leads out of its folder")
        return listed


def _gone(store: Any, path: str) -> None:
    try:
        store.rm_file(path)
    except FileNotFoundError:
        return


class _Refusals:
    """What the storage's library says, in one sentence."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, (StorageRefused, Abandoned)):
            return
        if isinstance(error, OSError) and error.errno in _DISK:
            return
        said = " ".join(str(error).split()) or "no message"
        raise MirrorRefused(f"{self._url} refused: {type(error).__name__}: {said}") from error


CHECKPOINTS, MODEL, END, TRIALS = "checkpoints", "model", "end", "trials"
SPEC = "sweep.yaml"
STUDY = "study"
"""The id of the study whose copies these are."""


def of_sweep(url: str, sweep: str) -> Mirror:
    """Everything of one sweep."""
    return Mirror(url).under(sweep)


def of_trial(url: str, sweep: str, number: int) -> Mirror:
    """Everything of one trial."""
    return of_sweep(url, sweep).under(f"{TRIALS}/{number:04d}")


def of_sft(url: str, sweep: str, key: str) -> Mirror:
    """What the SFT stage of that name made; no retention touches it."""
    return of_sweep(url, sweep).under(f"sft/{key}")


EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Which of this program's extras brings the library for a URL."""
_SAYS = b"prefsweep looks whether it may write here\n"


class MirrorError(OrchestrateError):
    """The mirror cannot be used as it stands; nothing was begun."""


def probe(url: str) -> None:
    """MirrorError where a small object cannot be written, read back and deleted under this URL."""
    protocol = url.partition("://")[0]
    if protocol not in known_implementations:
        near = nearest(protocol, known_implementations)
        raise MirrorError(f"mirror: {protocol}:// is not known{f'; did you mean {near}://?' if near else ''}")
    mirror, name = Mirror(url), f".probe-{uuid4().hex}"
    try:
        mirror.write(name, _SAYS)
        try:
            given = mirror.read(name)
        finally:
            with contextlib.suppress(MirrorRefused):  # what went wrong with the reading is what is told
                mirror.erase(name)
        if given != _SAYS:
            raise MirrorError(f"mirror: {url} does not give back what was written there")
        if mirror.read(name) is not None:
            raise MirrorError(f"mirror: {url} does not let go of what was written there: it may not delete")
    except MirrorRefused as why:
        if isinstance(why.__cause__, ImportError):
            raise MirrorError(f"mirror: {url} needs a library that is not installed: {_library(protocol)}") from why
        raise MirrorError(f"mirror: {why}; what must be possible there: write, read, list and delete") from why


def _library(protocol: str) -> str:
    said = str(known_implementations[protocol].get("err", f"install the fsspec library for {protocol}://"))
    extra = EXTRAS.get(protocol)
    names = {"s3": "s3fs", "gs": "gcsfs"}
    return said if extra is None else f"pip install 'prefsweep[{extra}]' (or pip install {names[extra]})"
