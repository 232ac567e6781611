"""Rules for signs of collapse that the objective does not show.

Falling chosen log-probs, fewer right answers, repetitive or longer text, length bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dashboards.analysis.held_out_pairs import spearman
from dashboards.analysis.small_samples import MIN_TESTABLE_PAIRS, is_clear_correlation, share_difference
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.findings import LEARNING_RATE, Advice, DiagnosisFinding, FindingLevel
from dashboards.diagnosis.setting_steps import (
    LOWER_SHARES,
    lower_gamma,
    lower_rate,
    lowest_rate,
    present,
    raise_beta,
    raise_sft_weight,
    train_longer,
)
from dashboards.formatting import format_value
from trainer.config.loss_config import SimpoLoss
from trainer.metrics import CHOSEN, EVAL_PREFIX, EXACT_ANSWERS, MARGIN, REJECTED

REWARD_MARGIN = f"{EVAL_PREFIX}rewards/margins"

GAMMA_SHARE = 0.5
"""Share of gamma. A mean reward margin below this share of the target counts as far below it."""
CHOSEN_DROP = 0.1
"""Nats per token. A chosen response of 100 tokens is then e^10 times less likely than before."""
UNLIKELY_LOGP = -10.0
"""Nats per token. Below the log-prob of a uniform distribution over 22,000 tokens."""


def margin_below_gamma(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
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
    if winner.held_out_pairs is not None:
        share = float(np.mean(loss.beta * winner.held_out_pairs.margins > loss.gamma_value))
        reached = f" {share:.0%} of the {len(winner.held_out_pairs):,} held-out pairs reach the target."
    begun = winner.first(REWARD_MARGIN)
    since = "" if begun is None else f", from {format_value(begun)} at step 0"
    smaller = lower_gamma(frame)
    yield DiagnosisFinding(
        "margin_below_gamma",
        FindingLevel.NOTE,
        "The winner's margin is far below its target gamma",
        f"Trial {winner.label}: mean reward margin {format_value(margin)}{since}, against gamma "
        f"{format_value(loss.gamma_value)}; per token that is {format_value(margin / loss.beta)}, with a "
        f"target of gamma / beta = {format_value(loss.gamma_over_beta)}.{reached}",
        trials=(winner.label,),
        setting="" if smaller is None else smaller.setting,
        steps=present(smaller, train_longer(frame, "train longer if the chosen log-probs do not fall")),
        lead="Most pairs still have nearly the full gradient, so gamma has little effect:",
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
    steps = present(
        lower_rate(winner.config.training.learning_rate, *LOWER_SHARES),
        raise_beta(frame, winner),
        raise_sft_weight(winner),
    )
    yield DiagnosisFinding(
        "chosen_falling",
        (FindingLevel.SERIOUS if -drop > margin else FindingLevel.WARNING) if winner_falls else FindingLevel.NOTE,
        "Margins rise while the chosen responses become less likely"
        + ("" if winner_falls else " (in trials that did not win)"),
        f"Trial {trial.label}: the margin rose by {format_value(margin)} per token while the chosen log-prob fell from "
        f"{format_value(start)} to {format_value(start + drop)} per token ({format_value(drop)})"
        f"{_shared_by(falling, frame)}.",
        "Read the samples before using the model." if winner_falls else "Read the samples before using one of them.",
        tuple(trial.label for trial in falling),
        LEARNING_RATE if winner_falls else "",
        steps if winner_falls else (),
        "The margin grows mainly by lowering the rejected responses.",
    )


def _shared_by(trials: Sequence[TrialFrame], frame: SweepFrame) -> str:
    """Return for how many of several complete trials the same holds."""
    count = len(frame.ranked)
    return f"; the same holds for {len(trials)} of {count} complete trials" if count > 1 else ""


def _falls(trial: TrialFrame) -> bool:
    margin, drop = trial.change(MARGIN), trial.change(CHOSEN)
    return margin is not None and drop is not None and margin > 0 and drop < -CHOSEN_DROP


def unlikely_text(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report chosen log-probs below -10 nats per token, worse than a uniform distribution over 22,000 tokens."""
    low = [trial for trial in frame.ranked if (trial.last(CHOSEN) or 0.0) < UNLIKELY_LOGP]
    if not low:
        return
    worst = winner if winner in low else low[0]
    start = worst.first(CHOSEN)
    was_low = start is not None and start < UNLIKELY_LOGP
    trained = winner in low and not was_low
    yield DiagnosisFinding(
        "unlikely_text",
        FindingLevel.SERIOUS if winner in low else FindingLevel.NOTE,
        "Chosen responses have log-probs under -10 per token",
        f"Trial {worst.label}: {format_value(worst.last(CHOSEN))} per token"
        + ("" if start is None else f", {format_value(start)} at step 0")
        + f"{_shared_by(low, frame)}.",
        "The initial model already assigns such low log-probs: check the chat template and the tokenizer, or add an "
        "SFT stage."
        if was_low
        else ""
        if trained
        else "Training has degraded these models: do not use them.",
        tuple(trial.label for trial in low),
        LEARNING_RATE if trained else "",
        (lower_rate(winner.config.training.learning_rate, *LOWER_SHARES),) if trained else (),
        "Training has degraded the model:" if trained else "",
    )


