"""`UploadedFiles`: files of data and models that people send with their sweeps, each file under its SHA-256.

A file comes in parts and continues where the last part ended, also after the service or the client was ended. It gets
its name only when it is complete and has the digest that was announced. A model is a folder of hard links to such
files, under the SHA-256 of their names and digests. Each person sees only own files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.api.uploads import is_model_file, model_problems
from orchestrator.errors import OrchestrateError, SpecError, SpecProblem, StorageRefused
from orchestrator.service import LARGEST_MODEL_GB
from orchestrator.spec.estimates.disk_space import format_bytes
from trainer.storage.atomic_files import digest_of, fsync
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_BYTES = 100 << 30
"""Of all files of one person."""
_READ_BYTES = 1 << 20
_INDEX = ".safetensors.index.json"
_MOST_INDEX_BYTES = 64 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UploadRefused(OrchestrateError):
    """The part or the file cannot be stored; what was complete before stays."""


class OtherOffset(UploadRefused):
    """The part does not begin where the file ends."""


class DigestDiffers(UploadRefused):
    """The complete file has another digest than was announced; it was removed, so that it can be sent again."""


@dataclass(frozen=True, slots=True)
class Announced:
    """A file that is sent: the SHA-256 of its content, its bytes, its name without folders."""

    digest: str
    size: int
    name: str

    def check(self) -> None:
        """Raise UploadRefused for what cannot be a digest, a size or a name."""
        if not _DIGEST.fullmatch(self.digest):
            raise UploadRefused("a file is named by the 64 hexadecimal digits of its SHA-256")
        if not _NAME.fullmatch(self.name):
            raise UploadRefused(
                f"{self.name!r} cannot be a file's name here: use letters, digits, dots, dashes and underscores"
            )
        if self.size < 0:
            raise UploadRefused("a file has no negative size")


class UploadedFiles:
    """The uploaded files of a runs folder."""

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES, largest_model: float = LARGEST_MODEL_GB) -> None:
        """`folder`: made at the first upload; `most_bytes`: of a person's files; `largest_model`: in GB, 0 for none."""
        self._folder, self._most, self._largest_model = folder, most_bytes, largest_model

    def folder_of(self, person: str) -> Path:
        """Return the folder of a person's files."""
        return self._folder / person

    def path(self, person: str, file: Announced) -> Path | None:
        """Return the complete file; None before."""
        path = self.folder_of(person) / file.digest / file.name
        return path if path.is_file() else None

    def model(self, person: str, name: str, files: Mapping[str, tuple[str, int]]) -> tuple[str, list[str]]:
        """Make a model of uploaded files; return what a submission names it by, and the files that are missing.

        Args:
            person: whose files they are.
            name: of the model's folder.
            files: SHA-256 and bytes of each file by its name.

        Raises:
            UploadRefused: a file is code or a pickle, the model is too large, or its index names other files.
            StorageRefused: the disk refuses.
        """
        for each, (digest, size) in files.items():
            Announced(digest, size, each).check()
        digest = digest_of({each: found for each, (found, _) in files.items()})
        Announced(digest, 0, name).check()
        problems = model_problems(list(files)) + [f"{n} is no file of a model" for n in files if not is_model_file(n)]
        if problems:
            raise UploadRefused(f"{name} is not accepted as a model: {'; '.join(problems)}")
        size = sum(size for _, size in files.values())
        if size > self._largest_model * 1e9:
            limit = f"models of at most {self._largest_model:g} GB" if self._largest_model else "no models"
            raise UploadRefused(
                f"{name} has {format_bytes(size)}, and this service accepts {limit} (`orchestrate serve "
                "--largest-model GB`); a model in one of its data folders, or on the hub, needs no upload"
            )
        model = self.folder_of(person) / digest / name
        if model.is_dir():
            return f"{digest}/{name}", []
        found = {each: self._with_digest(person, digest, size) for each, (digest, size) in files.items()}
        missing = [each for each, path in found.items() if path is None]
        self._check_space(person, name, sum(files[each][1] for each in missing))
        if not missing:
            model.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(model.with_name(f".{name}.lock")):
                if not model.is_dir():
                    _link(model, {each: path for each, path in found.items() if path is not None})
        return f"{digest}/{name}", missing

    def offset(self, person: str, file: Announced) -> int:
        """Return how many bytes there are; the file is complete where that is its size and it has its name.

        What is stored of a file that was announced with a larger size counts as nothing.

        Raises:
            UploadRefused: the file cannot be stored, or is larger than what the person has left.
        """
        file.check()
        if self.path(person, file) is not None:
            return file.size
        part = self._part(person, file)
        found = part.stat().st_size if part.is_file() else 0
        self._check_space(person, file.name, file.size, found)
        return found if found <= file.size else 0

    def append(self, person: str, file: Announced, offset: int, data: bytes) -> int:
        """Add a part; return how many bytes there are. The last one is checked against the digest and completes it.

        Raises:
            OtherOffset: the part does not begin where the file ends, which `offset` says.
            DigestDiffers: the content is not what was announced; it is removed.
            UploadRefused, StorageRefused: see `offset`; the disk is full.
        """
        file.check()
        part = self._part(person, file)
        part.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(part.with_suffix(".lock")):
            before = self.offset(person, file)
            if self.path(person, file) is not None:
                return file.size
            if offset == before and before + len(data) > file.size:
                raise UploadRefused(f"{file.name} has {file.size} bytes, and this part ends at {before + len(data)}")
            if offset != before:
                raise OtherOffset(
                    f"{file.name} has {before} of {file.size} bytes here, and the part begins at {offset}"
                )
            try:
                with part.open("ab" if before else "wb") as out:
                    out.write(data)
            except OSError as error:
                if part.exists():
                    os.truncate(part, before)
                if error.errno not in DISK_FULL:
                    raise
                raise StorageRefused(f"the service's disk is full: {file.name} is not stored") from error
            if before + len(data) == file.size:
                self._complete(file, part)
            return before + len(data)

    def aliases(self, person: str, files: Mapping[str, str]) -> dict[str, str]:
        """Return the path of each uploaded file or model by its name in the sweep file.

        `files`: digest, `/` and name of each.

        Raises:
            SpecError: one of them was not uploaded completely.
        """
        found: dict[str, str] = {}
        problems: list[SpecProblem] = []
        for written, given in files.items():
            digest, _, name = given.partition("/")
            file = Announced(digest, 0, name)
            file.check()
            path = self.folder_of(person) / digest / name
            if not path.exists():
                problems.append(
                    SpecProblem("", "", f"{written} was not uploaded completely", f"its digest is {digest}")
                )
            else:
                found[written] = str(path.resolve())
        if problems:
            raise SpecError(problems)
        return found

    def _part(self, person: str, file: Announced) -> Path:
        return self.folder_of(person) / file.digest / f".{file.name}.part"

    def _with_digest(self, person: str, digest: str, size: int) -> Path | None:
        """Return a complete file of this content, whatever its name."""
        path = next((p for p in (self.folder_of(person) / digest).glob("[!.]*") if p.is_file()), None)
        if path is not None and path.stat().st_size != size:
            raise UploadRefused(f"the file {digest} has {path.stat().st_size} bytes, and not {size}")
        return path

    def _check_space(self, person: str, name: str, size: int, there: int = 0) -> None:
        """Raise UploadRefused where a person's files would be too large; `there`: bytes of this one that are stored."""
        used = self._used(person) - there
        if used + size > self._most:
            raise UploadRefused(
                f"{name} has {format_bytes(size)}, and the files of {person} here have {format_bytes(used)} of at most "
                f"{format_bytes(self._most)}; `orchestrate clean` on the service's machine removes what no sweep needs"
            )

    def _used(self, person: str) -> int:
        """Return the bytes of a person's files; a file that is part of models counts once."""
        states = [path.stat() for path in self.folder_of(person).rglob("*") if path.is_file()]
        return sum({state.st_ino: state.st_size for state in states}.values())

    def _complete(self, file: Announced, part: Path) -> None:
        digest = hashlib.sha256()
        with part.open("rb") as content:
            while data := content.read(_READ_BYTES):
                digest.update(data)
        failpoint("upload.checked")
        if digest.hexdigest() != file.digest:
            part.unlink()
            raise DigestDiffers(
                f"{file.name} arrived with another content than its SHA-256 announces, and what arrived was removed: "
                "send the file again from its beginning"
            )
        try:
            fsync(part)
        except OSError:  # what is on the disk is unknown from now on, and a second call would not say so
            part.unlink()
            raise
        part.rename(part.with_name(file.name))
        fsync(part.parent)


def _link(model: Path, files: Mapping[str, Path]) -> None:
    """Make a folder of links to files, complete or not at all.

    Raises:
        UploadRefused: an index of weights names files that are not part of the model.
        StorageRefused: the disk refuses.
    """
    for name, path in files.items():
        if name.endswith(_INDEX):
            _check_index(name, path, files)
    new = model.with_name(f".{model.name}.new")
    try:
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        for name, path in files.items():
            os.link(path, new / name)
        fsync(new)
        new.rename(model)
        fsync(model.parent)
    except OSError as error:
        raise StorageRefused(f"the service's disk refuses the model {model.name}: {error.strerror}") from error


def _check_index(name: str, path: Path, files: Mapping[str, Path]) -> None:
    """Raise UploadRefused for an index whose weights are in other files: loading would follow their paths."""
    try:
        given: Any = json.loads(path.read_bytes()) if path.stat().st_size <= _MOST_INDEX_BYTES else None
        named = set(given["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UploadRefused(f"{name} is no index of weights") from None
    if others := sorted(str(each) for each in named if each not in files):
        raise UploadRefused(f"{name} names {', '.join(others[:3])}, which the model does not have")
