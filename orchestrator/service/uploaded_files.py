"""`UploadedFiles`: files of data that people send with their sweeps, each under the SHA-256 of its content.

A file comes in parts and continues where the last part ended, also after the service or the client was ended. It gets
its name only when it is complete and has the digest that was announced. Each person sees only own files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ExitCode, OrchestrateError, SpecError, SpecProblem, StorageRefused
from orchestrator.spec.estimates.disk_space import format_bytes
from trainer.storage.atomic_files import fsync
from trainer.storage.failpoints import failpoint
from trainer.storage.file_lock import FileLock

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_BYTES = 100 << 30
"""Of all files of one person."""
_READ_BYTES = 1 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UploadRefused(OrchestrateError):
    """The part or the file cannot be stored; what was complete before stays."""


class OtherOffset(UploadRefused):
    """The part does not begin where the file ends."""


class DigestDiffers(UploadRefused):
    """The complete file has another digest than was announced; it was removed."""

    code = ExitCode.REFUSED


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

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES) -> None:
        """`folder`: made at the first upload; `most_bytes`: of the files of one person."""
        self._folder, self._most = folder, most_bytes

    def folder_of(self, person: str) -> Path:
        """Return the folder of a person's files."""
        return self._folder / person

    def path(self, person: str, file: Announced) -> Path | None:
        """Return the complete file; None before."""
        path = self.folder_of(person) / file.digest / file.name
        return path if path.is_file() else None

    def offset(self, person: str, file: Announced) -> int:
        """Return how many bytes there are; the file is complete where that is its size and it has its name.

        Raises:
            UploadRefused: the file cannot be stored, or is larger than what the person has left.
        """
        file.check()
        if self.path(person, file) is not None:
            return file.size
        part = self._part(person, file)
        found = part.stat().st_size if part.is_file() else 0
        used = self._used(person) - found
        if used + file.size > self._most:
            raise UploadRefused(
                f"{file.name} has {format_bytes(file.size)}, and the files of {person} here have {format_bytes(used)} "
                f"of at most {format_bytes(self._most)}"
            )
        return found

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
            if offset != before or before + len(data) > file.size:
                raise OtherOffset(
                    f"{file.name} has {before} of {file.size} bytes here, and the part begins at {offset}"
                )
            try:
                with part.open("ab") as out:
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
        """Return the path of each uploaded file by its name in the sweep file; `files`: its digest and `/`, its name.

        Raises:
            SpecError: one of them was not uploaded completely.
        """
        found: dict[str, str] = {}
        problems: list[SpecProblem] = []
        for written, given in files.items():
            digest, _, name = given.partition("/")
            file = Announced(digest, 0, name)
            file.check()
            path = self.path(person, file)
            if path is None:
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

    def _used(self, person: str) -> int:
        return sum(path.stat().st_size for path in self.folder_of(person).glob("*/*") if path.is_file())

    def _complete(self, file: Announced, part: Path) -> None:
        digest = hashlib.sha256()
        with part.open("rb") as content:
            while data := content.read(_READ_BYTES):
                digest.update(data)
        failpoint("upload.checked")
        if digest.hexdigest() != file.digest:
            part.unlink()
            raise DigestDiffers(
                f"{file.name} arrived with another content than was announced and was removed: send it again"
            )
        try:
            fsync(part)
        except OSError:  # what is on the disk is unknown from now on, and a second call would not say so
            part.unlink()
            raise
        part.rename(part.with_name(file.name))
        fsync(part.parent)
