"""What was settled when the sweep began and holds whoever resumes it, on whatever machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from orchestrator.spec.pruners import compares
from orchestrator.spec.samplers import Asap, Learner
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.errors import TooManySlots
from orchestrator.study.knowing import Known
from orchestrator.study.state import TrialState

SETTLED = "settled"
"""Where it stands among the study's attributes."""
LAGS = 2
"""Times the slots: how many trials later a result may be used, where the file does not say."""


@dataclass(frozen=True, slots=True)
class Settled:
    """`lag`: trial n knows trials up to n - lag, None in `order: asap`; `train_pairs`: None where nobody counted."""

    lag: int | None = LAGS
    train_pairs: int | None = None
    earlier: tuple[Known, ...] = ()

    @classmethod
    def of(cls, spec: SweepSpec, slots: int, train_pairs: int | None, earlier: Sequence[Known]) -> Self:
        """For a sweep that begins with so many trials at a time."""
        lag = None if isinstance(spec.order, Asap) else spec.order.lag or LAGS * slots
        made = cls(lag, train_pairs, tuple(earlier))
        made.admit(spec, slots)
        return made

    def admit(self, spec: SweepSpec, slots: int) -> None:
        """Refuse more trials at a time than the rule leaves room for."""
        matters = isinstance(spec.sampler, Learner) or compares(spec.pruner)
        if matters and self.lag is not None and slots > self.lag:
            raise TooManySlots(slots, self.lag)

    def as_json(self) -> dict[str, Any]:
        """For the database."""
        earlier = [
            {
                "number": t.number,
                "params": dict(t.params),
                "state": t.state.value,
                "values": None if t.values is None else [str(v) for v in t.values],
                "step": max(t.course, default=0),
                "diverged": t.diverged,
            }
            for t in self.earlier
        ]
        return {"lag": self.lag, "train_pairs": self.train_pairs, "earlier": earlier}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """From the database."""
        earlier = [
            Known(
                number=t["number"],
                params=t["params"],
                state=TrialState(t["state"]),
                values=None if t["values"] is None else tuple(float(v) for v in t["values"]),
                course={} if t["values"] is None else {t["step"]: float(t["values"][0])},
                diverged=t["diverged"],
            )
            for t in kept["earlier"]
        ]
        return cls(kept["lag"], kept["train_pairs"], tuple(earlier))
