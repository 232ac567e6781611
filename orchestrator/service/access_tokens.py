"""`AccessTokens`: who may use the service, and how much; `LoginSessions`: browsers that have logged in.

A token is shown once and stored as its SHA-256 digest: it has 256 random bits, so that a slow hash would add nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import ExitCode, OrchestrateError, closest_match
from orchestrator.folders import SWEEP_NAME_PATTERN
from trainer.storage.atomic_files import write_text
from trainer.storage.file_lock import FileLock

T = TypeVar("T")
MACHINE = "local"
"""Name of the machine's own token, which commands of this machine use."""
TOKEN_PREFIX = "ps_"
"""By which scanners for secrets recognize a token."""
CODE_SECONDS = 900.0
SESSION_SECONDS = 30 * 24 * 3600.0
_FAILURES = 10
_FAILURE_SECONDS = 60.0
_MOST_ADDRESSES = 10_000
"""Addresses whose failures are remembered; the oldest are forgotten first."""
_TIME_RESOLUTION = 0.1
"""Seconds. A file's times say nothing about writes within the resolution of the kernel's clock."""


class Role(IntEnum):
    """What a person may do; each includes the ones before."""

    VIEWER = 1
    """Look."""
    OPERATOR = 2
    """Submit, stop and change sweeps."""
    ADMIN = 3
    """Also name databases, tracking servers and mirrors, and delete the sweeps of others."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who makes a request."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token as it is listed and stored; times in seconds since 1970."""

    name: str
    role: str
    digest: str
    created: float


class TokenRefused(OrchestrateError):
    """The token cannot be created or removed; nothing was changed."""


class ExposedFile(OrchestrateError):
    """Other users of the machine may read a file of secrets."""

    code = ExitCode.REFUSED

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}, so that its tokens may not be secret; remove it and create them again")


class AccessTokens:
    """The tokens of one runs folder, in `service/tokens.json` (mode 600), and the machine's own in `service/token`."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the service; it is created for this user only."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file, self._own = folder / "tokens.json", folder / "token"
        self._lock = FileLock(folder / "tokens.lock")
        self._known: dict[Path, tuple[Any, Any]] = {}
        """By file: its state, and what was read from it."""

    def machine_token(self) -> str:
        """Return the machine's own token, made where it is missing. Raises ExposedFile."""
        with self._lock:
            if self._own.exists():
                _check_private(self._own)
                return self._own.read_text(encoding="ascii").strip()
            token = _new_token()
            _write_private(self._own, token + "\n")
            return token

    def create(self, name: str, role: Role) -> str:
        """Return a new token for a person, which is stored only as its digest.

        Raises:
            TokenRefused: the name has a token, or cannot be a person's name.
        """
        if not SWEEP_NAME_PATTERN.fullmatch(name) or name == MACHINE:
            raise TokenRefused(
                f"{name!r} cannot be a person's name: use 1 to 64 letters, digits, dots, dashes and underscores, the "
                f"first a letter or a digit, and not {MACHINE!r}"
            )
        with self._lock:
            records = self._read()
            if name in records:
                raise TokenRefused(f"{name} has a token; revoke it first")
            token = _new_token()
            records[name] = TokenRecord(name, role.name.lower(), _digest(token), time.time())
            self._write(records)
        return token

    def revoke(self, name: str) -> None:
        """End a person's token. Raises TokenRefused."""
        with self._lock:
            records = self._read()
            if name not in records:
                nearest = closest_match(name, records)
                raise TokenRefused(f"{name!r} has no token{f'; did you mean {nearest!r}?' if nearest else ''}")
            del records[name]
            self._write(records)

    def people(self) -> list[TokenRecord]:
        """Return the tokens of people, by name."""
        return sorted(self._read().values(), key=lambda record: record.name)

    def person(self, token: str) -> Person | None:
        """Return whose token this is; None if it is none. The files are looked at each time: a revoked one ends now."""
        return self.person_of(_digest(token))

    def person_of(self, digest: str) -> Person | None:
        """Return whose token has this digest, with the role that the person has now."""
        found = None
        for record in self._read().values():  # all of them, so that the time does not depend on the token
            if secrets.compare_digest(digest, record.digest):
                found = Person(record.name, Role[record.role.upper()])
        if secrets.compare_digest(digest, self._unless_changed(self._own, lambda: _digest(self.machine_token()))):
            found = Person(MACHINE, Role.ADMIN)
        return found

    def _read(self) -> dict[str, TokenRecord]:
        return dict(self._unless_changed(self._file, self._records))

    def _records(self) -> dict[str, TokenRecord]:
        if not self._file.exists():
            return {}
        _check_private(self._file)
        found: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        return {name: TokenRecord(**values) for name, values in found.items()}

    def _unless_changed(self, file: Path, read: Callable[[], T]) -> T:
        """Return what `read` returns, read again only after the file was replaced or got other rights."""
        looked, state = time.time(), file.stat() if file.exists() else None
        if state is None:
            return read()
        now = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        known = self._known.get(file)
        if known is not None and known[0] == now:
            return known[1]
        found = read()
        if state.st_ctime < looked - _TIME_RESOLUTION:
            self._known[file] = (now, found)
        return found

    def _write(self, records: dict[str, TokenRecord]) -> None:
        content = {name: asdict(record) for name, record in records.items()}
        _write_private(self._file, json.dumps(content, indent=2) + "\n")


