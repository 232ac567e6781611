"""What the winner says and prefers: right answers lost, text that repeats or grows, a taste for length."""

from __future__ import annotations

from collections.abc import Iterator

from dashboards.diagnosis.finding import Finding, Level
from dashboards.frame import show
from dashboards.pairs import spearman
from dashboards.small_samples import FEWEST_PAIRS, is_clear_correlation, share_difference
from dashboards.sweep_frame import SweepFrame, TrialCase
from trainer.metrics import EVAL

EXACT = f"{EVAL}exact_answers"
REPETITION = f"{EVAL}repetition"
LENGTH = f"{EVAL}answer_length"

REPEATED = 0.2
LONGER = 1.5
BIAS = 0.3
EXACT_DROP = 0.05


def answers_lost(frame: SweepFrame, winner: TrialCase) -> Iterator[Finding]:
    """Exact answers that go while the ranking metric improves."""
    drop, gain, start = winner.change(EXACT), winner.change(frame.goal.metric), winner.first(EXACT)
    prompts = winner.config.evaluation.prompts
    if drop is None or start is None or gain is None or drop > -EXACT_DROP or frame.sign * gain <= 0 or prompts == 0:
        return
    low, high = share_difference(start + drop, start, prompts)
    changes = [change for case in frame.ranked if (change := case.change(EXACT)) is not None]
    fewer = sum(change < 0 for change in changes)
    everywhere = prompts >= FEWEST_PAIRS and len(changes) >= 5 and fewer >= 0.8 * len(changes)
    sure = high < 0 or everywhere
    yield Finding(
        "answers_lost",
        Level.SERIOUS if sure else Level.WARNING,
        "Fewer right answers while the ranking metric improves",
        f"Trial {winner.label}: right answers went from {start:.1%} to {start + drop:.1%} of {prompts} prompts (95 % "
        f"interval of that difference {low:+.1%} to {high:+.1%}) while {frame.goal.metric} improved by "
        f"{show(abs(gain))}; they fell in {fewer} of {len(changes)} complete trials.",
        "The metric is being won at the cost of the task. Lower the learning rate, add loss.sft_weight or "
        "loss.nll_scale, rank by eval_exact_answers, and set evaluation.prompts higher to be sure of it.",
        (winner.label,),
        "training.learning_rate",
    )


def degenerate_text(winner: TrialCase) -> Iterator[Finding]:
    """Answers that repeat themselves or run on."""
    told: list[str] = []
    repeated, before = winner.last(REPETITION), winner.first(REPETITION)
    if repeated is not None and before is not None and repeated - before > REPEATED:
        told.append(f"repeated 4-grams went from {before:.0%} to {repeated:.0%}")
    length, was = winner.last(LENGTH), winner.first(LENGTH)
    if length is not None and was is not None and was > 0 and length > LONGER * was:
        told.append(f"answers grew from {show(was)} to {show(length)} tokens")
    if told:
        prompts = winner.config.evaluation.prompts
        yield Finding(
            "degenerate_text",
            Level.SERIOUS if prompts >= FEWEST_PAIRS else Level.WARNING,
            "The winner's answers have become longer or repeat themselves",
            f"Trial {winner.label}: on {prompts} fixed prompts {' and '.join(told)}.",
            "Read its samples below; lower the learning rate or raise beta.",
            (winner.label,),
        )


def length_bias(winner: TrialCase) -> Iterator[Finding]:
    """Whether the winner prefers the longer response more than the start model did."""
    if winner.pairs is None:
        return
    rho = spearman(winner.pairs.gaps, winner.pairs.length_differences)
    start = winner.pairs.at_start()
    before = None if start is None else spearman(start.gaps, start.length_differences)
    if rho is None or abs(rho) < BIAS or not is_clear_correlation(rho, len(winner.pairs)):
        return
    if before is not None and abs(rho) < abs(before) + 0.1:
        return
    since = "" if before is None else f", {before:+.2f} before training"
    yield Finding(
        "length_bias",
        Level.NOTE,
        f"The winner prefers {'longer' if rho > 0 else 'shorter'} responses",
        f"Trial {winner.label}: rank correlation of margin with length difference {rho:+.2f} over {len(winner.pairs)} "
        f"held-out pairs{since}.",
        "Compare answers at equal length before believing a win rate; the data may reward length itself.",
        (winner.label,),
    )
