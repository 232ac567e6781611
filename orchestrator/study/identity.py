"""A name under which equal configurations are equal."""

from __future__ import annotations

import hashlib
import json

from trainer.config import TrialConfig


def identity(config: TrialConfig) -> str:
    """Equal for equal configurations, whichever way they were written."""
    return hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode()).hexdigest()
