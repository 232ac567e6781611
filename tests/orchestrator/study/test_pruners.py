"""Each pruner's rule, beside Optuna's pruner of the same name where there is one."""

import math
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.pruners import BasePruner
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from orchestrator.spec.objectives import Objective
from orchestrator.spec.pruners import (
    HyperbandPruner,
    MedianPruner,
    PatientPruner,
    PercentilePruner,
    Pruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)
from orchestrator.study.pruning.pruner import TrialPruner
from orchestrator.study.pruning.pruning_rules import choose_bracket, rung_steps
from orchestrator.study.trial_records import TrialState
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.results import pack_floats, unpack_floats

METRIC = "eval_accuracies/logp"
VALUES = st.floats(0, 1).map(lambda v: round(v, 2))
CURVES = st.lists(st.lists(VALUES, min_size=1, max_size=8), min_size=1, max_size=12)
DIRECTIONS = st.sampled_from(["maximize", "minimize"])


def judge(
    pruner: Pruner, others: list[TrialSnapshot], direction: str = "maximize", updates: int | None = None
) -> TrialPruner:
    objective = Objective.model_validate({"metric": METRIC, "direction": direction})
    return TrialPruner(pruner, objective, 0, len(others), updates, others)


def complete(number: int, values: list[float]) -> TrialSnapshot:
    return TrialSnapshot(number, {}, TrialState.COMPLETE, (values[-1],), {i + 1: v for i, v in enumerate(values)})


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@given(courses=CURVES, direction=DIRECTIONS, kind=st.sampled_from(["median", "percentile", "threshold", "patient"]))
@settings(max_examples=150, deadline=None)
def test_verdicts_are_optunas(courses: list[list[float]], direction: Any, kind: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pairs: dict[str, tuple[Pruner, BasePruner]] = {
        "median": (
            MedianPruner(n_startup_trials=2, n_warmup_steps=2, n_min_trials=2),
            optuna.pruners.MedianPruner(2, 2, n_min_trials=2),
        ),
        "percentile": (
            PercentilePruner(n_startup_trials=1, percentile=30.0),
            optuna.pruners.PercentilePruner(30.0, 1, 0),
        ),
        "threshold": (ThresholdPruner(lower=0.2, upper=0.8), optuna.pruners.ThresholdPruner(0.2, 0.8)),
        "patient": (PatientPruner(patience=2, min_delta=0.1), optuna.pruners.PatientPruner(None, 2, 0.1)),
    }
    ours, theirs = pairs[kind]
    *others, own = courses
    study = optuna.create_study(direction=direction)
    for values in others:
        seen = {i + 1: v for i, v in enumerate(values)}
        study.add_trial(create_trial(state=OptunaState.COMPLETE, value=values[-1], intermediate_values=seen))
    curve: dict[int, float] = {0: 0.5}  # the initial model's, which nobody judges
    for step, value in enumerate(own, start=1):
        curve[step] = value
        trial = create_trial(state=OptunaState.RUNNING, intermediate_values={s: v for s, v in curve.items() if s > 0})
        expected = theirs.prune(study, trial)
        decision = judge(ours, [complete(i, v) for i, v in enumerate(others)], direction).prune_reason(curve, step)
        assert (decision != "") == expected, decision


@given(courses=st.lists(st.lists(VALUES, min_size=9, max_size=9), min_size=1, max_size=20), direction=DIRECTIONS)
@settings(max_examples=60, deadline=None)
def test_halving_one_trial_after_the_other_is_optunas(courses: list[list[float]], direction: Any) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    theirs = optuna.create_study(
        direction=direction, pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    )
    ours: list[TrialSnapshot] = []
    for number, values in enumerate(courses):
        trial = theirs.ask()
        curve: dict[int, float] = {}
        stopped = None
        for step, value in enumerate(values, start=1):
            curve[step] = value
            trial.report(value, step)
            reason = judge(SuccessiveHalvingPruner(rungs=(1, 3, 9)), ours, direction).prune_reason(curve, step)
            assert (reason != "") == trial.should_prune(), reason
            if reason:
                stopped = step
                break
        state = OptunaState.PRUNED if stopped else OptunaState.COMPLETE
        theirs.tell(trial, None if stopped else values[-1], state=state)
        ours.append(TrialSnapshot(number, {}, TrialState.PRUNED if stopped else TrialState.COMPLETE, curve=curve))


def test_reasons_in_words_with_the_numbers() -> None:
    others = [complete(n, [0.6, 0.6 + n / 100]) for n in range(5)]
    messages = judge(MedianPruner(), others).prune_reason({1: 0.55, 2: 0.52}, 2)
    assert messages == f"pruned at update 2: {METRIC} 0.52 (best so far 0.55) is below the median 0.62 of 5 trials"
    messages = judge(SuccessiveHalvingPruner(rungs=(2,)), others).prune_reason({2: 0.61}, 2)
    assert messages == (
        f"pruned at update 2: {METRIC} 0.61 is number 4 of 6 at the rung of 2 updates, where the best 2 continue"
    )
    messages = judge(ThresholdPruner(lower=0.5), []).prune_reason({1: 0.4}, 1)
    assert messages == f"pruned at update 1: {METRIC} 0.4 is below the bound 0.5"
    messages = judge(PatientPruner(patience=1), []).prune_reason({1: 0.7, 2: 0.5, 3: 0.6}, 3)
    assert (
        messages
        == f"pruned at update 3: the best {METRIC} of the last 2 evaluations, 0.6, is not as good as 0.7 before them"
    )


@pytest.mark.parametrize("kind", ["median", "successive_halving", "threshold"])
def test_a_value_that_is_no_number_ends_a_trial(kind: str) -> None:
    pruners: dict[str, Pruner] = {
        "median": MedianPruner(n_startup_trials=1),
        "successive_halving": SuccessiveHalvingPruner(rungs=(1,)),
        "threshold": ThresholdPruner(lower=0.0),
    }
    others = [complete(0, [0.5]), complete(1, [math.nan])]
    assert "is not a number" in judge(pruners[kind], others).prune_reason({1: math.nan}, 1)
    assert judge(pruners[kind], others).prune_reason({1: 0.9}, 1) == ""


def test_shares_of_the_training_are_of_each_trials_own_length() -> None:
    long = TrialSnapshot(0, {}, TrialState.COMPLETE, curve={50: 0.6, 100: 0.9}, updates=200)
    pruner = SuccessiveHalvingPruner(rungs=(0.25,), reduction_factor=2)
    assert judge(pruner, [long], updates=100).prune_reason({25: 0.55}, 25) != ""
    assert judge(pruner, [long], updates=100).prune_reason({25: 0.65}, 25) == ""
    assert judge(pruner, [long], updates=100).prune_reason({20: 0.1}, 20) == ""
    assert judge(pruner, [long], updates=None).prune_reason({25: 0.55}, 25) == "", "nobody knows where the rung is"


def test_nobody_is_stopped_at_the_start_or_at_the_end() -> None:
    others = [complete(n, [0.9, 0.9]) for n in range(6)]
    assert judge(MedianPruner(), others).prune_reason({0: 0.1}, 0) == ""
    assert judge(MedianPruner(), others, updates=2).prune_reason({1: 0.95, 2: 0.1}, 2) == ""
    assert judge(ThresholdPruner(lower=0.5), [], updates=2).prune_reason({2: 0.1}, 2) == ""


def test_hyperbands_brackets_have_optunas_shares() -> None:
    assert rung_steps(0.1, 3, None) == [0.1, pytest.approx(0.3)]
    assert rung_steps(1, 3, 81) == [1, 3, 9, 27]
    assert rung_steps(10, 3, 8) == []
    counts = [0, 0, 0]
    for number in range(1700):
        counts[choose_bracket(number, 3, 3, seed=4)] += 1
    assert [round(count / 100) for count in counts] == [9, 5, 3]
    others = [complete(n, [0.9, 0.9, 0.9]) for n in range(30)]
    decisions = {
        number: TrialPruner(
            HyperbandPruner(min_resource=1), Objective(metric=METRIC, direction="maximize"), 4, number, 9, others
        )
        for number in range(30, 60)
    }
    stopped = {n: j.prune_reason({1: 0.1}, 1) != "" for n, j in decisions.items()}
    assert stopped == {n: choose_bracket(n, 3, 3, seed=4) == 0 for n in stopped}


def test_the_paired_test_sees_what_lies_below_the_noise_between_pairs() -> None:
    chance = np.random.default_rng(0)
    hardness = chance.normal(0, 2.0, 300)
    theirs = hardness + chance.normal(0, 0.1, 300)
    others = [complete(0, [0.6, 0.7]), complete(1, [0.6, 0.65])]
    rival = (0, {2: pack_floats(theirs)})
    objective = Objective(metric="eval_margins/logp", direction="maximize")

    def decision(mine: Any, step: int = 2, pruner: Any = None) -> str:
        chosen = pruner or WilcoxonPruner(n_warmup_steps=0)
        return TrialPruner(chosen, objective, 0, 2, 10, others, rival).prune_reason(
            {1: 0.0, step: 0.0}, step, pack_floats(mine)
        )

    worse = decision(hardness - 0.05 + chance.normal(0, 0.1, 300))
    assert worse.startswith("pruned at update 2: worse than trial 0 pair by pair: a smaller margin of log-probs on ")
    assert " of 300 held-out pairs (signed-rank test, p = " in worse
    assert decision(hardness + 0.05) == ""
    assert decision(theirs) == ""
    assert decision(hardness - 5, step=3) == "", "the best one was not evaluated there"
    assert decision(hardness - 5, pruner=WilcoxonPruner()) == "", "half of the training comes first"
    assert "is not a number" in decision([math.nan] * 300)


def test_the_paired_test_is_optunas() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chance = np.random.default_rng(1)
    for shift in (-0.5, -0.1, -0.03, 0.0, 0.1):
        theirs = chance.normal(0, 1, 60)
        mine = theirs + shift + chance.normal(0, 0.5, 60)
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.WilcoxonPruner(p_threshold=0.1))
        study.add_trial(create_trial(value=float(np.mean(theirs)), intermediate_values=dict(enumerate(theirs))))
        trial = study.ask()
        for path, value in enumerate(mine):
            trial.report(float(value), path)
        rival = (0, {1: pack_floats(theirs)})
        objective = Objective(metric="eval_margins/logp", direction="maximize")
        ours = TrialPruner(WilcoxonPruner(n_warmup_steps=0), objective, 0, 1, 9, [complete(0, [1.0])], rival)
        assert (ours.prune_reason({1: 0.0}, 1, pack_floats(mine)) != "") == trial.should_prune(), shift


def test_what_is_known_of_pairs_survives_as_text() -> None:
    assert unpack_floats(pack_floats([])) == []
    assert unpack_floats(pack_floats([0.5, -2.25, 1e30])) == [0.5, -2.25, pytest.approx(1e30)]
