"""Two specs of one sweep: whether they are the same, and what may change while it goes on."""

from __future__ import annotations

import hashlib
import json

from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.errors import SpecChanged
from trainer.config import flatten

MAY_CHANGE = frozenset({"description", "budget", "resources", "tracking", "keep_models"})
"""Parts of a spec on which no trial's result depends."""


def digest(spec: SweepSpec) -> str:
    """The sweep's identity: equal for equal specs, however they were written."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def changes(old: SweepSpec, new: SweepSpec) -> list[str]:
    """Dotted paths of the leaves that differ; refuses those that would make the trials incomparable."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    differing = sorted(p for p in before.keys() | after.keys() if before.get(p, ...) != after.get(p, ...))
    fixed = [path for path in differing if path.split(".")[0] not in MAY_CHANGE]
    if fixed:
        raise SpecChanged(fixed)
    return differing
