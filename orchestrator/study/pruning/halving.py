"""Successive halving and Hyperband as pure functions of the view.

Optuna's pruners of these names keep rung values and brackets in system attributes and decide by who came first. Here a
trial's value at a rung is read from its course (its first evaluation at or after the rung), the competitors are those
the trial may know, and its bracket follows from seed and number; the rule is theirs: at a rung the best
max(1, n // reduction_factor) of the n values, its own included, go on. ASHA: Li et al. 2020, arXiv:1810.05934.
Brackets: Hyperband, Li et al. 2018, arXiv:1603.06560.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from orchestrator.spec.pruners import HyperbandPruner, SuccessiveHalvingPruner
from orchestrator.study.knowing import Known
from orchestrator.study.pruning.course import Course, at_update, show
from orchestrator.study.sampling.seeds import stable_seed

Amounts = Sequence[float]


def successive_halving(config: SuccessiveHalvingPruner, own: Course, others: Iterable[Known]) -> str:
    """Why the trial stops; empty: it goes on."""
    rungs = config.rungs or rungs_of(config.min_resource, config.reduction_factor, own.updates)
    return _judge(own, lambda: others, rungs, config.reduction_factor, "")


def hyperband(config: HyperbandPruner, own: Course, others: Iterable[Known], seed: int) -> str:
    """Successive halving among the trials of the same bracket; bracket b skips the first b rungs."""
    rungs = rungs_of(config.min_resource, config.reduction_factor, own.updates)
    brackets = len(rungs) + 1
    mine = bracket(own.number, brackets, config.reduction_factor, seed)

    def same() -> list[Known]:
        return [t for t in others if bracket(t.number, brackets, config.reduction_factor, seed) == mine]

    return _judge(own, same, rungs[mine:], config.reduction_factor, f" in bracket {mine}")


def rungs_of(least: float, factor: int, updates: int | None) -> list[float]:
    """least, least * factor, ...: all but the last that fits into the run, which is its end."""
    whole = 1.0 if least < 1 else updates
    if whole is None:
        return []
    count = math.floor(math.log(whole / least, factor) + 1e-9) if whole > least else 0
    return [least * factor**k for k in range(count)]


def bracket(number: int, brackets: int, factor: int, seed: int) -> int:
    """The trial's bracket, drawn by Hyperband's shares: the more rungs a bracket has, the more trials it gets."""
    shares = [math.ceil(brackets * factor**more / (more + 1)) for more in reversed(range(brackets))]
    place = stable_seed(seed, number) % sum(shares)
    for mine, share in enumerate(shares):
        if place < share:
            return mine
        place -= share
    raise AssertionError("a place below the sum lies in a share")


def at_rung(course: Mapping[int, float], rung: int) -> tuple[int, float] | None:
    """The first evaluation at or after the rung."""
    step = min((s for s in course if s >= rung), default=None)
    return None if step is None else (step, course[step])


def _judge(own: Course, others: Callable[[], Iterable[Known]], rungs: Amounts, factor: int, where: str) -> str:
    for amount in rungs:
        rung = at_update(amount, own.updates)
        reached = None if rung is None else at_rung(own.values, rung)
        if reached is None or reached[0] != own.step:
            continue  # not there yet, or judged there before
        if math.isnan(own.value):
            return own.reason(f"{own.goal.metric} is not a number")
        theirs = [value for trial in others() if (value := _value(trial, amount)) is not None]
        better = sum(own.is_worse(own.value, value) for value in theirs)
        count = len(theirs) + 1
        go_on = max(1, count // factor)
        if better >= go_on:
            place = f"{own.goal.metric} {show(own.value)} is number {better + 1} of {count}{where}"
            on = "the best one goes on" if go_on == 1 else f"the best {go_on} go on"
            return own.reason(f"{place} at the rung of {rung} updates, where {on}")
    return ""


def _value(trial: Known, amount: float) -> float | None:
    """What a competitor had at the rung; None where it did not get there, or with a value that is no number."""
    rung = at_update(amount, trial.updates)
    found = None if rung is None else at_rung(trial.course, rung)
    return None if found is None or math.isnan(found[1]) else found[1]
