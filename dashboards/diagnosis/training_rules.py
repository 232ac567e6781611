"""Rules about training: no gain over the initial model, accuracy at chance, loss plateau, overfitting."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dashboards.analysis.significance import Significance, candidate_count
from dashboards.analysis.small_samples import MIN_RECOMMENDED_PAIRS, SMALL_SAMPLE_PAIRS, pairs_needed, share_interval
from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.findings import (
    LEARNING_RATE,
    Advice,
    DiagnosisFinding,
    Direction,
    FindingLevel,
    round_count,
)
from dashboards.diagnosis.setting_steps import (
    LOSS,
    MIN_LOSS_DROP,
    LossTrend,
    fewer_updates,
    finite_curve,
    higher_rate,
    is_ruled_out,
    loss_trend,
    lower_rate,
    lowest_rate,
    present,
    train_longer,
)
from dashboards.formatting import format_signed, format_value
from orchestrator.spec.objectives import Objective
from orchestrator.study.confirmation import Interval
from trainer.metrics import EVAL_PREFIX

ACCURACY = f"{EVAL_PREFIX}accuracies/logp"
NEAR_HALF = 0.6
"""Accuracy. Where the upper end of its 95 % interval is below this, the trial counts as no better than chance."""


def worse_than_initial(frame: SweepFrame, significance: Significance) -> Iterator[DiagnosisFinding]:
    """Report that no complete trial improved the objective over the initial model; not where finalists decide it."""
    start, best = frame.initial_value(frame.objective.metric), significance.winner.record.value
    if start is None or best is None or _improved(frame, significance.winner):
        return
    if (gain := _confirmed_gain(frame)) is not None and gain.value > 0:
        return
    against = significance.against_initial
    interval = ""
    if against is not None:
        ends = f"{format_value(against.joint_low)} to {format_value(against.joint_high)}"
        interval = f" (95 % interval of the difference {ends})"
    steps, remark = _after_no_gain(frame, significance)
    yield DiagnosisFinding(
        "worse_than_start",
        FindingLevel.SERIOUS,
        f"No trial has a better {frame.objective.metric} than the initial model"
        if frame.further_objectives
        else "No trial is better than the initial model",
        f"The best of {len(frame.ranked)} complete trials has {frame.objective.metric} = {format_value(best)}; "
        f"the initial model has {format_value(start)}{interval}.",
        remark,
        (significance.winner.label,),
        LEARNING_RATE if any(step.setting == LEARNING_RATE for step in steps) else "",
        steps,
        "Do not use any of these trials.",
    )


def objective_lost(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a winner that is worse than the initial model in an objective after the first.

    Serious where another trial of the Pareto front is better in every objective.
    """
    lost = [each for each in frame.further_objectives if (_gain(frame, winner, each) or 0.0) < 0]
    if not lost:
        return
    better = [t for t in frame.pareto_front if all((_gain(frame, t, each) or 0.0) > 0 for each in frame.objectives)]
    yield DiagnosisFinding(
        "objective_lost",
        FindingLevel.SERIOUS if better else FindingLevel.WARNING,
        f"Trial {winner.label} is worse than the initial model in {', '.join(each.metric for each in lost)}",
        "; ".join(
            f"{each.metric} ({each.direction}) is {format_value(frame.objective_value(winner, each))}, the initial "
            f"model's is {format_value(frame.initial_value(each.metric))}"
            for each in lost
        )
        + ".",
        f"Trial {better[0].label} is better than the initial model in every objective."
        if better
        else "No trial of the Pareto front is better than the initial model in every objective: weigh them.",
        (winner.label,),
    )


def _gain(frame: SweepFrame, trial: TrialFrame, objective: Objective) -> float | None:
    """Return by how much the trial is better than the initial model; None where unknown."""
    start, value = frame.initial_value(objective.metric), frame.objective_value(trial, objective)
    if start is None or value is None:
        return None
    return value - start if objective.direction == "maximize" else start - value


