"""The objectives: pure functions from per-pair log-probs to loss terms. Token means are over a whole update.

Symbols: lp summed log-prob, n its tokens, alp = lp / n; w chosen, l rejected; ls = log sigmoid; CE cross-entropy per
chosen token of the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.config.loss_config import CpoLoss, DpoLoss, KtoLoss, LossConfig, OrpoLoss, SftLoss, SimperLoss, SimpoLoss
from trainer.objectives.dpo_terms import length_desensitized, log_ratios, term_losses, wpo_weights
from trainer.objectives.pair_logps import (
    LossTerms,
    PairLogps,
    RequiredStats,
    UpdateTotals,
    cross_entropy,
    per_token_logps,
    prompt_cross_entropy,
    smoothed_logistic,
    to_device,
)
from trainer.objectives.rewards import Responses, compares_with_reference, rewards, shape_log_prob

_MAX_LOG_PROB = -1e-12
"""Upper bound of log-probs in log(1 - p)."""


def required_stats(loss: LossConfig) -> RequiredStats:
    """Return the statistics, beyond sums and counts, that this objective uses."""
    match loss:
        case SimpoLoss() | CpoLoss() | SimperLoss():
            return RequiredStats()
        case DpoLoss():
            reference = compares_with_reference(loss)
            return RequiredStats(
                reference=reference,
                collision_prob=loss.use_weighting,
                couples_pairs=loss.couples_pairs,
                scores=loss.needs_scores,
            )
        case OrpoLoss():
            return RequiredStats(prompt=loss.nll_prompt and loss.nll_scale > 0)
        case KtoLoss():
            return RequiredStats(reference=True, mismatched=loss.scores_mismatched)
        case SftLoss():
            return RequiredStats(rejected=False)
        case _:
            assert_never(loss)


def pair_loss(loss: LossConfig, logps: PairLogps, totals: UpdateTotals) -> LossTerms:
    """Return the objective's terms for these pairs: their share of the update described by `totals`.

    Raises ValueError if the objective needs a reference, or another statistic, that `logps` lacks.
    """
    match loss:
        case SimpoLoss():
            return simpo(loss, logps, totals)
        case DpoLoss():
            return dpo(loss, logps, totals)
        case CpoLoss():
            return cpo(loss, logps, totals)
        case OrpoLoss():
            return orpo(loss, logps, totals)
        case SimperLoss():
            return simper(loss, logps, totals)
        case KtoLoss():
            return kto(loss, logps, totals)
        case SftLoss():
            return sft(logps, totals)
        case _:
            assert_never(loss)


def coupled_loss(
    loss: LossConfig, update_logps: PairLogps, index: Sequence[int], part: PairLogps, totals: UpdateTotals
) -> LossTerms:
    """Return the terms of some pairs of an update under an objective that couples all of its pairs.

    Args:
        loss: The objective.
        update_logps: The update's log-probs with reference, computed in an earlier pass.
        index: Indexes of these pairs in the update.
        part: Log-probs of these pairs, with autograd history.
        totals: Totals of the update.

    Returns:
        Terms whose loss value is these pairs' share, but whose gradient (w.r.t. `part`) is that of the whole update's
        loss.
    """
    positions = to_device(torch.tensor(index), part.chosen.device)
    terms = pair_loss(loss, update_logps.replace_pairs(positions, part), totals)
    value = terms.loss.detach()
    shared = terms.loss - value + value * (len(index) / totals.pairs)
    return replace(terms.select(positions), loss=shared)


# --- simpo -----------------------------------------------------------------------------------------------------------


def simpo(loss: SimpoLoss, logps: PairLogps, totals: UpdateTotals) -> LossTerms:
    """Return the terms of SimPO (Meng et al. 2024, eq. 6; princeton-nlp/SimPO scripts/simpo_trainer.py).

    z = alp_w - alp_l - gamma/beta.
    sigmoid: -(1-eps) ls(beta z) - eps ls(-beta z). hinge: max(0, 1 - beta z). Plus sft_weight * CE.
    With alpha, AlphaPO (Gupta et al. 2025): (1 - e^(-alpha alp)) / alpha in the place of alp.
    Reward: beta * alp, without gamma.
    """
    chosen, rejected = per_token_logps(logps)
    scaled = loss.beta * (
        shape_log_prob(chosen, loss.alpha) - shape_log_prob(rejected, loss.alpha) - loss.gamma_over_beta
    )
    match loss.loss_type:
        case "sigmoid":
            losses = smoothed_logistic(scaled, loss.label_smoothing)
        case "hinge":
            losses = torch.relu(1 - scaled)
        case _:
            assert_never(loss.loss_type)
    total = losses.sum() / totals.pairs + _weighted_nll(loss.cross_entropy_weight, logps, totals)
    return _loss_terms(total, logps, totals, _rewards(loss, logps), (chosen, rejected))


# --- dpo -------------------------------------------------------------------------------------------------------------


def dpo(loss: DpoLoss, logps: PairLogps, totals: UpdateTotals) -> LossTerms:
    """Return the terms of the DPO family (Rafailov et al. 2023, eq. 7): weighted sum of dpo_terms.py's terms and CE.

    Reward: beta * (lp - lpr), summed for every term, as in TRL. Sorted terms (aot) need all pairs of the update here.
    """
    chosen, rejected = length_desensitized(loss, logps)
    weights = wpo_weights(logps) if loss.use_weighting else None
    total = _weighted_nll(loss.nll_scale, logps, totals)
    if compares_with_reference(loss):
        if logps.reference is None:
            raise ValueError("this objective needs reference log-probs: add them with PairLogps.with_reference")
        found = log_ratios(loss, chosen, rejected, logps, logps.reference)
        for term, weight in loss.terms:
            if term != "sft":
                losses = term_losses(term, loss, found)
                losses = losses if weights is None else losses * weights
                total = total + weight * losses.sum() / totals.pairs
    for term, weight in loss.terms:
        if term == "sft":
            total = total + weight * cross_entropy(logps, totals)
    return _loss_terms(total, logps, totals, _rewards(loss, logps), (chosen, rejected))


# --- cpo -------------------------------------------------------------------------------------------------------------


def cpo(loss: CpoLoss, logps: PairLogps, totals: UpdateTotals) -> LossTerms:
    """Return the terms of CPO (Xu et al. 2024, eq. 3), as TRL's CPOTrainer: the preference term plus nll_scale * CE.

    sigmoid: -(1-eps) ls(beta (lp_w - lp_l)) - eps ls(...). hinge: max(0, 1 - beta (lp_w - lp_l)).
    ipo: (alp_w - alp_l - 1/(2 beta))^2, on averages. Reward: beta * the term's argument (lp, or alp for ipo).
    """
    chosen, rejected = per_token_logps(logps) if loss.loss_type == "ipo" else (logps.chosen, logps.rejected)
    match loss.loss_type:
        case "sigmoid":
            losses = smoothed_logistic(loss.beta * (chosen - rejected), loss.label_smoothing)
        case "hinge":
            losses = torch.relu(1 - loss.beta * (chosen - rejected))
        case "ipo":
            losses = (chosen - rejected - 1 / (2 * loss.beta)) ** 2
        case _:
            assert_never(loss.loss_type)
    total = losses.sum() / totals.pairs + _weighted_nll(loss.nll_scale, logps, totals)
    return _loss_terms(total, logps, totals, _rewards(loss, logps), (chosen, rejected))


# --- orpo ------------------------------------------------------------------------------------------------------------


def orpo(loss: OrpoLoss, logps: PairLogps, totals: UpdateTotals) -> LossTerms:
    """Return the terms of ORPO (Hong et al. 2024, eqs. 4-7) as in TRL's ORPOTrainer.

    nll_scale * NLL - beta * ls(log odds ratio).
    log odds ratio = (alp_w - alp_l) - (log(1 - e^alp_w) - log(1 - e^alp_l)), on averages. NLL per token of prompt and
    chosen (nll_prompt), or of chosen alone. Reward: beta * alp.
    """
    chosen, rejected = per_token_logps(logps)
    log_odds_ratio = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    total = -loss.beta * logsigmoid(log_odds_ratio).sum() / totals.pairs
    if loss.nll_scale:
        nll = prompt_cross_entropy(logps, totals) if loss.nll_prompt else cross_entropy(logps, totals)
        total = total + loss.nll_scale * nll
    # The metrics have TRL's names: its `log_odds_ratio` is the log sigmoid of the log odds ratio.
    extra = {"log_odds_ratio": logsigmoid(log_odds_ratio), "log_odds_chosen": log_odds_ratio}
    return _loss_terms(total, logps, totals, _rewards(loss, logps), (chosen, rejected), extra)


def _log1mexp(average: Tensor) -> Tensor:
    """log(1 - e^average)."""
    return torch.log(-torch.expm1(average.clamp(max=_MAX_LOG_PROB)))


# --- simper ----------------------------------------------------------------------------------------------------------


def simper(loss: SimperLoss, logps: PairLogps, totals: UpdateTotals) -> LossTerms:
    """Return the terms of SimPER (Xiao et al. 2025): e^alp_l - e^alp_w, plus nll_scale * CE.

    Formula and reward, alp itself, are those of the authors' code (tengxiao1/SimPER, scripts/simper_trainer.py).
    """
    chosen, rejected = per_token_logps(logps)
    total = (rejected.exp() - chosen.exp()).sum() / totals.pairs + _weighted_nll(loss.nll_scale, logps, totals)
    return _loss_terms(total, logps, totals, _rewards(loss, logps), (chosen, rejected))


# --- kto -------------------------------------------------------------------------------------------------------------


def kto(loss: KtoLoss, logps: PairLogps, totals: UpdateTotals) -> LossTerms:
    """Return the terms of KTO (Ethayarajh et al. 2024), as TRL's KTOTrainer: a mean over all responses, plus CE.

    r = lp - lpr. desirable_weight * (1 - s(beta (r_w - kl))), undesirable_weight * (1 - s(beta (kl - r_l))), s sigmoid.
    kl is the update's `kl_estimate`, without gradient; 0 for apo_zero_unpaired (D'Oosterlinck et al. 2024).
    Reward: beta * r.
    """
    reference = logps.reference
    if reference is None:
        raise ValueError("this objective needs reference log-probs: add them with PairLogps.with_reference")
    kl = torch.zeros_like(reference.chosen) if not loss.scores_mismatched else reference.kl
    if kl is None:
        raise ValueError("KTO needs the update's estimate of the KL divergence: add it with PairLogps.with_kl")
    chosen, rejected = logps.chosen - reference.chosen - kl, logps.rejected - reference.rejected - kl
    desirable = loss.desirable_weight * torch.sigmoid(-loss.beta * chosen)
    undesirable = loss.undesirable_weight * torch.sigmoid(loss.beta * rejected)
    if totals.single:
        desirable, undesirable = desirable * (logps.chosen_tokens > 0), undesirable * (logps.rejected_tokens > 0)
    losses = desirable + undesirable
    total = losses.sum() / totals.responses + _weighted_nll(loss.nll_scale, logps, totals)
    return _loss_terms(total, logps, totals, _rewards(loss, logps), (logps.chosen, logps.rejected), {"kl": kl})


# --- sft -------------------------------------------------------------------------------------------------------------


def sft(logps: PairLogps, totals: UpdateTotals) -> LossTerms:
    """Return the terms of SFT: cross-entropy per chosen token. Its reward is the summed log-prob."""
    return _loss_terms(
        cross_entropy(logps, totals), logps, totals, _rewards(SftLoss(), logps), (logps.chosen, logps.rejected)
    )


# --- all -------------------------------------------------------------------------------------------------------------


def _weighted_nll(weight: float, logps: PairLogps, totals: UpdateTotals) -> Tensor:
    return weight * cross_entropy(logps, totals) if weight else logps.chosen.new_zeros(())


def _rewards(loss: LossConfig, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Return the implicit rewards of chosen and rejected, [N] each."""
    sums, reference = (logps.chosen, logps.rejected), (None, None)
    if isinstance(loss, DpoLoss):
        sums = length_desensitized(loss, logps)
        reference = (None, None) if logps.reference is None else length_desensitized(loss, logps.reference)
    elif isinstance(loss, KtoLoss) and logps.reference is not None:
        reference = (logps.reference.chosen, logps.reference.rejected)
    tokens = (logps.chosen_tokens, logps.rejected_tokens)
    chosen, rejected = (rewards(loss, Responses(*side)) for side in zip(sums, tokens, reference, strict=True))
    return chosen, rejected


def _loss_terms(
    total: Tensor,
    logps: PairLogps,
    totals: UpdateTotals,
    rewards_pair: tuple[Tensor, Tensor],
    logps_pair: tuple[Tensor, Tensor],
    extra: Mapping[str, Tensor] | None = None,
) -> LossTerms:
    return LossTerms(
        loss=total,
        chosen_rewards=rewards_pair[0].detach(),
        rejected_rewards=rewards_pair[1].detach(),
        chosen_logps=logps_pair[0].detach(),
        rejected_logps=logps_pair[1].detach(),
        extra={name: values.detach() for name, values in (extra or {}).items()},
        logps=logps.detach(),
        totals=totals,
    )
