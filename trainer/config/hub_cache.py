"""What the Hugging Face cache on this machine holds, and whether the hub answers. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

_TIMEOUT = 5.0
"""Seconds to wait for the hub."""


def cached_file(name: str, filename: str, revision: str | None = None) -> Path | None:
    """A file of a hub model in the cache, at this revision (main by default); None where it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, filename, revision=revision)
    except HFValidationError:  # a path, which is no name of the hub
        return None
    return Path(found) if isinstance(found, str) else None


def model_file(name_or_path: str, filename: str, revision: str | None = None) -> Path | None:
    """A file of a model on this machine, in its folder or in the cache; None where it is not there."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return cached_file(name_or_path, filename, revision)
    return folder / filename if (folder / filename).is_file() else None


def model_type(name_or_path: str | None, revision: str | None = None) -> str | None:
    """Return `model_type` of a model's config.json, for a multimodal model that of its text; None if it is not here."""
    file = None if name_or_path is None else model_file(name_or_path, "config.json", revision)
    if file is None:
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    return config.get("text_config", config).get("model_type")


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids asking the hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def hub_reachable() -> bool:
    """Return whether the hub answers within seconds, whatever it answers."""
    if is_offline():
        return False
    import httpx2
    from huggingface_hub import constants

    try:
        httpx2.head(constants.ENDPOINT, timeout=_TIMEOUT)
    except (httpx2.HTTPError, httpx2.InvalidURL, ImportError):  # ImportError: a SOCKS proxy without `socksio`
        return False
    return True
