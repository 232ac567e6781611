"""Packages that only some trials need: missing, a sweep is refused before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from orchestrator.errors import Finding, SpecError
from orchestrator.spec.corners import placed
from orchestrator.spec.sweep import SweepSpec
from trainer.config import DEEPSPEED_INSTALL, TrainingConfig


def check_extras(spec: SweepSpec) -> None:
    """SpecError where trials are divided by DeepSpeed and it is not installed here."""
    if wants_deepspeed(spec) and find_spec("deepspeed") is None:
        problem = "zero3 needs deepspeed, which is not installed here"
        raise SpecError([Finding(spec.name, "training.distributed", problem, DEEPSPEED_INSTALL)])


def wants_deepspeed(spec: SweepSpec) -> bool:
    """Whether some trial of several processes, or the SFT stage before them, has `training.distributed: zero3`."""
    return spec.resources.processes > 1 and any(t.distributed == "zero3" for t in _trainings(spec))


def _trainings(spec: SweepSpec) -> Iterator[TrainingConfig]:
    yield from (config.training for config in placed(spec.search, spec.base))
    if spec.sft is not None:
        yield spec.sft.training
