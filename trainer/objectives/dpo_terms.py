"""The per-pair terms of the DPO family: formulas and names of TRL's DPOTrainer 1.16 and of papers, numerically stable.

Symbols: lp, lpr summed log-prob under policy and reference; a = lp_w - lpr_w, d = lp_l - lpr_l; n tokens;
s_w, s_l the scores f'(ratio) of an f-divergence (a and d for reverse KL); delta = s_w - s_l; ls = log sigmoid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.config.loss_config import DpoLoss, DpoLossType
from trainer.objectives.pair_logps import PairLogps, smoothed_logistic

_MAX_EXPONENT = 80.0
"""Upper bound of exponents: e^80 is larger than any useful value and finite in float32."""

_MAX_CHI_EXPONENT = 20.0
"""Upper bound of the exponent in chi-PO's link function."""


@dataclass(frozen=True, slots=True)
class LogRatios:
    """Arguments of the terms; every tensor has shape [N]."""

    policy_margin: Tensor
    """Log-prob of the chosen minus the rejected response under the policy."""
    reference_margin: Tensor
    """The same under the reference."""
    chosen: Tensor
    """Policy minus reference log-prob of the chosen response."""
    rejected: Tensor
    """Policy minus reference log-prob of the rejected response."""
    chosen_score: Tensor
    """f'(e^chosen) of the f-divergence; equal to `chosen` for reverse KL."""
    rejected_score: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    score_gap: Tensor | None
    """Score of the chosen minus that of the rejected response in the data; None if the loss reads no scores."""


def log_ratios(loss: DpoLoss, chosen: Tensor, rejected: Tensor, logps: PairLogps, reference: PairLogps) -> LogRatios:
    """Compute log ratios from the policy's (possibly length-desensitized) log-probs and both models' statistics."""
    reference_chosen, reference_rejected = length_desensitized(loss, reference)
    chosen_ratio, rejected_ratio = chosen - reference_chosen, rejected - reference_rejected
    return LogRatios(
        policy_margin=chosen - rejected,
        reference_margin=reference_chosen - reference_rejected,
        chosen=chosen_ratio,
        rejected=rejected_ratio,
        chosen_score=_score(loss, chosen_ratio),
        rejected_score=_score(loss, rejected_ratio),
        chosen_tokens=logps.chosen_tokens,
        rejected_tokens=logps.rejected_tokens,
        score_gap=reference.score_gap,
    )


