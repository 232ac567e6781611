"""Results of a training run: `StepMetrics`, `StopDecision`, `RunResult`, and the errors that a user can correct."""

from __future__ import annotations

import json
import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics at one update. A step has one point: training metrics, and `eval_` ones when it was evaluated there."""

    step: int
    metrics: Mapping[str, float]
    pairs: str = field(default="", compare=False, repr=False)
    """At an evaluation, the gap of length-averaged log-probs of each held-out pair, as `pack_floats` writes it."""


def pack_floats(values: Iterable[float]) -> str:
    """Numbers as text: little-endian float32 in base64, five bytes and a third each."""
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return b64encode(packed.tobytes()).decode("ascii")


def unpack_floats(text: str) -> list[float]:
    """The numbers that `pack_floats` wrote."""
    packed = array("f", b64decode(text))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


@dataclass(frozen=True, slots=True)
class StopDecision:
    """Go on, or stop; a stop always has its reason in words. `diverged`: the trial is beyond saving, not only worse."""

    stop: bool
    reason: str = ""
    diverged: bool = False

    def __post_init__(self) -> None:
        if self.stop and not self.reason:
            raise ValueError("a verdict to stop needs a reason")


CONTINUE = StopDecision(stop=False)


class RunStatus(StrEnum):
    """How a training run ended, as the trainer itself sees it."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended. `steps` is the last update done, `folder` holds the final weights when it finished."""

    status: RunStatus
    reason: str
    steps: int
    folder: Path | None = None


class JsonLinesReporter:
    """One JSON object per point; what `python -m trainer` uses when nobody else listens."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def report(self, metrics: StepMetrics) -> None:
        """Write the point."""
        self._stream.write(json.dumps({"step": metrics.step, **metrics.metrics}) + "\n")
        self._stream.flush()


class TrialError(Exception):
    """A model, a data set or a folder that cannot be used as asked; the message says what and what to do."""


class ModelError(TrialError):
    """The initial model cannot be loaded, or not in the way the configuration asks."""


def cannot_load(what: str, error: Exception) -> str:
    """Return the sentence about `what` that did not load; where its own code was refused, it names the flag.

    Args:
        what: The subject of the sentence: "the model /path".
        error: What transformers raised.
    """
    message = str(error).strip()
    if "trust_remote_code" in message:
        return (
            f"{what} comes with Python code of its own, which is run only with --trust-remote-code: read that code, "
            "and add the flag if you trust it"
        )
    return f"{what} cannot be loaded: {message}"


class ResumeError(TrialError):
    """A folder holds the work of another configuration."""
