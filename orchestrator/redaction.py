"""Secrets masked in text that is shown or stored elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "***"
_SECRET_NAME = re.compile(r"TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIAL|WEBHOOK", re.IGNORECASE)
_MIN_SECRET_LENGTH = 8
"""Shorter values are no secrets but words like `true` or `0`; masking them would garble everything."""
_URI_CREDENTIALS = re.compile(r'(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s"]+@')


def secret_values(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values of environment variables whose names say that they are secret, longest first."""
    found = os.environ if environment is None else environment
    values = {v for name, v in found.items() if _SECRET_NAME.search(name) and len(v) >= _MIN_SECRET_LENGTH}
    return sorted((v for v in values if not _is_place(v)), key=len, reverse=True)


def _is_place(value: str) -> bool:
    """Whether this is a file's or a folder's name, as in SSH_KEY=~/.ssh/id: no secret, and part of ordinary paths.

    Passwords may begin like a path too: only what is there is one.
    """
    if not value.startswith(("/", ".", "~")):
        return False
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, or of a user who is not there
        return False


def redact(text: str, secrets: list[str] | None = None) -> str:
    """The text without secrets of the environment and without credentials in URIs."""
    for secret in secret_values() if secrets is None else secrets:
        text = text.replace(secret, MASK)
    return _URI_CREDENTIALS.sub(rf"\g<scheme>{MASK}@", text)


def without_credentials(uri: str) -> str:
    """The URI without the user and password that may be in it."""
    return _URI_CREDENTIALS.sub(r"\g<scheme>", uri)


def redact_all(value: Any, secrets: list[str]) -> Any:
    """`redact` for every text inside a JSON value."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, Mapping):
        items: Mapping[Any, Any] = value
        return {k: redact_all(v, secrets) for k, v in items.items()}
    if isinstance(value, (list, tuple)):
        rows: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
        return [redact_all(v, secrets) for v in rows]
    return value
