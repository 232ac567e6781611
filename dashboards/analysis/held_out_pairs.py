"""Log-probs of every held-out pair of a trial, and metric values per pair for paired comparisons.

A row with one response and a label (KTO) has 0 tokens on the other side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trainer.config.loss_config import DpoLoss, LossConfig
from trainer.metrics import base_name
from trainer.objectives.rewards import NoReference, Responses, rewards

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutPairs:
    """Summed log-probs (nats) and token counts of N held-out pairs, [N] each, with source and row of each pair.

    `initial_chosen` and `initial_rejected` are the initial model's; None in files of earlier versions.
    """

    chosen: Column
    rejected: Column
    chosen_tokens: Column
    rejected_tokens: Column
    rows: NDArray[np.int64]
    """[N, 2]: source and row."""
    initial_chosen: Column | None = None
    initial_rejected: Column | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def paired(self) -> bool:
        """Whether every row has both responses."""
        return bool((self.chosen_tokens > 0).all() and (self.rejected_tokens > 0).all())

    @property
    def margins(self) -> Column:
        """[N] log-prob per token of chosen minus rejected, in nats; of pairs only."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens

    @property
    def length_differences(self) -> Column:
        """[N] tokens of chosen minus tokens of rejected."""
        return self.chosen_tokens - self.rejected_tokens

    def same_pairs(self, other: HeldOutPairs) -> bool:
        """Return whether both have the same rows and token counts, so that they can be compared pair by pair."""
        return (
            len(self) == len(other)
            and bool(np.array_equal(self.rows, other.rows))
            and bool(np.array_equal(self.chosen_tokens, other.chosen_tokens))
            and bool(np.array_equal(self.rejected_tokens, other.rejected_tokens))
        )

    def initial(self) -> HeldOutPairs | None:
        """Return the same pairs with the initial model's log-probs; None where the file has none."""
        if self.initial_chosen is None or self.initial_rejected is None:
            return None
        return HeldOutPairs(
            self.initial_chosen,
            self.initial_rejected,
            self.chosen_tokens,
            self.rejected_tokens,
            self.rows,
            self.initial_chosen,
            self.initial_rejected,
        )


class DamagedPairs(Exception):
    """A file of held-out pairs that cannot be read."""


def read_held_out(path: Path) -> HeldOutPairs | None:
    """Read `eval_pairs.safetensors`.

    Returns:
        None for data without chosen or without rejected responses.

    Raises:
        DamagedPairs: the file is unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedPairs(f"{path} cannot be read: {error}") from error
    required = ("chosen", "rejected", "chosen_tokens", "rejected_tokens", "source", "row")
    if any(name not in found for name in required) or len(found["chosen"]) == 0:
        return None
    if int(found["rejected_tokens"].max()) < 1 or int(found["chosen_tokens"].max()) < 1:
        return None

    def column(name: str) -> Column | None:
        return np.asarray(found[name], dtype=np.float64) if name in found else None

    chosen, rejected, chosen_tokens, rejected_tokens = (np.asarray(found[n], dtype=np.float64) for n in required[:4])
    rows = np.stack([np.asarray(found[n], dtype=np.int64) for n in required[4:]], axis=1)
    return HeldOutPairs(
        chosen, rejected, chosen_tokens, rejected_tokens, rows, column("start_chosen"), column("start_rejected")
    )


def metric_by_pair(metric: str, pairs: HeldOutPairs, loss: LossConfig) -> Column | None:
    """Return the metric of each pair, [N]; its mean is the metric. None for a metric that is no mean over pairs.

    Of rows with one response: the metric, a mean over the rows of one label or the difference of two such means, plus
    each row's influence on it, so that the mean over rows has the variance of that ratio (the delta method).
    """
    if not pairs.paired:
        return _influences(base_name(metric), pairs, loss)
    match base_name(metric):
        case "accuracies/logp":
            return (pairs.margins > 0).astype(np.float64)
        case "margins/logp":
            return pairs.margins
        case "logps_per_token/chosen":
            return pairs.chosen / pairs.chosen_tokens
        case "logps_per_token/rejected":
            return pairs.rejected / pairs.rejected_tokens
        case "rewards/accuracies":
            found = _rewards(pairs, loss)
            return None if found is None else (found[0] > found[1]).astype(np.float64)
        case _:
            return None


def _influences(name: str, pairs: HeldOutPairs, loss: LossConfig) -> Column | None:
    columns = [(pairs.chosen, pairs.chosen_tokens), (pairs.rejected, pairs.rejected_tokens)]
    family, _, side = name.rpartition("/")
    if family == "rewards" and side in ("margins", "chosen", "rejected"):
        found = _rewards(pairs, loss)
        if found is None:
            return None
        values = found
    elif name in ("margins/logp", "logps_per_token/chosen", "logps_per_token/rejected"):
        values = [sums / np.maximum(tokens, 1) for sums, tokens in columns]
    else:
        return None
    chosen, rejected = (_influence(v, tokens > 0) for v, (_, tokens) in zip(values, columns, strict=True))
    return chosen if side == "chosen" else rejected if side == "rejected" else chosen - rejected


def _influence(values: Column, present: NDArray[np.bool_]) -> Column:
    """Return [N], whose mean is that of the present values, and whose variance over N is that of this ratio."""
    mean = float(values[present].mean())
    return mean + np.where(present, (values - mean) * (len(values) / int(present.sum())), 0.0)


def _rewards(pairs: HeldOutPairs, loss: LossConfig) -> tuple[Column, Column] | None:
    """Return the implicit rewards of chosen and rejected, [N] each; None without the required log-probs."""
    if isinstance(loss, DpoLoss) and loss.ld_alpha is not None:
        return None  # needs the initial model's log-probs cut to the shorter response, which the file lacks
    try:
        chosen = rewards(loss, Responses(pairs.chosen, pairs.chosen_tokens, pairs.initial_chosen))
        return chosen, rewards(loss, Responses(pairs.rejected, pairs.rejected_tokens, pairs.initial_rejected))
    except NoReference:
        return None


def spearman(a: Column, b: Column) -> float | None:
    """Return Spearman's rank correlation, ties at their mean rank; None for fewer than 3 pairs or a constant column."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    from scipy.stats import spearmanr

    return float(cast(Any, spearmanr(a, b)).statistic)
