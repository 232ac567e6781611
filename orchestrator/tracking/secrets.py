"""Keeping secrets out of what is shown to others."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_SECRET_NAME = re.compile(r"TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIAL|WEBHOOK", re.IGNORECASE)
_SHORTEST = 8
"""Shorter values are no secrets but words like `true` or `0`; masking them would garble everything."""
_URI_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]+@")
_PATHS = re.compile(r"^[~./]")


def secret_values(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values of environment variables whose names say that they are secret, longest first."""
    found = os.environ if environment is None else environment
    values = {v for name, v in found.items() if _SECRET_NAME.search(name) and len(v) >= _SHORTEST}
    # A key's file name is no key (SSH_KEY=~/.ssh/id): it may well be part of an ordinary path.
    return sorted((v for v in values if not _PATHS.match(v)), key=len, reverse=True)


def redact(text: str, secrets: list[str] | None = None) -> str:
    """The text without secrets of the environment and without credentials in URIs."""
    for secret in secret_values() if secrets is None else secrets:
        text = text.replace(secret, MASK)
    return _URI_CREDENTIALS.sub(rf"\g<scheme>{MASK}@", text)


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
