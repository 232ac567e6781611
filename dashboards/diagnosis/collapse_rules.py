"""Rules for signs of collapse that the objective does not show.

Falling chosen log-probs, fewer right answers, repetitive or longer text, length bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dashboards.analysis.held_out_pairs import spearman
from dashboards.analysis.small_samples import MIN_TESTABLE_PAIRS, is_clear_correlation, share_difference
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel
from dashboards.formatting import format_value
from trainer.config.loss_config import SimpoLoss
from trainer.metrics import CHOSEN, EVAL, EXACT_ANSWERS, MARGIN, REJECTED

REWARD_MARGIN = f"{EVAL}rewards/margins"

GAMMA_SHARE = 0.5
"""Share of gamma. A mean reward margin below this share of the target counts as far below it."""
CHOSEN_DROP = 0.1
"""Nats per token. A chosen response of 100 tokens is then e^10 times less likely than before."""
UNLIKELY_LOGP = -10.0
"""Nats per token. Below the log-prob of a uniform distribution over 22,000 tokens."""


def margin_below_gamma(winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a mean reward margin, beta x (difference of log-probs per token), far below SimPO's target gamma."""
    loss, margin = winner.config.loss, winner.last(REWARD_MARGIN)
    if (
        not isinstance(loss, SimpoLoss)
        or margin is None
        or loss.gamma_value <= 0
        or margin >= GAMMA_SHARE * loss.gamma_value
    ):
        return
    reached = ""
    if winner.pairs is not None:
        share = float(np.mean(loss.beta * winner.pairs.margins > loss.gamma_value))
        reached = f" {share:.0%} of the {len(winner.pairs):,} held-out pairs reach the target."
    begun = winner.first(REWARD_MARGIN)
    since = "" if begun is None else f", from {format_value(begun)} at step 0"
    yield DiagnosisFinding(
        "margin_below_gamma",
        FindingLevel.NOTE,
        "The winner's margin is far below its target gamma",
        f"Trial {winner.label}: mean reward margin {format_value(margin)}{since}, against gamma "
        f"{format_value(loss.gamma_value)}; per token that is {format_value(margin / loss.beta)}, with a "
        f"target of gamma / beta = {format_value(loss.gamma_over_beta)}.{reached}",
        "Most pairs still have nearly the full gradient, so gamma has little effect: try a smaller gamma, or train "
        "longer or with a higher learning rate if the chosen log-probs do not fall.",
        (winner.label,),
        "loss.gamma",
    )


