"""What a trial left of every held-out pair: its log-probs, and the numbers per pair that paired comparisons need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.loss_config import DpoLoss, LossConfig
from trainer.metrics import base_name
from trainer.objectives.rewards import NoReference, Responses, rewards

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Summed log-probs and token counts of N held-out pairs, [N] each, and which rows they are.

    `start_chosen` and `start_rejected` are the start model's; None in files of versions that did not write them.
    """

    chosen: Column
    rejected: Column
    chosen_tokens: Column
    rejected_tokens: Column
    rows: NDArray[np.int64]
    """[N, 2]: source and row."""
    start_chosen: Column | None = None
    start_rejected: Column | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def gaps(self) -> Column:
        """Length-averaged log-prob of chosen minus rejected."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens

    @property
    def length_differences(self) -> Column:
        """Tokens of chosen minus tokens of rejected."""
        return self.chosen_tokens - self.rejected_tokens

    def same_pairs(self, other: HeldOut) -> bool:
        """Whether both are of the same rows with the same token counts, so that they can be compared pair by pair."""
        return (
            len(self) == len(other)
            and bool(np.array_equal(self.rows, other.rows))
            and bool(np.array_equal(self.chosen_tokens, other.chosen_tokens))
            and bool(np.array_equal(self.rejected_tokens, other.rejected_tokens))
        )

    def at_start(self) -> HeldOut | None:
        """The same pairs under the start model; None where they were not written."""
        if self.start_chosen is None or self.start_rejected is None:
            return None
        return HeldOut(
            self.start_chosen,
            self.start_rejected,
            self.chosen_tokens,
            self.rejected_tokens,
            self.rows,
            self.start_chosen,
            self.start_rejected,
        )


class DamagedPairs(Exception):
    """A file of held-out pairs that cannot be read."""


def read_held_out(path: Path) -> HeldOut | None:
    """The pairs in an `eval_pairs.safetensors`; None without rejected responses, DamagedPairs where bad."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError, ValueError) as why:
        raise DamagedPairs(f"{path} cannot be read: {why}") from why
    needed = ("chosen", "rejected", "chosen_tokens", "rejected_tokens", "source", "row")
    if any(name not in found for name in needed) or len(found["chosen"]) == 0:
        return None
    if int(found["rejected_tokens"].min()) < 1:
        return None

    def column(name: str) -> Column | None:
        return np.asarray(found[name], dtype=np.float64) if name in found else None

    chosen, rejected, chosen_tokens, rejected_tokens = (np.asarray(found[n], dtype=np.float64) for n in needed[:4])
    rows = np.stack([np.asarray(found[n], dtype=np.int64) for n in needed[4:]], axis=1)
    return HeldOut(
        chosen, rejected, chosen_tokens, rejected_tokens, rows, column("start_chosen"), column("start_rejected")
    )


def per_pair(metric: str, pairs: HeldOut, loss: LossConfig) -> Column | None:
    """The metric's value of each pair, whose mean is the metric; None for a metric that is no mean over pairs."""
    match base_name(metric):
        case "accuracies/logp":
            return (pairs.gaps > 0).astype(np.float64)
        case "margins/logp":
            return pairs.gaps
        case "logps_per_token/chosen":
            return pairs.chosen / pairs.chosen_tokens
        case "logps_per_token/rejected":
            return pairs.rejected / pairs.rejected_tokens
        case "rewards/accuracies":
            found = _rewards(pairs, loss)
            return None if found is None else (found[0] > found[1]).astype(np.float64)
        case _:
            return None


def _rewards(pairs: HeldOut, loss: LossConfig) -> tuple[Column, Column] | None:
    """The implicit rewards of chosen and rejected; None where the file lacks what they are made of."""
    if isinstance(loss, DpoLoss) and loss.ld_alpha is not None:
        return None  # made of sums over the shorter response's length, which the file has of the trained model only
    try:
        chosen = rewards(loss, Responses(pairs.chosen, pairs.chosen_tokens, pairs.start_chosen))
        return chosen, rewards(loss, Responses(pairs.rejected, pairs.rejected_tokens, pairs.start_rejected))
    except NoReference:
        return None


def spearman(a: Column, b: Column) -> float | None:
    """Rank correlation, ties sharing their mean rank; None where one of the two is constant."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Column) -> Column:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