class LoginSessions:
    """Logins of browsers, in memory: one-time codes and cookies; a service that starts again asks for a new login."""

    def __init__(self, tokens: AccessTokens, now: Callable[[], float] = time.monotonic) -> None:
        """`now`: seconds of a clock that never goes back."""
        self._tokens, self._now = tokens, now
        self._guard = threading.Lock()
        self._codes: dict[str, float] = {}
        self._sessions: dict[str, tuple[str, str, float]] = {}
        """By digest of the cookie: digest of the token, CSRF token, end."""

    def new_code(self) -> str:
        """Return a code with which one browser logs in as the machine's owner, once and soon."""
        code = secrets.token_urlsafe(24)
        with self._guard:
            self._codes[_digest(code)] = self._now() + CODE_SECONDS
        return code

    def log_in_with_code(self, code: str) -> tuple[str, str] | None:
        """Use up a one-time code; return the cookie's value and its CSRF token, None for an invalid code."""
        with self._guard:
            until = self._codes.pop(_digest(code), 0.0)
        return self._begin(_digest(self._tokens.machine_token())) if until > self._now() else None

    def log_in(self, token: str) -> tuple[str, str] | None:
        """Return the cookie's value and its CSRF token for a token; None for an invalid one."""
        return None if self._tokens.person(token) is None else self._begin(_digest(token))

    def person(self, cookie: str) -> tuple[Person, str] | None:
        """Return who has this cookie, and its CSRF token; None where it ended or the person's token was revoked."""
        key = _digest(cookie)
        with self._guard:
            found = self._sessions.get(key)
            if found is None or found[2] <= self._now():
                self._sessions.pop(key, None)
                return None
        person = self._tokens.person_of(found[0])
        return None if person is None else (person, found[1])

    def log_out(self, cookie: str) -> None:
        """End a browser's login."""
        with self._guard:
            self._sessions.pop(_digest(cookie), None)

    def _begin(self, token: str) -> tuple[str, str]:
        cookie, csrf, now = secrets.token_urlsafe(32), secrets.token_urlsafe(32), self._now()
        with self._guard:
            self._sessions = {key: value for key, value in self._sessions.items() if value[2] > now}
            self._sessions[_digest(cookie)] = (token, csrf, now + SESSION_SECONDS)
        return cookie, csrf


class FailedLogins:
    """Failed logins of each address: after several within a minute it waits until the oldest is a minute ago.

    A token that was valid at the address before need not wait: behind a proxy, a tunnel or on one machine, people
    share an address, and one of them with a wrong token would keep out all.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now`: seconds of a clock that never goes back."""
        self._now, self._guard = now, threading.Lock()
        self._failures: dict[str, list[float]] = {}
        self._valid: dict[tuple[str, str], None] = {}
        """Addresses and digests of the tokens that were valid there, the last used ones last."""

    def wait_seconds(self, address: str, token: str = "") -> float:
        """Return how long this address has to wait before its next try, with this token; 0 if it need not."""
        now = self._now()
        with self._guard:
            if (address, _digest(token)) in self._valid:
                return 0.0
            recent = [at for at in self._failures.get(address, ()) if at + _FAILURE_SECONDS > now]
            return 0.0 if len(recent) < _FAILURES else recent[-_FAILURES] + _FAILURE_SECONDS - now

    def add_valid(self, address: str, token: str) -> None:
        """Remember that this token is valid at this address."""
        key = (address, _digest(token))
        with self._guard:
            self._valid.pop(key, None)
            self._valid[key] = None
            while len(self._valid) > _MOST_ADDRESSES:
                del self._valid[next(iter(self._valid))]

    def add(self, address: str, token: str = "") -> None:
        """Count a failed login; its token is no valid one any more."""
        with self._guard:
            self._valid.pop((address, _digest(token)), None)
            failures = [*self._failures.pop(address, []), self._now()]
            self._failures[address] = failures[-_FAILURES:]
            while len(self._failures) > _MOST_ADDRESSES:
                del self._failures[next(iter(self._failures))]


def _new_token() -> str:
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _write_private(path: Path, content: str) -> None:
    """Write a file that only this user may read, at no moment anyone else."""
    before = os.umask(0o077)
    try:
        write_text(path, content)
    finally:
        os.umask(before)


def _check_private(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ExposedFile(path, "is no regular file")
    if found.st_uid not in (os.geteuid(), 0):
        raise ExposedFile(path, "belongs to another user")
    if found.st_mode & 0o077:
        raise ExposedFile(path, f"has mode {stat.S_IMODE(found.st_mode):o} and may be read by other users")
