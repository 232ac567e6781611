from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import execution  # noqa: F401  what Ray reads when it is imported


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Ray's sockets need a short path."""
    path = Path(tempfile.mkdtemp(prefix="prefsweep-test-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def token(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token of a cluster that somebody else started."""
    file = short_path / "token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return file