def _after_no_gain(frame: SweepFrame, significance: Significance) -> tuple[tuple[Advice, ...], str]:
    """Return what to change where no trial gained: by how clear the loss is, and by how the held-out loss moved."""
    against, winner = significance.against_initial, significance.winner
    clear = against is None or against.is_clear
    if against is not None and not clear and against.pair_count <= SMALL_SAMPLE_PAIRS:
        few = f"{against.pair_count} held-out pair{'s are' if against.pair_count > 1 else ' is'} too few to decide"
        return (), f"{few}: hold out {MIN_RECOMMENDED_PAIRS} or more before changing anything else."
    trend = loss_trend(winner)
    if not clear and trend is not LossTrend.ROSE:
        longer = train_longer(frame)
        if trend is LossTrend.FLAT:
            return present(higher_rate(frame, winner), longer), "So far training has hardly changed the model."
        needed = None if against is None else against.pairs_needed
        more = f"hold out about {round_count(needed)} pairs" if needed else "hold out more pairs"
        return present(Advice(more), longer), "The difference is not clear on these pairs."
    check = "Check that the chosen responses are the better ones."
    if is_ruled_out(frame, LEARNING_RATE, Direction.LOWER):
        return (), check  # the lower rates that were tried are worse still
    return (lower_rate(lowest_rate(frame), 0.1, 0.3),), check


def _improved(frame: SweepFrame, winner: TrialFrame) -> bool:
    """Return whether the winner is better than the initial model; True where unknown."""
    start, best = frame.initial_value(frame.objective.metric), winner.record.value
    return start is None or best is None or frame.sign * (best - start) > 0


def _confirmed_gain(frame: SweepFrame) -> Interval | None:
    """Return the gain of the finalists' recommended configuration over the initial model; None without."""
    return None if frame.confirmation is None else frame.confirmation.gain


