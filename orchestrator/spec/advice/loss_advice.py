"""`loss_advice`: which values of beta and of the target margin leave a gradient, from the gaps under the initial model.

SimPO: pairs beyond the margin weigh little, and beta decides how sharply. CPO's sums likewise, without a margin. DPO
starts at log-ratios of zero, where each pair weighs 1/2 whatever beta is: beta says how far a pair moves until it
weighs 1/10. KTO likewise: each response weighs 1/4 at the start. ORPO's beta is the weight of a term, not a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from orchestrator.spec.advice import published_values as published
from orchestrator.spec.advice.advice_lines import AdviceLine, Setting, losses_of, setting_of
from orchestrator.spec.advice.pair_scores import (
    TRAVEL,
    Distribution,
    MarginEffect,
    PairScores,
    log_odds,
    margin_effect,
    rounded,
    weights,
)
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.loss_config import CpoLoss, DpoLoss, KtoLoss, LossConfig, OrpoLoss, SimpoLoss

LEAST_WEIGHT = 0.1
"""Mean weight of the pairs below which a margin leaves no gradient."""
FURTHEST_MARGIN = 1.0
"""Nats per token by which a margin may exceed the median gap. SimPO's authors search gamma / beta in [0, 1]."""
SHARPNESS = (0.2, 5.0)
"""beta times the standard deviation of what it scales. One deviation changes the odds of a pair's weight by a factor e
to this power: 1.2 to 148."""
TRAVELS = (0.05, 1.2)
"""Nats per token until a pair of DPO weighs 1/10. SimPO's beta 2 to 10 gives 1.1 to 0.2, Tulu 3's beta 5 0.4."""
_RATIOS = (0.3, 0.5, 0.8)
"""SimPO's own, added to the median gap where it is above 0."""
_RATIO, _GAMMA, _BETA = "loss.gamma_beta_ratio", "loss.gamma", "loss.beta"


def margin_table(spec: SweepSpec, scores: PairScores) -> tuple[MarginEffect, ...]:
    """Return the effects of each searched pair of margin and beta; () where no trial has SimPO's loss."""
    loss = next((one for one in losses_of(spec) if isinstance(one, SimpoLoss)), None)
    if loss is None or loss.alpha != 0:
        return ()
    betas, margin = _beta(spec, loss), _margin(spec, loss)
    return tuple(
        margin_effect(beta, _ratio(margin, value, beta), scores.gaps)
        for value, beta in product(margin.values, betas.values)
    )


def _beta(spec: SweepSpec, loss: SimpoLoss | DpoLoss | CpoLoss | KtoLoss) -> Setting:
    found = setting_of(spec, _BETA, loss.beta)
    assert found is not None
    return found


def _margin(spec: SweepSpec, loss: SimpoLoss) -> Setting:
    path = next((p for p in (_GAMMA, _RATIO) if p in spec.search.paths), _RATIO if loss.gamma is None else _GAMMA)
    found = setting_of(spec, path, loss.gamma_over_beta if path == _RATIO else loss.gamma)
    assert found is not None
    return found


def _ratio(margin: Setting, value: float, beta: float) -> float:
    return value if margin.path == _RATIO else value / beta


def loss_advice(spec: SweepSpec, scores: PairScores) -> list[AdviceLine]:
    """Return the advice on the settings of each loss that the sweep tries."""
    return [line for loss in losses_of(spec) for line in _of_loss(spec, loss, scores)]


def _of_loss(spec: SweepSpec, loss: LossConfig, scores: PairScores) -> Iterator[AdviceLine]:
    match loss:
        case SimpoLoss():
            yield from _simpo(spec, loss, scores)
        case CpoLoss():
            yield from _cpo(spec, loss, scores)
        case DpoLoss():
            yield from _dpo(spec, loss, scores)
        case KtoLoss():
            yield from _kto(spec, loss, scores)
        case OrpoLoss():
            yield _orpo(loss, scores)
        case _:
            yield AdviceLine("loss", "note", f"{loss.kind} has no setting that the gaps decide", "see its formula")


