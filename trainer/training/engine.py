"""What every engine does for the loop: one update after the other, from the same pairs in the same order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import PairSet
from trainer.distributed.deepspeed_zero3 import Piece
from trainer.distributed.processes import Patience, World
from trainer.forward.pair_model import PairModel
from trainer.models.policy_model import LiveModel
from trainer.objectives.pair_logps import PairLogps, Totals
from trainer.results import TrialError
from trainer.training.schedule import Order, rate_factor, total_updates


@dataclass(frozen=True, slots=True)
class Material:
    """What a run trains with, already loaded."""

    live: LiveModel
    model: PairModel
    train: PairSet
    reference: PairLogps | None
    """Log-probs of `train` under the start model, for objectives that compare with it."""
    world: World
    patience: Patience


class Diverged(Exception):
    """A loss, a gradient or a held-out metric is not finite; the message has the numbers."""


class Course:
    """The plan of one run's updates: how many, which pairs, at which rate, with which random numbers."""

    def __init__(self, config: TrialConfig, material: Material) -> None:
        """TrialError where the data cannot fill an update, or an update the processes."""
        training, pairs = config.training, len(material.train)
        self.training = training
        self.total = total_updates(training, pairs)
        self._rank = material.world.rank
        if training.pairs_per_update < material.world.size:
            raise TrialError(
                f"pairs_per_update {training.pairs_per_update} cannot be shared among {material.world.size} processes"
            )
        self.order = Order(pairs, training.pairs_per_update, training.seed)
        self.factor = rate_factor(training, self.total)

    def draw(self, step: int) -> None:
        """Put the random numbers where update `step` (from 1) begins in this process, however the run came there."""
        seed = np.random.SeedSequence([self.training.seed, step, self._rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def check(self, step: int, *, loss: float, norm: float = 0.0) -> None:
        """Diverged where the loss or the gradient's norm of update `step` is not finite."""
        if not math.isfinite(loss):
            raise Diverged(self._told(step, f"the loss is {loss}"))
        if not math.isfinite(norm):
            raise Diverged(self._told(step, f"the gradient's norm is {norm} at a loss of {loss:.6g}"))

    def _told(self, step: int, what: str) -> str:
        rate = self.training.learning_rate * self.factor(step)
        advice = f"its step was not taken; lower training.learning_rate, {rate:.3g} at this update"
        return f"update {step} of {self.total}: {what}; {advice}"


class Engine(Protocol):
    """Trains a model by updates. Between two calls the model may be looked at, and its weights read."""

    course: Course

    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters being trained, by name; of sharded ones this process has its slices."""
        ...

    def update(self, step: int) -> Totals:
        """Take update `step` (from 1, each one after the one before) and tell its metrics.

        Diverged and Interrupted are raised before the step is taken: the weights are still those of the last update.
        """
        ...

    def state(self) -> Mapping[str, torch.Tensor | Piece]:
        """The optimiser's moments by name, sharded as the parameters are; the live ones, not copies."""
        ...

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned, as whole tensors; the weights are there already."""
        ...

    def close(self) -> None:
        """Leave the model as a saved one should be; no update follows."""
        ...