def chosen_logps_falling(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report margins that rise while the chosen log-probs fall, the typical collapse of SimPO."""
    falling = [trial for trial in frame.ranked if _falls(trial)]
    if not falling:
        return
    winner_falls = winner in falling
    trial = winner if winner_falls else falling[0]
    margin, drop, start = trial.change(MARGIN), trial.change(CHOSEN), trial.first(CHOSEN)
    assert margin is not None
    assert drop is not None
    assert start is not None
    beta = trial.config.loss.beta if isinstance(trial.config.loss, SimpoLoss) else None
    steps = ["lower the learning rate"]
    if beta is not None:
        better = "; the SimPO authors often found 10 better" if beta < 10 else ""
        steps += [f"raise beta (now {format_value(beta)}{better})", "or add loss.sft_weight: 0.1"]
    else:
        steps.append("or raise loss.nll_scale")
    yield DiagnosisFinding(
        "chosen_falling",
        (FindingLevel.SERIOUS if -drop > margin else FindingLevel.WARNING) if winner_falls else FindingLevel.NOTE,
        "Margins rise while the chosen responses become less likely"
        + ("" if winner_falls else " (in trials that did not win)"),
        f"Trial {trial.label}: the margin rose by {format_value(margin)} per token while the chosen log-prob fell from "
        f"{format_value(start)} to {format_value(start + drop)} per token ({format_value(drop)}); the same holds "
        f"for {len(falling)} of {len(frame.ranked)} complete trials.",
        f"The margin grows mainly by lowering the rejected responses. {', '.join(steps).capitalize()}; read the "
        "samples before using the model.",
        tuple(c.label for c in falling),
        "training.learning_rate",
    )


def _falls(trial: TrialFrame) -> bool:
    margin, drop = trial.change(MARGIN), trial.change(CHOSEN)
    return margin is not None and drop is not None and margin > 0 and drop < -CHOSEN_DROP


def unlikely_text(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report chosen log-probs below -10 nats per token, worse than a uniform distribution over 22,000 tokens."""
    low = [c for c in frame.ranked if (c.last(CHOSEN) or 0.0) < UNLIKELY_LOGP]
    if not low:
        return
    worst = winner if winner in low else low[0]
    start = worst.first(CHOSEN)
    was_low = start is not None and start < UNLIKELY_LOGP
    yield DiagnosisFinding(
        "unlikely_text",
        FindingLevel.SERIOUS if winner in low else FindingLevel.NOTE,
        "Chosen responses have log-probs under -10 per token",
        f"Trial {worst.label}: {format_value(worst.last(CHOSEN))} per token"
        + ("" if start is None else f", {format_value(start)} at step 0")
        + f"; the same holds for {len(low)} of {len(frame.ranked)} complete trials.",
        "The initial model already assigns such low log-probs: check the chat template and the tokenizer, or add an "
        "SFT stage."
        if was_low
        else "Training has degraded the model: lower the learning rate by a factor of 3 or more.",
        tuple(c.label for c in low),
    )


def impossible_logps(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report log-probs above 0, which no probability distribution has."""
    wrong = [c for c in frame.trials if max(c.last(CHOSEN) or 0.0, c.last(REJECTED) or 0.0) > 0]
    if not wrong:
        return
    first = wrong[0]
    yield DiagnosisFinding(
        "impossible_logps",
        FindingLevel.SERIOUS,
        "Log-probs above 0, which are impossible",
        f"Trial {first.label}: chosen {format_value(first.last(CHOSEN))}, rejected "
        f"{format_value(first.last(REJECTED))} per token; the same holds for {len(wrong)} of "
        f"{len(frame.trials)} trials.",
        "This is a bug in prefsweep, not a result of training: do not use any metric of these trials, and report it.",
        tuple(c.label for c in wrong),
    )


REPETITION = f"{EVAL}repetition"
LENGTH = f"{EVAL}answer_length"

REPETITION_RISE = 0.2
"""Increase of the share of repeated 4-grams that is reported."""
LENGTH_GROWTH = 1.5
"""Factor of the answer length that is reported."""
MIN_LENGTH_CORRELATION = 0.3
"""Rank correlation of margin and length difference that is reported."""
EXACT_DROP = 0.05
"""Drop of the share of right answers that is reported."""


def exact_answers_lost(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a drop of right answers while the objective improves."""
    drop, gain, start = winner.change(EXACT_ANSWERS), winner.change(frame.objective.metric), winner.first(EXACT_ANSWERS)
    prompts = winner.config.evaluation.prompts
    if drop is None or start is None or gain is None or drop > -EXACT_DROP or frame.sign * gain <= 0 or prompts == 0:
        return
    low, high = share_difference(start + drop, start, prompts)
    changes = [change for trial in frame.ranked if (change := trial.change(EXACT_ANSWERS)) is not None]
    fewer = sum(change < 0 for change in changes)
    in_most_trials = prompts >= MIN_TESTABLE_PAIRS and len(changes) >= 5 and fewer >= 0.8 * len(changes)
    yield DiagnosisFinding(
        "answers_lost",
        FindingLevel.SERIOUS if high < 0 or in_most_trials else FindingLevel.WARNING,
        "Fewer right answers while the objective improves",
        f"Trial {winner.label}: right answers went from {start:.1%} to {start + drop:.1%} of {prompts} prompts (95 % "
        f"interval of that difference {low:+.1%} to {high:+.1%}) while {frame.objective.metric} improved by "
        f"{format_value(abs(gain))}; they fell in {fewer} of {len(changes)} complete trials.",
        "The objective improves at the cost of the task. Lower the learning rate, add loss.sft_weight or "
        "loss.nll_scale, rank by eval_exact_answers, and raise evaluation.prompts for a narrower interval.",
        (winner.label,),
        "training.learning_rate",
    )


def degenerate_text(winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report answers that became repetitive or much longer."""
    problems: list[str] = []
    repeated, before = winner.last(REPETITION), winner.first(REPETITION)
    if repeated is not None and before is not None and repeated - before > REPETITION_RISE:
        problems.append(f"repeated 4-grams went from {before:.0%} to {repeated:.0%}")
    length, was = winner.last(LENGTH), winner.first(LENGTH)
    if length is not None and was is not None and was > 0 and length > LENGTH_GROWTH * was:
        problems.append(f"answers grew from {format_value(was)} to {format_value(length)} tokens")
    if problems:
        prompts = winner.config.evaluation.prompts
        yield DiagnosisFinding(
            "degenerate_text",
            FindingLevel.SERIOUS if prompts >= MIN_TESTABLE_PAIRS else FindingLevel.WARNING,
            "The winner's answers have become longer or repeat themselves",
            f"Trial {winner.label}: on {prompts} fixed prompts {' and '.join(problems)}.",
            "Read its samples below; lower the learning rate or raise beta.",
            (winner.label,),
        )


def length_bias(winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a winner whose margin correlates with length difference, more than the initial model's."""
    if winner.pairs is None:
        return
    rho = spearman(winner.pairs.margins, winner.pairs.length_differences)
    initial = winner.pairs.initial()
    before = None if initial is None else spearman(initial.margins, initial.length_differences)
    if rho is None or abs(rho) < MIN_LENGTH_CORRELATION or not is_clear_correlation(rho, len(winner.pairs)):
        return
    if before is not None and abs(rho) < abs(before) + 0.1:
        return
    since = "" if before is None else f", {before:+.2f} before training"
    yield DiagnosisFinding(
        "length_bias",
        FindingLevel.NOTE,
        f"The winner prefers {'longer' if rho > 0 else 'shorter'} responses",
        f"Trial {winner.label}: rank correlation of margin with length difference {rho:+.2f} over {len(winner.pairs)} "
        f"held-out pairs{since}.",
        "Compare win rates at equal length; the preference data may favor length itself.",
        (winner.label,),
    )
