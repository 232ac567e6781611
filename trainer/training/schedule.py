"""Number of updates, data order and learning-rate schedule: pure functions of the step, so no state is saved."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from trainer.config.trial import TrainingConfig
from trainer.results import TrialError


def total_updates(training: TrainingConfig, pairs: int) -> int:
    """Return the number of updates over `pairs` training pairs: max_steps, else floor(epochs * pairs /
    pairs_per_update).

    Raises TrialError if that is 0, or if one update would need a pair twice.
    """
    if not pairs:
        raise TrialError("there are no training pairs; the file has no rows, or none of them can be used")
    if pairs < training.pairs_per_update:
        raise TrialError(
            f"the {pairs} training pairs are fewer than one update of pairs_per_update {training.pairs_per_update}; "
            "use more pairs or a smaller pairs_per_update"
        )
    if training.max_steps is not None:
        return training.max_steps
    # The tolerance makes 3 epochs of 10 pairs by 5 exactly 6 updates despite floating-point rounding.
    updates = math.floor(training.num_train_epochs * pairs / training.pairs_per_update + 1e-9)
    if updates < 1:
        raise TrialError(
            f"{training.num_train_epochs:g} epochs of {pairs} training pairs are less than one update of "
            f"pairs_per_update {training.pairs_per_update}; use more epochs, smaller updates, or set max_steps"
        )
    return updates


def interval(configured: int | None, total: int) -> int:
    """Return an interval in updates; by default a tenth of the run."""
    return configured if configured is not None else max(1, total // 10)


class DataOrder:
    """The stream of training pairs: one seeded permutation per epoch, concatenated.

    Update k (from 1) takes positions (k-1)*per_update to k*per_update of the stream; an update may span two epochs.
    """

    def __init__(self, pairs: int, per_update: int, seed: int) -> None:
        if pairs < 1:
            raise TrialError("there are no training pairs")
        self._pairs, self._per_update, self._seed = pairs, per_update, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def pairs_of(self, step: int) -> list[int]:
        """Return the pair indexes of update `step` (from 1), in order."""
        first = (step - 1) * self._per_update
        return [self._at(position) for position in range(first, first + self._per_update)]

    def _at(self, position: int) -> int:
        epoch, within = divmod(position, self._pairs)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self._pairs)
        return int(self._permutation[within])


def lr_lambda(training: TrainingConfig, total: int) -> Callable[[int], float]:
    """Return the learning-rate factor by update (from 1), equal to transformers' `get_scheduler`.

    Warm-up takes ceil(total * warmup_ratio) updates, rounded as in transformers' Trainer; constant has none.
    """
    warmup = math.ceil(total * training.warmup_ratio)
    kind = training.lr_scheduler_type

    def factor(step: int) -> float:
        """Return the factor of update `step`, counted from 1."""
        done = step - 1
        if kind == "constant":
            return 1.0
        if done < warmup:
            return float(done) / float(max(1, warmup))
        match kind:
            case "constant_with_warmup":
                return 1.0
            case "linear":
                return max(0.0, float(total - done) / float(max(1, total - warmup)))
            case "cosine":
                progress = float(done - warmup) / float(max(1, total - warmup))
                return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))

    return factor