def impossible_logps(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report log-probs above 0, which no probability distribution has."""
    wrong = [trial for trial in frame.trials if max(trial.last(CHOSEN) or 0.0, trial.last(REJECTED) or 0.0) > 0]
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
        tuple(trial.label for trial in wrong),
    )


REPETITION = f"{EVAL_PREFIX}repetition"
LENGTH = f"{EVAL_PREFIX}answer_length"

REPETITION_RISE = 0.2
"""Increase of the share of repeated 4-grams that is reported."""
LENGTH_GROWTH = 1.5
"""Factor of the answer length that is reported."""
MIN_LENGTH_CORRELATION = 0.3
"""Rank correlation of margin and length difference that is reported."""
EXACT_DROP = 0.05
"""Drop of the share of right answers that is reported."""


def requirements_broken(frame: SweepFrame) -> Iterator[DiagnosisFinding]:
    """Report requirements that every complete trial breaks, or that trials with a better objective break."""
    broken = [trial for trial in frame.ranked if not trial.record.keeps_requirements]
    if not broken:
        return
    if frame.eligible:
        best = frame.value(frame.eligible[0])
        better = [t for t in broken if best is not None and frame.sign * ((frame.value(t) or best) - best) > 0]
        if better:
            yield DiagnosisFinding(
                "requirements",
                FindingLevel.NOTE,
                "Trials with a better objective break a requirement",
                f"{frame.requirements_text}. With a better {frame.objective.metric} than the best trial's "
                f"{format_value(best)}: {'trial' if len(better) == 1 else 'trials'} "
                f"{', '.join(trial.label for trial in better[:_LISTED])}.",
                "Trust the requirement: the objective improved at its cost.",
                tuple(trial.label for trial in better),
            )
        return
    evidence, unmet = f"{frame.requirements_text}.", frame.broken_by_initial_model
    if unmet:
        yield DiagnosisFinding(
            "requirements",
            FindingLevel.SERIOUS,
            "No complete trial keeps every requirement, nor does the initial model",
            f"{evidence} The initial model breaks: {'; '.join(unmet)}.",
            "Values nearer to it will not keep such a bound: use another initial model or data, or set a bound that "
            "can be kept, which ranks the trials anew without training.",
        )
        return
    yield DiagnosisFinding(
        "requirements",
        FindingLevel.SERIOUS,
        "No complete trial keeps every requirement",
        evidence,
        setting=LEARNING_RATE,
        steps=present(
            lower_rate(lowest_rate(frame), *LOWER_SHARES), Advice("search values nearer to the initial model")
        ),
    )


_LISTED = 10


def exact_answers_lost(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a drop of right answers while the objective improves; as a further objective, `objective_lost` does."""
    if any(objective.metric == EXACT_ANSWERS for objective in frame.further_objectives):
        return
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
        "Raise evaluation.prompts for a narrower interval.",
        (winner.label,),
        LEARNING_RATE,
        present(
            lower_rate(winner.config.training.learning_rate, *LOWER_SHARES),
            raise_sft_weight(winner),
            Advice(f"rank by {EXACT_ANSWERS}"),
        ),
        "The objective improves at the cost of the task.",
    )


def degenerate_text(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
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
            "Read its samples before using it.",
            (winner.label,),
            LEARNING_RATE,
            present(lower_rate(winner.config.training.learning_rate, *LOWER_SHARES), raise_beta(frame, winner)),
        )


def length_bias(winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a winner whose margin correlates with length difference, more than the initial model's."""
    pairs = winner.held_out_pairs
    if pairs is None or not pairs.paired:
        return
    rho = spearman(pairs.margins, pairs.length_differences)
    initial = pairs.initial()
    before = None if initial is None else spearman(initial.margins, initial.length_differences)
    if rho is None or abs(rho) < MIN_LENGTH_CORRELATION or not is_clear_correlation(rho, len(pairs)):
        return
    if before is not None and abs(rho) < abs(before) + 0.1:
        return
    since = "" if before is None else f", {before:+.2f} before training"
    yield DiagnosisFinding(
        "length_bias",
        FindingLevel.NOTE,
        f"The winner prefers {'longer' if rho > 0 else 'shorter'} responses",
        f"Trial {winner.label}: rank correlation of margin with length difference {rho:+.2f} over {len(pairs)} "
        f"held-out pairs{since}.",
        "Compare win rates at equal length; the preference data may favor length itself.",
        (winner.label,),
    )