# --- SimPO -----------------------------------------------------------------------------------------------------------


def _simpo(spec: SweepSpec, loss: SimpoLoss, scores: PairScores) -> Iterator[AdviceLine]:
    if loss.alpha != 0:
        yield AdviceLine(
            "margin", "note", "AlphaPO's reward is no log-prob", "its margin has another unit than the gaps"
        )
        return
    gaps = Distribution.of(scores.gaps)
    beta, margin = _beta(spec, loss), _margin(spec, loss)
    line, advised = _sharpness(beta, gaps, "gaps", "nats per token", published.SIMPO)
    yield line
    yield _margin_line(advised, margin, scores, gaps)


def has_gradient(effect: MarginEffect, gaps: Distribution) -> bool:
    """Return whether pairs keep weight at this margin, and the median pair can be expected to reach it."""
    return effect.weight >= LEAST_WEIGHT and effect.ratio - gaps.median <= FURTHEST_MARGIN


def _margin_line(beta: Setting, margin: Setting, scores: PairScores, gaps: Distribution) -> AdviceLine:
    def effects(value: float) -> list[MarginEffect]:
        return [margin_effect(b, _ratio(margin, value, b), scores.gaps) for b in beta.values]

    kept = [value for value in margin.values if any(has_gradient(e, gaps) for e in effects(value))]
    lost = [value for value in margin.values if value not in kept]
    betas = " / ".join(f"{b:g}" for b in beta.values)
    texts: list[str] = []
    for value in margin.values:
        shares = " / ".join(f"{e.beyond:.0%}" for e in effects(value))
        mean = " / ".join(f"{e.weight:.2f}" for e in effects(value))
        texts.append(f"{value:g}: {shares} of the pairs beyond, mean weight {mean}")
    text = f"{margin.path.removeprefix('loss.')} at beta {betas}: {'; '.join(texts)}"
    reason = (
        f"a value is kept if with some beta the pairs weigh {LEAST_WEIGHT:g} on average and the margin is at most "
        f"{FURTHEST_MARGIN:g} nat per token above the median gap ({gaps.median:+.2f})"
    )
    if not lost:
        return margin.line("margin", margin.values, text, reason, published.SIMPO)
    return margin.line("margin", _advised_margins(beta, margin, scores, gaps, kept), text, reason, published.SIMPO)


