"""No configuration is trained twice unless `repeats` asks for it; its seeds count as one trial with their mean."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.checkpoint_retention import models_to_keep
from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import MedianPruner
from orchestrator.spec.samplers import Asap, TpeSampler
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.repeats import merge_records, merge_snapshots
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, Outcome, Trial, TrialState, WaitForTrial
from tests.support.specs import GRID, METRIC, RANGES, SAMPLERS, make_spec
from trainer.results import StepMetrics

Template = Callable[[Path, SweepSpec], SweepFolder]
COMPLETE = Outcome(TrialState.COMPLETE)
PRUNED = Outcome(TrialState.PRUNED, "pruned by hand")


def value_of(trial: Trial) -> float:
    return trial.config.loss.beta / 10 + (trial.config.training.seed - 42) / 100  # type: ignore[union-attr]


def end(study: Study, trial: Trial, outcome: Outcome = COMPLETE, value: float | None = None) -> None:
    study.report(trial, [StepMetrics(1, {METRIC: value_of(trial) if value is None else value})])
    study.tell(trial, outcome)


def run(study: Study, outcome: Callable[[Trial], Outcome] = lambda _: COMPLETE) -> list[Trial]:
    out: list[Trial] = []
    while isinstance(trial := study.ask(), Trial):
        end(study, trial, outcome(trial))
        out.append(trial)
    return out


def drawn(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [(*(trial.params.get(path) for path in GRID), trial.config.training.seed) for trial in trials]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "staged"])
def test_a_finite_space_ends_once_all_points_are_tried(
    sampler: str, repeats: int, template: Template, tmp_path: Path
) -> None:
    spec = make_spec(GRID, sampler=SAMPLERS[sampler], budget=Budget(trials=30), repeats=repeats)
    with Study.open(template(tmp_path, spec)) as study:
        tried = drawn(run(study))
        assert len(set(tried)) == len(tried) == 4 * repeats
        assert study.no_more_trials_reason().startswith("all points tried: 4 of the ")
        assert [kind for kind in (e.kind for e in study.events()) if kind == "twin"] == []


def test_a_space_whose_branch_is_used_up_goes_on_in_the_others(template: Template, tmp_path: Path) -> None:
    search = {
        "loss.kind": {"choice": ["simpo", "dpo"]},
        "loss.beta": {"uniform": [1.0, 4.0], "when": {"loss.kind": "simpo"}},
    }
    spec = make_spec(search, sampler=TpeSampler(seed=1, n_startup_trials=2), budget=Budget(trials=12))
    with Study.open(template(tmp_path, spec)) as study:
        kinds = [trial.params["loss.kind"] for trial in run(study)]
    assert (len(kinds), kinds.count("dpo")) == (12, 1)


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes"])
def test_a_driver_killed_at_any_trial_goes_on_with_the_same_trials(
    sampler: str, template: Template, tmp_path: Path
) -> None:
    spec = make_spec(RANGES, sampler=SAMPLERS[sampler], budget=Budget(trials=12), repeats=3)
    with Study.open(template(tmp_path, spec)) as study:
        whole = [(t.number, dict(t.params), t.config) for t in run(study)]
    folder, dice, again = template(tmp_path, spec), random.Random(3), list[tuple[Any, ...]]()
    while len(again) < len(whole):
        with Study.open(folder) as study:
            for _ in range(dice.randint(1, 4)):
                if not isinstance(trial := study.ask(), Trial):
                    break
                if dice.random() < 0.3:  # killed before its end: issued again
                    break
                end(study, trial)
                again.append((trial.number, dict(trial.params), trial.config))
    assert again == whole


def test_the_sampler_learns_from_the_mean_and_best_is_no_lucky_seed(template: Template, tmp_path: Path) -> None:
    lucky = {(2.0, 43): 0.9}
    spec = make_spec({"loss.beta": {"choice": [2.0, 3.0]}}, repeats=3)
    with Study.open(template(tmp_path, spec)) as study:
        while isinstance(trial := study.ask(), Trial):
            beta, seed = trial.params["loss.beta"], trial.config.training.seed
            end(study, trial, value=lucky.get((beta, seed), 0.2 * beta))
        means = [trial.values for trial in merge_snapshots(study.snapshots(), spec)]
        assert means == [pytest.approx(((0.4 + 0.9 + 0.4) / 3,)), pytest.approx((0.6,))]
        best = study.best()
        assert best is not None
        assert (best.params, best.value, best.complete_seeds) == ({"loss.beta": 3.0}, pytest.approx(0.6), 3)
        assert best.interval == pytest.approx((0.6, 0.6))
        worse = merge_records(study.trials(), spec)[0]
        assert worse.number == 1, "its best seed's weights stand for it"
        assert worse.interval is not None  # mean 0.5667, standard deviation 0.2887, t(0.975, 2) = 4.3027
        assert worse.interval == pytest.approx((-0.1504, 1.2837), abs=1e-4)
        assert (best.label, best.seeds_text) == ("3-5", "mean of 3 seeds, 95% interval 0.6 to 0.6")


def test_a_listed_seed_is_no_setting_of_the_winner(template: Template, tmp_path: Path) -> None:
    search = {"loss.beta": {"choice": [2.0, 3.0]}, "training.seed": {"choice": [1, 2]}}
    values = {(2.0, 1): 0.9, (2.0, 2): 0.3, (3.0, 1): 0.7, (3.0, 2): 0.7}
    with Study.open(template(tmp_path, make_spec(search))) as study:
        running = study.ask()
        while isinstance(running, Trial):
            end(study, running, value=values[running.params["loss.beta"], running.config.training.seed])
            running = study.ask()
            best = study.best()
            assert best is not None
            if best.complete_seeds == 1:
                assert (len(study.trials()), best.params) == (2, {"loss.beta": 2.0})
        best = study.best()
        assert best is not None
        assert (best.params, best.value) == ({"loss.beta": 3.0}, pytest.approx(0.7))
        assert best.trained_params == {"loss.beta": 3.0, "training.seed": 1}


def test_a_configuration_that_waits_for_seeds_keeps_its_weights_and_does_not_win_yet(
    template: Template, tmp_path: Path
) -> None:
    spec = make_spec({"loss.beta": {"choice": [2.0, 3.0]}}, repeats=2)
    with Study.open(template(tmp_path, spec)) as study:
        for value in (0.5, 0.6):
            trial = study.ask()
            assert isinstance(trial, Trial)
            end(study, trial, value=value)
        assert [record.number for record in models_to_keep(spec, study.trials())] == [1]
        first, last = study.ask(), study.ask()
        assert isinstance(first, Trial)
        assert isinstance(last, Trial)
        end(study, first, value=0.8)
        best = study.best()
        assert best is not None
        assert best.value == pytest.approx(0.55)
        assert [record.number for record in models_to_keep(spec, study.trials())] == [1, 2]
        end(study, last, value=0.7)
        assert [record.number for record in models_to_keep(spec, study.trials())] == [2]


def test_a_pruned_seed_ends_its_configuration_where_the_next_trial_may_know(template: Template, tmp_path: Path) -> None:
    spec = make_spec({"loss.beta": {"choice": [2.0, 3.0]}}, repeats=3, order=Asap())
    with Study.open(template(tmp_path, spec)) as study:
        tried = drawn(run(study, lambda trial: PRUNED if trial.number == 0 else COMPLETE))
        assert [(beta, seed) for beta, _, seed in tried] == [(2.0, 42), (3.0, 42), (3.0, 43), (3.0, 44)]
        assert [trial.state for trial in merge_snapshots(study.snapshots(), spec)] == [
            TrialState.PRUNED,
            TrialState.COMPLETE,
        ]


def test_a_repeat_waits_for_what_decides_whether_it_is_issued(template: Template, tmp_path: Path) -> None:
    """Also where the sampler waits for nothing: with a lag of 1, repeat 1 depends on the end of repeat 0."""
    order = {"kind": "reproducible", "lag": 1}
    spec = make_spec({"loss.beta": {"choice": [2.0, 3.0]}}, repeats=2, order=order)
    with Study.open(template(tmp_path, spec)) as study:
        first = study.ask()
        assert isinstance(first, Trial)
        assert study.ask() == WaitForTrial(0)
        end(study, first, PRUNED)
        following = study.ask()
        assert isinstance(following, Trial)
        assert following.params == {"loss.beta": 3.0}


def test_a_seed_is_never_pruned_for_another_seed_of_its_configuration(template: Template, tmp_path: Path) -> None:
    pruner = MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    base = {"training": {"max_steps": 10}}
    spec = make_spec({"loss.beta": {"choice": [2.0, 3.0]}}, repeats=2, order=Asap(), pruner=pruner)
    spec = spec.model_copy(update={"base": spec.base.model_validate(spec.base.model_dump() | base)})
    with Study.open(template(tmp_path, spec)) as study:
        decisions: list[bool] = []
        for value in (0.9, 0.1, 0.1):
            trial = study.ask()
            assert isinstance(trial, Trial)
            _, decision = study.report(trial, [StepMetrics(1, {METRIC: value})])
            decisions.append(decision.stop)
            study.report(trial, [StepMetrics(10, {METRIC: value})])
            study.tell(trial, PRUNED if decision.stop else COMPLETE)
        assert decisions == [False, False, True]


def test_failed_seeds_are_left_out_of_the_mean_and_counted(template: Template, tmp_path: Path) -> None:
    failed = Outcome(TrialState.FAILED, "a bug", FailureKind.BUG)
    spec = make_spec({"loss.beta": {"choice": [2.0]}}, repeats=3)
    with Study.open(template(tmp_path, spec)) as study:
        run(study, lambda trial: failed if trial.number == 1 else COMPLETE)
        best = study.best()
        assert best is not None
        assert best.seeds_text.startswith("mean of 2 of 3 seeds, 95% interval ")


def test_enqueued_trials_are_repeated_too_and_those_by_hand_exceed_the_budget(
    template: Template, tmp_path: Path
) -> None:
    spec = make_spec(GRID, repeats=2, budget=Budget(trials=4), enqueue=({"loss.beta": 7.0},))
    with Study.open(template(tmp_path, spec)) as study:
        study.enqueue({"loss.beta": 9.0, "loss.gamma": 1.0}, "enqueued by ann", kind="enqueued")
        tried = run(study)
    assert [(t.params["loss.beta"], t.config.training.seed) for t in tried] == [
        *((9.0, 42), (9.0, 43), (7.0, 42), (7.0, 43), (2.0, 42), (2.0, 43))
    ]
