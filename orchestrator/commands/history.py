"""What happened to a sweep, in order: every event with its time and reason, and every change of its spec."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.commands.hands import open_study
from orchestrator.driving.crash import crashed_at, last_crash
from orchestrator.folders import existing
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.records import STOPPING
from orchestrator.study.specs import differences


def history(name: str, root: Path) -> dict[str, Any]:
    """`events` (seq, at, trial, kind, text), `specs` (version, at, hash, changes) and `given` trials."""
    folder = existing(root, name)
    if not StudyReader.exists(folder) and (why := last_crash(folder)):
        event = {"seq": 1, "at": crashed_at(folder), "trial": None, "kind": STOPPING, "text": why}
        return {"name": name, "events": [event], "specs": [], "given": []}
    with open_study(folder) as study:
        versions = study.spec_history()
        specs = [SweepSpec.model_validate_json(v.text) for v in versions]
        changes = [[], *([asdict(c) for c in differences(old, new)] for old, new in pairwise(specs))]
        return {
            "name": name,
            "events": [asdict(event) for event in study.events()],
            "specs": [
                {"version": v.version, "at": v.at, "hash": v.hash, "changes": changed}
                for v, changed in zip(versions, changes, strict=True)
            ],
            "given": [asdict(given) for given in study.given()],
        }
