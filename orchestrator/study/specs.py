"""Two specs of one sweep: whether they are the same, and what may change while it goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.errors import SpecChanged
from trainer.config import flatten

MAY_CHANGE = ("budget", "resources", "tracking", "notify", "judge", "keep_models", "description", "mirror")
"""Parts of a spec on which no trial's result depends."""


@dataclass(frozen=True, slots=True)
class Change:
    """A leaf of the spec that differs."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.old)} -> {_shown(self.new)}"


def digest(spec: SweepSpec) -> str:
    """The sweep's identity: equal for equal specs, however they were written."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def differences(old: SweepSpec, new: SweepSpec) -> list[Change]:
    """Every leaf that differs, by path."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    paths = sorted(p for p in before.keys() | after.keys() if before.get(p, ...) != after.get(p, ...))
    return [Change(path, before.get(path), after.get(path)) for path in paths]


def changes(old: SweepSpec, new: SweepSpec) -> list[Change]:
    """The leaves that differ; refuses those that would make the trials incomparable."""
    found = differences(old, new)
    fixed = [change for change in found if change.path.split(".")[0] not in MAY_CHANGE]
    if fixed:
        raise SpecChanged(new.name, [c.path for c in fixed], [str(c) for c in fixed], MAY_CHANGE)
    return found


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