def length_desensitized(loss: DpoLoss, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Return summed log-probs of chosen and rejected, [N] each, of LD-DPO if `ld_alpha` is set.

    LD-DPO (Liu et al. 2024, eq. 8): weight ld_alpha for tokens beyond the shorter response's length.
    """
    if loss.ld_alpha is None:
        return logps.chosen, logps.rejected
    if logps.chosen_shared is None or logps.rejected_shared is None:
        raise ValueError("ld_alpha needs the log-probs of the tokens up to the shorter response's length")
    chosen = logps.chosen_shared + loss.ld_alpha * (logps.chosen - logps.chosen_shared)
    return chosen, logps.rejected_shared + loss.ld_alpha * (logps.rejected - logps.rejected_shared)


def wpo_weights(logps: PairLogps) -> Tensor:
    """Return WPO's weights of the pairs, [N], detached (Zhou et al. 2024, eq. 2).

    Product over both responses of exp(mean(log p - log sum_v p_v^2)).
    """
    if logps.chosen_collision_logp is None or logps.rejected_collision_logp is None:
        raise ValueError("use_weighting needs the collision probabilities of the token distributions")
    chosen = (logps.chosen - logps.chosen_collision_logp) / logps.chosen_tokens
    rejected = (logps.rejected - logps.rejected_collision_logp) / logps.rejected_tokens
    return (chosen + rejected).detach().exp()


def _score(loss: DpoLoss, ratio: Tensor) -> Tensor:
    """f'(e^ratio) of the divergence (Wang et al. 2024, table 1), up to a constant that cancels in differences."""
    match loss.f_divergence_type:
        case "reverse_kl":
            return ratio
        case "forward_kl":
            return 1 - torch.exp((-ratio).clamp(max=_MAX_EXPONENT))
        case "js_divergence":
            return math.log(2) + logsigmoid(ratio)
        case "alpha_divergence":
            power = loss.f_alpha_divergence_coef - 1.0
            if abs(power) < 1e-6:
                return ratio
            return torch.expm1((power * ratio).clamp(max=_MAX_EXPONENT)) / power
        case _:
            assert_never(loss.f_divergence_type)


def term_losses(term: DpoLossType, loss: DpoLoss, ratios: LogRatios) -> Tensor:
    """Return one term's loss of each pair, [N]; for sorted terms (aot) of each rank in the sort.

    dpop (Pal et al. 2024, arXiv 2402.13228, eq. 3; lambda within beta as in the authors' code, abacusai/smaug issue 2):
    -ls(beta (a - d - dpop_lambda max(0, -a))). length_alpha (R-DPO, Park et al. 2024, arXiv 2403.19159): beta delta +
    length_alpha (n_w - n_l) in place of beta delta, as beta log(pi / pi_ref) + length_alpha n is the reward of a policy
    that is optimal for the reward less length_alpha a token. chipo (Huang et al. 2024, arXiv 2407.13399, algorithm 1):
    -ls(clip(beta (phi(a) - phi(d)))), phi the link function of `chi_squared_link`, clip to +-2 R_max. odpo_alpha (Amini
    et al. 2024, arXiv 2402.10571; the authors' code, rycolab/odpo, trainers.py): beta delta minus `score_offset`.
    """
    beta, smoothing = loss.beta, loss.label_smoothing
    scaled = beta * (ratios.chosen_score - ratios.rejected_score)
    if loss.length_alpha:
        # In the log-probs' precision: a number times whole numbers would be float32.
        scaled = scaled + loss.length_alpha * (ratios.chosen_tokens - ratios.rejected_tokens).to(scaled.dtype)
    if loss.odpo_alpha:
        if ratios.score_gap is None:
            raise ValueError("odpo_alpha needs the gaps of the pairs' scores")
        scaled = scaled - score_offset(loss, ratios.score_gap)
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    match term:
        case "sigmoid":
            return -logsigmoid(scaled)
        case "sigmoid_norm":
            return -logsigmoid(beta * _average_margin(ratios))
        case "hinge":
            return torch.relu(1 - scaled)
        case "ipo":
            return (_average_margin(ratios) - 1 / (2 * beta)) ** 2
        case "robust":
            flipped = (1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
            return -flipped / (1 - 2 * smoothing)
        case "exo_pair":
            unflipped = scaled.sigmoid() * (logsigmoid(scaled) - math.log1p(-smoothing))
            return unflipped + (-scaled).sigmoid() * (logsigmoid(-scaled) - math.log(smoothing))
        case "nca_pair":
            return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
        case "bco_pair":
            return -logsigmoid(chosen) - logsigmoid(-rejected)
        case "sppo_hard":
            return (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2
        case "aot":
            return smoothed_logistic(
                beta * (_sorted(ratios.policy_margin) - _sorted(ratios.reference_margin)), smoothing
            )
        case "aot_unpaired":
            return smoothed_logistic(beta * (_sorted(ratios.chosen) - _sorted(ratios.rejected)), smoothing)
        case "apo_zero":
            return (-chosen).sigmoid() + rejected.sigmoid()
        case "apo_down":
            return chosen.sigmoid() + (rejected - chosen).sigmoid()
        case "discopop":
            return _discopop(scaled, loss.discopop_tau)
        case "dpop":
            return -logsigmoid(scaled - beta * loss.dpop_lambda * torch.relu(-ratios.chosen))
        case "chipo":
            margin = beta * (chi_squared_link(ratios.chosen) - chi_squared_link(ratios.rejected))
            limit = loss.chipo_r_max
            return -logsigmoid(margin if limit is None else margin.clamp(-2 * limit, 2 * limit))
        case "sft":
            raise ValueError("sft is a mean over tokens, not a per-pair term")
        case _:
            assert_never(term)


def score_offset(loss: DpoLoss, gap: Tensor) -> Tensor:
    """Return ODPO's offset of each pair, [N]: odpo_alpha log(gap), or odpo_alpha gap with odpo_scale identity.

    The logarithm of a gap of 0 is -inf, with which the pair's loss and gradient are 0; so it is here for negative gaps.
    The authors' pairs are ordered by score and have no equal ones.
    """
    match loss.odpo_scale:
        case "log":
            return loss.odpo_alpha * gap.clamp(min=0.0).log()
        case "identity":
            return loss.odpo_alpha * gap
        case _:
            assert_never(loss.odpo_scale)


def chi_squared_link(ratio: Tensor) -> Tensor:
    """Return chi-PO's link function z + log z of z = e^ratio, strictly increasing: f'(z) of the chi-squared divergence
    plus KL. The exponent is at most 20, as in the paper's experiments.
    """
    return ratio.clamp(max=_MAX_CHI_EXPONENT).exp() + ratio


def _average_margin(ratios: LogRatios) -> Tensor:
    return ratios.chosen_score / ratios.chosen_tokens - ratios.rejected_score / ratios.rejected_tokens


def _sorted(values: Tensor) -> Tensor:
    return values.sort().values


def _discopop(scaled: Tensor, tau: float) -> Tensor:
    """DiscoPOP (Lu et al. 2024, eq. 5). sigma(s/tau) e^-s is one exponential: two factors would give 0 * infinity."""
    mixed = scaled / tau
    exponential = torch.exp((logsigmoid(mixed) - scaled).clamp(max=_MAX_EXPONENT))
    return (-mixed).sigmoid() * -logsigmoid(scaled) + exponential
