"""`orchestrate doctor`: checks of the machine and the network, each with a fix. Changes nothing, prints no secret."""

from __future__ import annotations

from pathlib import Path

from orchestrator.commands.doctor import gpu_checks, machine_checks, network_checks
from orchestrator.commands.doctor.machine_checks import Check, CheckLevel, is_healthy
from orchestrator.spec.sweep_spec import SweepSpec

__all__ = ["Check", "CheckLevel", "is_healthy", "run_checks"]


def run_checks(root: Path, spec: SweepSpec | None = None) -> list[Check]:
    """Return all checks for the runs folder `root`; with a sweep, also those of its models, data and servers."""
    return [
        *machine_checks.packages(),
        *gpu_checks.gpu_checks(spec),
        *machine_checks.machine_checks(root, spec),
        *machine_checks.ray_checks(),
        *network_checks.network_checks(root, spec),
    ]
