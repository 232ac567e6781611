"""The objectives: pure functions from per-pair log-probs to loss terms. Token means are over a whole update.

Symbols: lp summed log-prob, n its tokens, alp = lp / n; w chosen, l rejected; ls = log sigmoid.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.loss_config import DpoLoss, LossConfig, SftLoss, SimpoLoss
from trainer.pair_logps import LossTerms, Needs, Normaliser, PairLogps


def needs(loss: LossConfig) -> Needs:
    """Which statistics, beyond sums and counts, this objective reads."""
    match loss:
        case SimpoLoss():
            return Needs()
        case SftLoss():
            return Needs(rejected=False)
        case DpoLoss():
            return Needs(reference=True)
        case _:
            assert_never(loss)


def pair_loss(loss: LossConfig, logps: PairLogps, norm: Normaliser) -> LossTerms:
    """The objective's terms at these pairs, its share of the update that `norm` describes.

    Raises ValueError where the objective needs a reference, or another statistic, that `logps` does not hold.
    """
    match loss:
        case SimpoLoss():
            return simpo(loss, logps, norm)
        case DpoLoss():
            return dpo(loss, logps, norm)
        case SftLoss():
            return sft(logps, norm)
        case _:
            assert_never(loss)


# --- simpo -----------------------------------------------------------------------------------------------------------


def simpo(loss: SimpoLoss, logps: PairLogps, norm: Normaliser) -> LossTerms:
    """SimPO (Meng et al. 2024, eq. 6; princeton-nlp/SimPO scripts/simpo_trainer.py), z = alp_w - alp_l - gamma/beta.

    sigmoid: -(1-eps) ls(beta z) - eps ls(-beta z). hinge: max(0, 1 - beta z). Plus sft_weight times the
    cross-entropy per chosen token. Reward: beta * alp, without gamma.
    """
    chosen = logps.chosen / logps.chosen_tokens
    rejected = logps.rejected / logps.rejected_tokens
    scaled = loss.beta * (chosen - rejected - loss.ratio)
    match loss.loss_type:
        case "sigmoid":
            per_pair = smoothed_logistic(scaled, loss.label_smoothing)
        case "hinge":
            per_pair = torch.relu(1 - scaled)
        case _:
            assert_never(loss.loss_type)
    total = per_pair.sum() / norm.pairs
    if loss.sft_weight:
        total = total + loss.sft_weight * cross_entropy(logps, norm)
    return _terms(total, logps, norm, loss.beta * chosen, loss.beta * rejected, chosen, rejected)


# --- dpo -------------------------------------------------------------------------------------------------------------


def dpo(loss: DpoLoss, logps: PairLogps, norm: Normaliser) -> LossTerms:
    """DPO (Rafailov et al. 2023, eq. 7): -ls(beta (a - d)), a and d the summed log-ratios to the reference.

    Reward: beta * log-ratio.
    """
    reference = _reference(logps)
    chosen = logps.chosen - reference.chosen
    rejected = logps.rejected - reference.rejected
    total = -logsigmoid(loss.beta * (chosen - rejected)).sum() / norm.pairs
    return _terms(total, logps, norm, loss.beta * chosen, loss.beta * rejected, logps.chosen, logps.rejected)


# --- sft -------------------------------------------------------------------------------------------------------------


def sft(logps: PairLogps, norm: Normaliser) -> LossTerms:
    """Cross-entropy per chosen token. It has no reward of its own: the summed log-probs stand in for it."""
    total = cross_entropy(logps, norm)
    return _terms(total, logps, norm, logps.chosen, logps.rejected, logps.chosen, logps.rejected)


# --- parts -----------------------------------------------------------------------------------------------------------


def smoothed_logistic(scaled: Tensor, smoothing: float) -> Tensor:
    """-(1-eps) ls(s) - eps ls(-s), elementwise: the logistic loss when labels are wrong with probability eps."""
    if not smoothing:
        return -logsigmoid(scaled)
    return -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)


def cross_entropy(logps: PairLogps, norm: Normaliser) -> Tensor:
    """These pairs' share of the update's cross-entropy per chosen token; scalar."""
    return -logps.chosen.sum() / norm.chosen_tokens


def _reference(logps: PairLogps) -> PairLogps:
    if logps.reference is None:
        raise ValueError("this objective compares with the start model: give its log-probs (PairLogps.against)")
    return logps.reference


def _terms(
    total: Tensor,
    logps: PairLogps,
    norm: Normaliser,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
) -> LossTerms:
    return LossTerms(
        loss=total,
        chosen_rewards=chosen_rewards.detach(),
        rejected_rewards=rejected_rewards.detach(),
        chosen_logps=chosen_logps.detach(),
        rejected_logps=rejected_logps.detach(),
        logps=logps.detach(),
        norm=norm,
    )
