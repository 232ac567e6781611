"""What this machine offers and what is missing, each with its fix. Looks only; changes nothing, prints no secret."""

from __future__ import annotations

from pathlib import Path

from orchestrator.commands.doctor import gpus, machine, rays, reach
from orchestrator.commands.doctor.check import Check, Level, healthy
from orchestrator.spec.sweep import SweepSpec

__all__ = ["Check", "Level", "examine", "healthy"]


def examine(root: Path, spec: SweepSpec | None = None) -> list[Check]:
    """Every check, for the runs folder `root`; with a sweep, also what it needs from elsewhere."""
    return [
        *machine.packages(),
        *gpus.checks(spec),
        *machine.checks(root, spec),
        *rays.checks(),
        *reach.checks(root, spec),
    ]
