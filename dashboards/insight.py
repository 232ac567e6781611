"""A sweep's frame with what is concluded from it, computed once for every panel."""

from __future__ import annotations

from dataclasses import dataclass

from dashboards.certainty import Certainty, certainty
from dashboards.diagnosis.diagnose import diagnose
from dashboards.diagnosis.finding import Finding
from dashboards.sweep_frame import SweepFrame
from orchestrator.study.importance import importance


@dataclass(frozen=True, slots=True, eq=False)
class Insight:
    """What panels draw from. `importances`: searched leaf -> share of the goal's variance, biggest first."""

    frame: SweepFrame
    sure: Certainty | None
    findings: tuple[Finding, ...]
    importances: dict[str, float]


def insight(frame: SweepFrame) -> Insight:
    """Everything that is concluded from one sweep."""
    sure = certainty(frame)
    found = importance(frame.space, [case.record for case in frame.trials], frame.goal)
    return Insight(frame, sure, tuple(diagnose(frame, sure)), found)