def _advised_margins(
    beta: Setting, margin: Setting, scores: PairScores, gaps: Distribution, kept: Sequence[float]
) -> tuple[float, ...]:
    """Return the kept values, and others above the median gap until there are two."""
    above = max(0.0, gaps.median)
    usual = sorted(beta.values)[(len(beta.values) - 1) // 2]
    scale = 1.0 if margin.path == _RATIO else usual
    values = list(dict.fromkeys(float(f"{(above + ratio) * scale:.2g}") for ratio in _RATIOS))
    fresh = [
        value
        for value in values
        if any(has_gradient(margin_effect(b, _ratio(margin, value, b), scores.gaps), gaps) for b in beta.values)
    ]
    return tuple(kept) if len(kept) >= 2 else tuple(sorted({*kept, *(fresh or values[:1])}))


def _sharpness(beta: Setting, values: Distribution, of: str, unit: str, *sources: str) -> tuple[AdviceLine, Setting]:
    """Return the advice on a beta that scales values which vary between the pairs from the start, and beta with it."""
    sd = values.sd
    if sd == 0:
        reason = "beta then scales the gradient and nothing else"
        return AdviceLine("beta", "note", f"all {of} are equal", reason, sources), beta
    low, high = SHARPNESS[0] / sd, SHARPNESS[1] / sd
    kept = tuple(value for value in beta.values if low <= value <= high)
    text = f"the {of} vary by {sd:.3g} {unit} (sd): beta {low:.2g} to {high:.2g} tells pairs apart"
    reason = (
        f"below, pairs one sd apart have nearly equal weights (beta * sd < {SHARPNESS[0]:g}); above, a pair weighs "
        f"either all or nothing (beta * sd > {SHARPNESS[1]:g})"
    )
    advised = kept if len(kept) in (len(beta.values), 2, 3) else tuple(sorted({*kept, *rounded([1 / sd, 3 / sd])}))
    line = beta.line("beta", advised, text, reason, *sources)
    return line, beta if line.level == "keep" else replace(beta, values=beta.advised(advised))


# --- the other losses ------------------------------------------------------------------------------------------------


def _cpo(spec: SweepSpec, loss: CpoLoss, scores: PairScores) -> Iterator[AdviceLine]:
    beta = _beta(spec, loss)
    if loss.loss_type == "ipo":
        yield from _target(beta, published.CPO)
        return
    yield _sharpness(beta, Distribution.of(scores.sums), "differences of summed log-probs", "nats", published.CPO)[0]
    shares = [f"{float(weights(b, scores.sums).mean()):.2f} (beta {b:g})" for b in beta.values]
    yield AdviceLine(
        "weights",
        "note",
        f"{float((scores.sums > 0).mean()):.1%} of the pairs have the likelier chosen response in total; mean weight "
        f"{', '.join(shares)}",
        "sums grow with length, so that beta is per response, not per token",
        (published.CPO,),
    )


_PER_TOKEN = ("sigmoid_norm",)
_ON_SUMS = ("sigmoid", "robust", "dpop", "exo_pair")


def _dpo(spec: SweepSpec, loss: DpoLoss, scores: PairScores) -> Iterator[AdviceLine]:
    beta, term = _beta(spec, loss), loss.terms[0][0]
    if term == "ipo":
        yield from _target(beta, published.DPO)
        return
    if term not in (*_PER_TOKEN, *_ON_SUMS):
        text = f"{term}: no rule for beta from the gaps"
        yield AdviceLine("beta", "note", text, "at the start every log-ratio is zero, whatever the data")
        return
    tokens = 1.0 if term in _PER_TOKEN else scores.mean_tokens
    length = "" if term in _PER_TOKEN else f" of responses of {tokens:.0f} tokens"
    text = f"nats per token{length} until a pair's weight falls from 1/2 to 1/10"
    reason = (
        "at the start every log-ratio is zero and every pair weighs 1/2, so the gaps themselves say nothing about beta"
    )
    yield _travel(beta, TRAVEL, "ln 9", tokens, text, reason, published.DPO, published.TULU)


def _travel(
    beta: Setting, travel: float, named: str, tokens: float, what: str, at_the_start: str, *sources: str
) -> AdviceLine:
    """Return the advice on a beta that says how far a log-ratio moves, `travel` / beta nats, until it weighs a fifth.

    `named`: `travel` as text; `tokens`: by which log-ratios are summed.
    """
    low, high = travel / (TRAVELS[1] * tokens), travel / (TRAVELS[0] * tokens)
    moves = [f"{travel / (b * tokens):.2g} (beta {b:g})" for b in beta.values]
    text = f"{what}: {', '.join(moves)}"
    reason = (
        f"{named} / (beta * tokens), between {TRAVELS[0]:g} and {TRAVELS[1]:g} for beta {low:.2g} to {high:.2g}; "
        f"{at_the_start}"
    )
    kept = [value for value in beta.values if low <= value <= high]
    if len(kept) == len(beta.values):
        return beta.line("beta", beta.values, text, reason, *sources)
    advised = kept if len(kept) >= 2 else sorted({*kept, *rounded([travel / (t * tokens) for t in (1.0, 0.4, 0.2)])})
    return beta.line("beta", advised, text, reason, *sources)


KTO_TRAVEL = 2 * math.atanh(math.sqrt(0.8))
"""How far beta times a log-ratio moves until a response of KTO, of weight s (1 - s) with s its sigmoid, falls from 1/4
to 1/20."""


def _kto(spec: SweepSpec, loss: KtoLoss, scores: PairScores) -> Iterator[AdviceLine]:
    tokens = scores.mean_tokens
    text = f"nats per token of responses of {tokens:.0f} tokens until a response's weight falls from 1/4 to 1/20"
    reason = (
        "at the start every log-ratio is zero and every response weighs 1/4, its most; then less in both directions"
    )
    yield _travel(_beta(spec, loss), KTO_TRAVEL, f"{KTO_TRAVEL:.3g}", tokens, text, reason, published.KTO)


def weight_advice(spec: SweepSpec, desirable: int, undesirable: int) -> Iterator[AdviceLine]:
    """Yield the advice on KTO's weights for so many desirable and undesirable training responses, above 0 each."""
    if not any(isinstance(loss, KtoLoss) for loss in losses_of(spec)):
        return
    names = ("desirable_weight", "undesirable_weight")
    base = spec.base.loss
    settings = [setting_of(spec, f"loss.{name}", getattr(base, name, 1.0)) for name in names]
    high, low = (sorted({1.0} if one is None else one.values) for one in settings)
    ratios = [d * desirable / (u * undesirable) for d in high for u in low if u > 0]
    shown = " to ".join(f"{ratio:.3g}" for ratio in dict.fromkeys((min(ratios), max(ratios)))) if ratios else "infinite"
    text = f"{desirable:,} desirable and {undesirable:,} undesirable responses: their summed weights are {shown} to 1"
    least, most = published.WEIGHT_RATIO
    reason = f"between {least:g} and {most:g} to 1 by the paper, whatever their numbers"
    sources = (published.KTO, published.KTO_GUIDE)
    if ratios and least <= min(ratios) and max(ratios) <= most:
        yield AdviceLine("weights", "keep", text, reason, sources)
        return
    fewer = names[desirable > undesirable]
    equal = max(desirable, undesirable) / min(desirable, undesirable)
    if any(one is not None and one.searched for one in settings) or base.kind != "kto":
        yield AdviceLine("weights", "change", text, f"{reason}: loss.{fewer} {equal:.3g} makes them equal", sources)
        return
    setting = settings[desirable > undesirable]
    assert setting is not None
    yield setting.line("weights", (float(f"{equal:.3g}"),), text, reason, *sources)


def _target(beta: Setting, source: str) -> Iterator[AdviceLine]:
    """IPO's squared error pulls each pair to 1 / (2 beta) nats per token, from either side."""
    targets = [f"{1 / (2 * b):.2g} (beta {b:g})" for b in beta.values]
    low, high = 1 / (2 * TRAVELS[1]), 1 / (2 * TRAVELS[0])
    kept = [value for value in beta.values if low <= value <= high]
    text = f"target of each pair in nats per token: {', '.join(targets)}"
    reason = f"1 / (2 beta), between {TRAVELS[0]:g} and {TRAVELS[1]:g} for beta {low:.2g} to {high:.2g}"
    advised = kept if len(kept) == len(beta.values) or len(kept) >= 2 else sorted({*kept, 0.5, 1.0, 2.0})
    yield beta.line("beta", advised, text, reason, source)


def _orpo(loss: OrpoLoss, scores: PairScores) -> AdviceLine:
    odds = log_odds(scores)
    preference = loss.beta * float(np.logaddexp(0.0, -odds).mean())
    nll = float(-scores.chosen.sum() / scores.chosen_tokens.sum())
    text = (
        f"{float((odds > 0).mean()):.1%} of the pairs have odds for the chosen response; mean weight "
        f"{float(weights(1.0, odds).mean()):.2f}; with beta {loss.beta:g} the odds ratio is {preference:.2g} of the "
        f"loss beside a cross-entropy of {nll:.2g} per chosen token"
    )
    reason = "beta is the paper's lambda, the weight of that term; no value of it takes weight from right pairs"
    return AdviceLine("beta", "note", text, reason, (published.ORPO,))
