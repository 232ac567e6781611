"""Masks secrets in text that is shown, stored or sent."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "***"
_SECRET_NAME = re.compile(r"TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIAL|WEBHOOK", re.IGNORECASE)
_MAYBE_SECRET_NAME = re.compile(r"(^|_)(PAT|PWD|PASS|AUTH|PRIVATE|CREDS?|DSN)(_|$)|PASSPHRASE|COOKIE", re.IGNORECASE)
"""Names whose values are not masked, as they are ordinary words too often, and not written to a sweep's files."""
_MIN_SECRET_LENGTH = 8
"""Shorter values are words like `true` or `0`; masking them would garble ordinary text."""
_URI_CREDENTIALS = re.compile(r'(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s"]+@')


def secret_values(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the values of environment variables with names of secrets (TOKEN, KEY, PASSWORD, ...), longest first."""
    found = os.environ if environment is None else environment
    values = {v for name, v in found.items() if _SECRET_NAME.search(name) and len(v) >= _MIN_SECRET_LENGTH}
    return sorted((v for v in values if not _is_existing_path(v)), key=len, reverse=True)


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable of this name may hold a secret. PWD is the working directory."""
    return _SECRET_NAME.search(name) is not None or (
        name not in ("PWD", "OLDPWD") and _MAYBE_SECRET_NAME.search(name) is not None
    )


def _is_existing_path(value: str) -> bool:
    """Return whether the value is an existing path (SSH_KEY=~/.ssh/id), which is not masked.

    A password may also look like a path, hence the existence check.
    """
    if not value.startswith(("/", ".", "~")):
        return False
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, or of an unknown user
        return False


def redact(text: str, secrets: list[str] | None = None) -> str:
    """Return the text with secrets of the environment and credentials in URIs replaced by `***`."""
    for secret in secret_values() if secrets is None else secrets:
        text = text.replace(secret, MASK)
    return _URI_CREDENTIALS.sub(rf"\g<scheme>{MASK}@", text)


def without_credentials(uri: str) -> str:
    """Return the URI without user and password."""
    return _URI_CREDENTIALS.sub(r"\g<scheme>", uri)


def redact_all(value: Any, secrets: list[str]) -> Any:
    """Apply `redact` to every string inside a JSON value."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, Mapping):
        items: Mapping[Any, Any] = value
        return {k: redact_all(v, secrets) for k, v in items.items()}
    if isinstance(value, (list, tuple)):
        rows: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
        return [redact_all(v, secrets) for v in rows]
    return value
