"""Results of a training run: `StepMetrics`, `StopDecision`, `RunResult`, and errors that a user can correct."""

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
    """Metrics logged after one update (at most one object per update); `eval_` metrics if it was evaluated."""

    step: int
    metrics: Mapping[str, float]
    pair_margins: str = field(default="", compare=False, repr=False)
    """At an evaluation, the margins/logp of each held-out pair, packed by `pack_floats`; else ""."""


def pack_floats(values: Iterable[float]) -> str:
    """Encode numbers as text: little-endian float32 in base64, 5.3 characters each."""
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return b64encode(packed.tobytes()).decode("ascii")


def unpack_floats(text: str) -> list[float]:
    """Decode the numbers of `pack_floats`."""
    packed = array("f", b64decode(text))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


@dataclass(frozen=True, slots=True)
class StopDecision:
    """Whether to stop a run; a stop has a reason. `diverged`: the trial has diverged, not only fallen behind."""

    stop: bool
    reason: str = ""
    diverged: bool = False

    def __post_init__(self) -> None:
        if self.stop and not self.reason:
            raise ValueError("a stop decision needs a reason")


CONTINUE = StopDecision(stop=False)


class RunStatus(StrEnum):
    """How a training run ended."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a run. `updates` is the number of updates taken, `folder` the final weights of a finished run."""

    status: RunStatus
    reason: str
    updates: int
    folder: Path | None = None


class JsonLinesReporter:
    """Writes one JSON object per line and never stops a run; used by `python -m trainer`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def report(self, metrics: StepMetrics) -> None:
        """Write the metrics."""
        self._stream.write(json.dumps({"step": metrics.step, **metrics.metrics}) + "\n")
        self._stream.flush()


def clause(message: object) -> str:
    """Return a message without its final full stop, for a sentence that the caller continues or ends."""
    return str(message).rstrip(" .\n")


class TrialError(Exception):
    """A model, a data set or a folder that cannot be used as configured; the message says what to do."""


class ModelError(TrialError):
    """The initial model cannot be loaded, or not as configured."""


def cannot_load_message(subject: str, error: Exception) -> str:
    """Return the message that `subject` cannot be loaded; if its own code was refused, it names --trust-remote-code.

    Args:
        subject: The subject of the sentence, such as "the model /path".
        error: The exception of transformers.
    """
    message = str(error).strip()
    if "trust_remote_code" in message:
        return (
            f"{subject} comes with its own Python code, which runs only with --trust-remote-code: read that code, "
            "and add the flag if you trust it"
        )
    return f"{subject} cannot be loaded: {message}"


class ResumeError(TrialError):
    """A folder belongs to another configuration, or a checkpoint cannot be used."""
