"""Whether the winner is healthy or hollow: signs of collapse that no ranking shows (OBJECTIVES: pitfalls 12 and 13)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dashboards.diagnosis.finding import Finding, Level
from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame, TrialCase
from trainer.loss_config import SimpoLoss
from trainer.metrics import EVAL

MARGIN = f"{EVAL}margins/logp"
REWARD_MARGIN = f"{EVAL}rewards/margins"
CHOSEN = f"{EVAL}logps_per_token/chosen"
REJECTED = f"{EVAL}logps_per_token/rejected"

FAR_BELOW = 0.5
"""Of gamma: a mean reward margin under this share of its target is far below it."""
CHOSEN_DROP = 0.1
"""Nats per token: a chosen response of 100 tokens is then e^10 times less likely than before."""
UNLIKELY = -10.0


def margin_below_gamma(winner: TrialCase) -> Iterator[Finding]:
    """SimPO asks for beta x (gap of log-probs per token) > gamma; how far is the winner from that?"""
    loss, margin = winner.config.loss, winner.last(REWARD_MARGIN)
    if not isinstance(loss, SimpoLoss) or margin is None or loss.margin <= 0 or margin >= FAR_BELOW * loss.margin:
        return
    reached = ""
    if winner.pairs is not None:
        share = float(np.mean(loss.beta * winner.pairs.gaps > loss.margin))
        reached = f" {share:.0%} of the {len(winner.pairs):,} held-out pairs reach the target."
    begun = winner.first(REWARD_MARGIN)
    since = "" if begun is None else f", from {show(begun)} at the start"
    yield Finding(
        "margin_below_gamma",
        Level.NOTE,
        "The winner's margin is far below its target gamma",
        f"Trial {winner.label}: mean reward margin {show(margin)}{since}, against gamma {show(loss.margin)}; per token "
        f"that is a gap of {show(margin / loss.beta)} where gamma / beta = {show(loss.ratio)} is asked for.{reached}",
        "Most pairs still pull with full force, so gamma acts as a constant push: try a smaller gamma, or train longer "
        "or with a higher learning rate if the chosen log-probs hold.",
        (winner.label,),
        "loss.gamma",
    )


def chosen_falling(frame: SweepFrame, winner: TrialCase) -> Iterator[Finding]:
    """Margins that rise while the chosen responses become less likely: the known way in which SimPO collapses."""
    falling = [case for case in frame.ranked if _falls(case)]
    if not falling:
        return
    hollow = winner in falling
    case = winner if hollow else falling[0]
    margin, drop, start = case.change(MARGIN), case.change(CHOSEN), case.first(CHOSEN)
    assert margin is not None
    assert drop is not None
    assert start is not None
    beta = case.config.loss.beta if isinstance(case.config.loss, SimpoLoss) else None
    steps = ["lower the learning rate"]
    if beta is not None:
        better = "; the authors often found 10 better" if beta < 10 else ""
        steps += [f"raise beta (now {show(beta)}{better})", "or add loss.sft_weight: 0.1"]
    else:
        steps.append("or raise loss.nll_scale")
    yield Finding(
        "chosen_falling",
        (Level.SERIOUS if -drop > margin else Level.WARNING) if hollow else Level.NOTE,
        "Margins rise while the chosen responses become less likely"
        + ("" if hollow else " (in trials that did not win)"),
        f"Trial {case.label}: the margin rose by {show(margin)} per token while the chosen log-prob fell from "
        f"{show(start)} to {show(start + drop)} per token ({show(drop)}); so in {len(falling)} of "
        f"{len(frame.ranked)} complete trials.",
        f"The model learns what not to say. {', '.join(steps).capitalize()}; and read the samples before shipping.",
        tuple(c.label for c in falling),
        "training.learning_rate",
    )


def _falls(case: TrialCase) -> bool:
    margin, drop = case.change(MARGIN), case.change(CHOSEN)
    return margin is not None and drop is not None and margin > 0 and drop < -CHOSEN_DROP


def unlikely_text(frame: SweepFrame, winner: TrialCase) -> Iterator[Finding]:
    """Log-probs under -10 per token: worse than guessing among 22,000 tokens."""
    low = [c for c in frame.ranked if (c.last(CHOSEN) or 0.0) < UNLIKELY]
    if not low:
        return
    worst = winner if winner in low else low[0]
    start = worst.first(CHOSEN)
    was_so = start is not None and start < UNLIKELY
    yield Finding(
        "unlikely_text",
        Level.SERIOUS if winner in low else Level.NOTE,
        "Chosen responses have log-probs under -10 per token",
        f"Trial {worst.label}: {show(worst.last(CHOSEN))} per token"
        + ("" if start is None else f", {show(start)} at the start")
        + f"; so in {len(low)} of {len(frame.ranked)} complete trials.",
        "The start model itself does not know this kind of text: check the chat template and the tokenizer, or train "
        "it with SFT first."
        if was_so
        else "The model has come apart: lower the learning rate by a factor of 3 or more.",
        tuple(c.label for c in low),
    )


def impossible_logps(frame: SweepFrame) -> Iterator[Finding]:
    """Log-probs above 0: no probability is above 1."""
    wrong = [c for c in frame.trials if max(c.last(CHOSEN) or 0.0, c.last(REJECTED) or 0.0) > 0]
    if not wrong:
        return
    first = wrong[0]
    yield Finding(
        "impossible_logps",
        Level.SERIOUS,
        "Log-probs above 0, which cannot be",
        f"Trial {first.label}: chosen {show(first.last(CHOSEN))}, rejected {show(first.last(REJECTED))} per token; so "
        f"in {len(wrong)} of {len(frame.trials)} trials.",
        "This is a defect of the program, not of the training: believe no number of these trials, and report it.",
        tuple(c.label for c in wrong),
    )
