"""The `Engine` protocol, `UpdatePlan` and `TrainingInputs`: one update after the other, same pairs, same order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import PairDataset
from trainer.distributed.processes import CancelToken, ProcessGroup
from trainer.forward.pair_model import PairModel
from trainer.models.policy_model import PolicyModel
from trainer.objectives.pair_logps import MetricSums, PairLogps
from trainer.results import TrialError
from trainer.training.schedule import DataOrder, lr_lambda, total_updates


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """What a run trains with, already loaded."""

    policy: PolicyModel
    pair_model: PairModel
    train: PairDataset
    reference: PairLogps | None
    """Log-probs of `train` under the initial model, for objectives that compare with it."""
    process_group: ProcessGroup
    cancel_token: CancelToken


class Diverged(Exception):
    """A loss, a gradient or a held-out metric is not finite; the message has the numbers."""


class UpdatePlan:
    """The plan of one run's updates: how many, which pairs, at which rate, with which random numbers."""

    def __init__(self, config: TrialConfig, inputs: TrainingInputs) -> None:
        """TrialError where the data cannot fill an update, or an update the processes."""
        training, pairs = config.training, len(inputs.train)
        self.training = training
        self.total_updates = total_updates(training, pairs)
        self._rank = inputs.process_group.rank
        if training.pairs_per_update < inputs.process_group.size:
            raise TrialError(
                f"pairs_per_update {training.pairs_per_update} cannot be shared among "
                f"{inputs.process_group.size} processes"
            )
        self.order = DataOrder(pairs, training.pairs_per_update, training.seed)
        self.lr_factor = lr_lambda(training, self.total_updates)

    def seed_update(self, step: int) -> None:
        """Put the random numbers where update `step` (from 1) begins in this process, however the run came there."""
        seed = np.random.SeedSequence([self.training.seed, step, self._rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def check_finite(self, step: int, *, loss: float, norm: float = 0.0) -> None:
        """Diverged where the loss or the gradient's norm of update `step` is not finite."""
        if not math.isfinite(loss):
            raise Diverged(self._divergence_message(step, f"the loss is {loss}"))
        if not math.isfinite(norm):
            raise Diverged(self._divergence_message(step, f"the gradient's norm is {norm} at a loss of {loss:.6g}"))

    def _divergence_message(self, step: int, what: str) -> str:
        rate = self.training.learning_rate * self.lr_factor(step)
        advice = f"its step was not taken; lower training.learning_rate, {rate:.3g} at this update"
        return f"update {step} of {self.total_updates}: {what}; {advice}"


class Engine(Protocol):
    """Trains a model by updates. Between two calls the model may be looked at, and its weights read."""

    plan: UpdatePlan

    def trainable_parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters being trained, by name; of sharded ones this process has its slices."""
        ...

    def step(self, number: int) -> MetricSums:
        """Take update `number` (from 1, each one after the one before) and tell its metrics.

        Diverged and Interrupted are raised before the step is taken: the weights are still those of the last update.
        """
        ...

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """The optimizer's moments by name, sharded as the parameters are; the live ones, not copies."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned, as whole tensors; the weights are there already."""
        ...

    def close(self) -> None:
        """Leave the model as a saved one should be; no update follows."""
        ...
