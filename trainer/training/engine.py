"""The `Engine` protocol, `UpdatePlan` and `TrainingInputs`: every engine takes the same updates in the same order."""

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
    """Loaded models and data of a run."""

    policy: PolicyModel
    pair_model: PairModel
    train: PairDataset
    reference: PairLogps | None
    """Log-probs of `train` under the initial model, for objectives with a reference that does not change."""
    process_group: ProcessGroup
    cancel_token: CancelToken
    score_gap: torch.Tensor | None = None
    """[len(train)], float64, on the CPU: gaps of the pairs' scores, for objectives that read them."""


class Diverged(Exception):
    """A loss, a gradient or a held-out metric is not finite; the message has the values."""


class UpdatePlan:
    """The updates of one run: their number, pairs, learning rates and random seeds."""

    def __init__(self, config: TrialConfig, inputs: TrainingInputs) -> None:
        """Raises TrialError if one update needs more pairs than there are, or has fewer pairs than processes."""
        training, pairs = config.training, len(inputs.train)
        self.training = training
        self.total_updates = total_updates(training, pairs)
        self._rank = inputs.process_group.rank
        if training.pairs_per_update < inputs.process_group.size:
            raise TrialError(
                f"training.pairs_per_update: {training.pairs_per_update} is less than the number of processes; "
                f"set it to at least {inputs.process_group.size}"
            )
        self.order = DataOrder(pairs, training.pairs_per_update, training.seed)
        self.lr_factor = lr_lambda(training, self.total_updates)

    def seed_update(self, step: int) -> None:
        """Seed torch for update `step` (from 1) in this process, so that a resumed run draws the same numbers."""
        seed = np.random.SeedSequence([self.training.seed, step, self._rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def check_finite(self, step: int, *, loss: float, grad_norm: float = 0.0) -> None:
        """Raise Diverged if the loss or the gradient norm of update `step` is not finite."""
        if not math.isfinite(loss):
            raise Diverged(self._divergence_message(step, f"the loss is {loss}"))
        if not math.isfinite(grad_norm):
            raise Diverged(self._divergence_message(step, f"the gradient norm is {grad_norm} at loss {loss:.6g}"))

    def _divergence_message(self, step: int, problem: str) -> str:
        rate = self.training.learning_rate * self.lr_factor(step)
        advice = f"the step was not taken; lower training.learning_rate, {rate:.3g} at this update"
        return f"update {step} of {self.total_updates}: {problem}; {advice}"


class Engine(Protocol):
    """Trains a model update by update. Between updates the model may be evaluated and its weights read."""

    plan: UpdatePlan

    def trainable_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters by name; of sharded ones this process's shards."""
        ...

    def step(self, number: int) -> MetricSums:
        """Take update `number` (from 1, in order) and return its metrics.

        Raises Diverged and Interrupted before the optimizer step: the weights are then those of the previous update.
        """
        ...

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return the optimizer's moments by name, sharded like the parameters; references, not copies."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load optimizer state given as full tensors. Call after the weights are loaded."""
        ...

    def close(self) -> None:
        """End training: remove everything that the engine added to the model."""
        ...
