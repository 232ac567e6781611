"""Loss terms to metrics: sums and weights that add up over micro-batches and processes, then one division."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.objectives.pair_logps import LossTerms, PairLogps

Totals = dict[str, tuple[float, float]]
"""Metric name -> (numerator, denominator). Adding both over parts and dividing once gives the metric of the whole."""


_WITHOUT_REJECTED = ("loss", "logps/chosen", "nll_loss", "logps_per_token/chosen", "lengths/chosen")


def metric_totals(terms: LossTerms) -> Totals:
    """Totals of every metric of trainer/metrics.py that follows from log-probs, at these pairs.

    `loss` is complete once the parts of one update (or of a whole evaluation set) are added; `nll_loss` is per
    chosen token, all others are means over pairs. Accuracies count strictly higher only, as TRL's do. Where rejected
    responses were not computed (SFT training) the metrics that need them are left out.
    """
    sums = {
        "loss": terms.loss.detach().double(),
        "rewards/chosen": terms.chosen_rewards.sum(),
        "rewards/rejected": terms.rejected_rewards.sum(),
        "rewards/margins": (terms.chosen_rewards - terms.rejected_rewards).sum(),
        "rewards/accuracies": (terms.chosen_rewards > terms.rejected_rewards).sum(),
        "logps/chosen": terms.chosen_logps.sum(),
        "logps/rejected": terms.rejected_logps.sum(),
        **_ruler(terms.logps),
        **{name: values.sum() for name, values in terms.extra.items()},
    }
    totals = _totals(sums, len(terms.logps))
    totals["loss"] = (totals["loss"][0], len(terms.logps) / terms.norm.pairs)
    if totals["lengths/rejected"][0] == 0:
        return {name: totals[name] for name in _WITHOUT_REJECTED}
    return totals


def ruler_totals(logps: PairLogps) -> Totals:
    """Those of `metric_totals` that no objective has a say in: margins/logp, lengths/chosen, nll_loss and so on."""
    return _totals(_ruler(logps), len(logps))


def _ruler(logps: PairLogps) -> dict[str, Tensor]:
    chosen, rejected = logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens
    return {
        "nll_loss": -logps.chosen.sum(),
        "margins/logp": (chosen - rejected).sum(),
        "accuracies/logp": (chosen > rejected).sum(),
        "logps_per_token/chosen": chosen.sum(),
        "logps_per_token/rejected": rejected.sum(),
        "lengths/chosen": logps.chosen_tokens.sum(),
        "lengths/rejected": logps.rejected_tokens.sum(),
    }


def _totals(sums: Mapping[str, Tensor], pairs: int) -> Totals:
    values: list[float] = torch.stack([value.double() for value in sums.values()]).tolist()
    totals: Totals = {name: (value, float(pairs)) for name, value in zip(sums, values, strict=True)}
    totals["nll_loss"] = (totals["nll_loss"][0], totals["lengths/chosen"][0])
    return totals


def add_totals(parts: Iterable[Totals]) -> Totals:
    """The totals of several parts together. Parts with other metrics raise KeyError."""
    whole: Totals = {}
    for part in parts:
        whole = {
            name: (number + part[name][0], weight + part[name][1]) for name, (number, weight) in whole.items()
        } or dict(part)
    return whole


def means(totals: Totals) -> dict[str, float]:
    """Numerators over denominators; NaN stays NaN."""
    return {name: number / weight for name, (number, weight) in totals.items()}