def confirmed_without_gain(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a gain of the search that the finalists, on rows that it has not seen, do not confirm.

    `winner`: the recommended configuration in the search.
    """
    gain, confirmation = _confirmed_gain(frame), frame.confirmation
    if gain is None or confirmation is None or (gain.value <= 0 and not _improved(frame, winner)):
        return  # without any gain in the search `worse_than_initial` reports
    if gain.value > 0 and (gain.is_clear or not confirmation.pairs):
        return
    word = "not clearly better" if gain.value > 0 else "no better"
    counted = f"{confirmation.pairs:,} held-out pairs" if confirmation.pairs else "held-out rows"
    yield DiagnosisFinding(
        "gain_not_confirmed",
        FindingLevel.WARNING if gain.value > 0 else FindingLevel.SERIOUS,
        f"The confirmed configuration is {word} than the initial model",
        f"Trial {winner.label}'s configuration, trained again: its {frame.objective.metric} on {counted} that the "
        f"search has not seen is {format_signed(gain.value)} better than the initial model's (95 % interval "
        f"{format_signed(gain.low)} to {format_signed(gain.high)}).",
        trials=(winner.label,),
        steps=present(Advice("hold out more pairs"), train_longer(frame)),
        lead="" if gain.value > 0 else "What the search gained was luck on its rows.",
    )


def gain_not_clear(frame: SweepFrame, significance: Significance) -> Iterator[DiagnosisFinding]:
    """Report a gain over the initial model that is not significant on these held-out pairs.

    Where finalists measured it on rows that the search has not seen, `confirmed_without_gain` decides.
    """
    against = significance.against_initial
    if against is None or against.is_clear or frame.sign * against.mean <= 0 or _confirmed_gain(frame) is not None:
        return
    if not _improved(frame, significance.winner):
        return  # reported by `worse_than_initial`
    required = against.pairs_needed
    yield DiagnosisFinding(
        "gain_not_clear",
        FindingLevel.WARNING,
        "The winner is not clearly better than the initial model",
        f"Trial {significance.winner.label}: {frame.objective.metric} differs from the initial model's by "
        f"{format_value(against.mean)}, 95 % interval {format_value(against.joint_low)} to "
        f"{format_value(against.joint_high)} over {against.pair_count} held-out "
        f"{'pairs' if against.paired else 'examples, compared without pairing'}{_choice_text(frame)}.",
        trials=(significance.winner.label,),
        steps=present(
            Advice(f"hold out {f'about {round_count(required)}' if required else 'more'} pairs to confirm it"),
            train_longer(frame, "train longer so that the gain grows"),
        ),
    )


def _choice_text(frame: SweepFrame) -> str:
    count = candidate_count(frame)
    if count < 2:
        return ""
    return (
        f"; selecting the best of {count} trials on the same pairs biases this gain upwards, which the interval counts"
    )


def accuracy_at_chance(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report an accuracy that does not differ significantly from 0.5.

    Only for a winner that improved; otherwise `worse_than_initial` reports. With few pairs the finding is about the
    number of pairs.
    """
    accuracy = winner.last(ACCURACY)
    count = (
        len(winner.held_out_pairs)
        if winner.held_out_pairs is not None
        else 0
        if frame.data is None
        else frame.data.eval_rows
    )
    if accuracy is None or count == 0 or not _improved(frame, winner):
        return
    candidates = candidate_count(frame)
    low, high = share_interval(accuracy, count, candidates)
    if low > 0.5:
        return
    evidence = (
        f"Trial {winner.label}: {ACCURACY} = {format_value(accuracy)} over {count} held-out "
        f"pair{'s' if count > 1 else ''}, 95 % interval {low:.3f} to {high:.3f}"
        f"{f' for the best of {candidates} trials' if candidates > 1 else ''}; chance is 0.5."
    )
    at_chance = high < NEAR_HALF
    if not at_chance and count <= SMALL_SAMPLE_PAIRS:
        required = pairs_needed(accuracy - 0.5, 0.5, count)
        yield DiagnosisFinding(
            "few_pairs",
            FindingLevel.WARNING,
            "Too few held-out pairs to decide whether the winner's accuracy is above chance",
            evidence,
            (f"Hold out about {round_count(required)} pairs" if required else "Hold out more pairs")
            + " (data.eval_share, or a separate data.eval) before comparing the trials.",
            (winner.label,),
        )
        return
    rose = loss_trend(winner) is LossTrend.ROSE or _has_minimum_inside(finite_curve(winner, LOSS))
    steps = () if rose else present(higher_rate(frame, winner), train_longer(frame))
    yield DiagnosisFinding(
        "coin_toss",
        FindingLevel.SERIOUS if at_chance else FindingLevel.WARNING,
        f"The winner's accuracy {'is' if at_chance else 'may be'} no better than chance",
        evidence,
        f"{'If that does not help, check' if steps else 'Check'} the data: chosen and rejected may be swapped or too "
        "similar.",
        (winner.label,),
        LEARNING_RATE if any(step.setting == LEARNING_RATE for step in steps) else "",
        steps,
    )


def ties(winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report held-out pairs whose responses have exactly the same log-prob per token; they count as wrong."""
    pairs = winner.held_out_pairs
    if pairs is None or not pairs.paired:
        return
    tied = int(np.sum(pairs.margins == 0))
    if tied < max(2, 0.01 * len(pairs)):
        return
    yield DiagnosisFinding(
        "ties",
        FindingLevel.WARNING,
        "Some held-out pairs are ties, which count as wrong",
        f"Trial {winner.label}: {tied} of {len(pairs)} pairs have exactly the same log-prob per token for "
        f"both responses, so no trial can reach an accuracy above {1 - tied / len(pairs):.3f}.",
        trials=(winner.label,),
        steps=(Advice("raise data.max_length", "data.max_length", Direction.RAISE), Advice("remove those rows")),
        lead="Both responses are probably equal after truncation:",
    )


PLATEAU_FRACTION = 0.1
"""Share of the total drop. A second half with a smaller drop counts as a plateau."""
OVERFITTING_RISE = 0.1
"""Share of the total drop. A later rise by more than this counts as overfitting."""
_OVERFITTING_SHARES = (0.1, 0.3)
"""Shares of the winner's learning rate to try where it overfits."""
_MIN_EVALUATIONS = 4


def loss_plateau(frame: SweepFrame, significance: Significance) -> Iterator[DiagnosisFinding]:
    """Report a held-out loss that hardly changed, or that was flat in the second half."""
    winner = significance.winner
    curve, trend = finite_curve(winner, LOSS), loss_trend(winner)
    if trend is None or trend is LossTrend.ROSE:
        return  # a loss that only rose is reported by `overfitting`
    (_, start), (last, end) = curve[0], curve[-1]
    lowest = min(value for _, value in curve)
    if trend is LossTrend.FLAT:
        against = significance.against_initial
        gained = against is not None and against.is_clear and _improved(frame, winner)
        steps = () if gained else present(higher_rate(frame, winner), train_longer(frame))
        yield DiagnosisFinding(
            "loss_plateau",
            FindingLevel.NOTE if gained else FindingLevel.WARNING,
            "The loss hardly changed",
            f"Trial {winner.label}: held-out loss {format_value(start)} at step 0, {format_value(end)} after {last} "
            f"updates; the lowest was {format_value(lowest)}.",
            f"{frame.objective.metric} improved nevertheless." if gained else "",
            (winner.label,),
            LEARNING_RATE if any(step.setting == LEARNING_RATE for step in steps) else "",
            steps,
        )
        return
    if len(curve) < _MIN_EVALUATIONS or _has_minimum_inside(curve):
        return
    middle = min(value for step, value in curve if step <= last / 2)
    if middle - lowest < PLATEAU_FRACTION * (start - lowest):
        at = next(step for step, value in curve if value <= middle)
        fewer = fewer_updates(frame, f"compare configurations with about {at} updates, which is enough")
        yield DiagnosisFinding(
            "loss_plateau",
            FindingLevel.NOTE,
            f"The loss was flat after about {at} of {last} updates",
            f"Trial {winner.label}: held-out loss {format_value(start)} at step 0, {format_value(middle)} by update "
            f"{at}, {format_value(end)} at the end. A learning rate that decays to 0 also flattens the last updates.",
            trials=(winner.label,),
            setting=fewer.setting,
            steps=(fewer,),
        )


def overfitting(frame: SweepFrame, winner: TrialFrame) -> Iterator[DiagnosisFinding]:
    """Report a held-out loss that rose again after its minimum (overfitting), or that only rose."""
    curve = finite_curve(winner, LOSS)
    rose = loss_trend(winner) is LossTrend.ROSE
    if not rose and not _has_minimum_inside(curve):
        return
    at, lowest = min(curve, key=lambda point: point[1])
    objective = finite_curve(winner, frame.objective.metric)
    best_at, best = max(objective, key=lambda point: frame.sign * point[1]) if objective else (0, 0.0)
    fell = bool(objective) and frame.sign * (best - objective[-1][1]) > 0
    also = (
        f" {frame.objective.metric} was best at update {best_at} ({format_value(best)}) "
        f"and ended at {format_value(objective[-1][1])}."
        if fell
        else f" {frame.objective.metric} did not get worse."
        if objective
        else ""
    )
    lower = None
    if fell and not is_ruled_out(frame, LEARNING_RATE, Direction.LOWER):
        lower = lower_rate(winner.config.training.learning_rate, *_OVERFITTING_SHARES)
    steps = present(None if rose else fewer_updates(frame, f"train for about {at} updates"), lower)
    yield DiagnosisFinding(
        "overfitting",
        FindingLevel.WARNING if fell else FindingLevel.NOTE,
        "The held-out loss only rose" if rose else f"The held-out loss rose again after update {at}",
        f"Trial {winner.label}: {format_value(curve[0][1])} at step 0, "
        + ("" if rose else f"{format_value(lowest)} at update {at}, ")
        + f"{format_value(curve[-1][1])} at the end.{also}",
        "Check that the held-out pairs come from the same distribution as the training pairs." if rose else "",
        (winner.label,),
        steps[0].setting if steps else "",
        steps,
    )


def _has_minimum_inside(curve: list[tuple[int, float]]) -> bool:
    """Return whether the curve has its minimum clearly below both ends."""
    if len(curve) < _MIN_EVALUATIONS:
        return False
    start, end, lowest = curve[0][1], curve[-1][1], min(value for _, value in curve)
    return start - lowest >= MIN_LOSS_DROP * abs(start) and end - lowest > OVERFITTING_RISE * (start - lowest)
