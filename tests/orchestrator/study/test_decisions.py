"""The contract of every sampler and every pruner: the same sweep, whoever finishes first and however often it dies."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks.curves import SEARCH, CurveSimulator
from benchmarks.simulation import SimulatedSweep, simulate
from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import (
    HyperbandPruner,
    MedianPruner,
    NoPruner,
    Pruner,
    SuccessiveHalvingPruner,
    WilcoxonPruner,
)
from orchestrator.spec.samplers import Asap, GridSampler, RandomSampler, Reproducible, Sampler, TpeSampler
from orchestrator.spec.sweep_spec import Budget, Objective, SweepSpec
from orchestrator.study.sampling.sampling_policy import SamplingPolicy
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState, WaitForTrial
from orchestrator.study.trial_snapshots import TrialSnapshot
from tests.support.metrics import COMPLETE, bug
from tests.support.specs import METRIC, PRUNERS, SAMPLERS, make_spec
from trainer.results import StepMetrics

LISTS = {
    "training.learning_rate": {"choice": [3e-7, 1e-6, 3e-6]},
    "loss.beta": {"choice": [2.0, 5.0]},
    "loss.gamma_beta_ratio": {"choice": [0.3, 0.5]},
}
CONDITIONAL = {
    "loss.kind": {"choice": ["simpo", "dpo"]},
    "loss.gamma_beta_ratio": {"uniform": [0.0, 1.0], "step": 0.1, "when": {"loss.kind": "simpo"}},
    "training.learning_rate": {"log_uniform": [1e-7, 1e-5]},
    "loss.beta": {"uniform": [1.0, 10.0]},
}


def test_every_sampler_and_pruner_is_under_this_contract() -> None:
    assert {type(sampler) for sampler in SAMPLERS.values()} == set(get_args(get_args(Sampler)[0]))
    # Wilcoxon compares held-out pairs, which these curves have not: test_pruners.py.
    assert {type(pruner) for pruner in PRUNERS.values()} == set(get_args(get_args(Pruner)[0])) - {WilcoxonPruner}


def spec_of(sampler: Sampler, pruner: Pruner, search: Any = None, **more: Any) -> SweepSpec:
    chosen = LISTS if isinstance(sampler, GridSampler) else SEARCH if search is None else search
    return make_spec(chosen, sampler=sampler, pruner=pruner, **({"budget": Budget(trials=12)} | more))


def world(number: int, params: Any) -> Any:
    return CurveSimulator(3, "heavy-tailed")(number, {"loss.gamma_beta_ratio": 0.5} | dict(params))


def ran(spec: SweepSpec, slots: int, lag: int | None = 4) -> SimulatedSweep:
    return simulate(spec, world, slots=slots, lag=lag, trials=spec.budget.trials or 99)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_slots_gives_the_same_trials(sampler: str) -> None:
    spec = spec_of(SAMPLERS[sampler], HyperbandPruner(), budget=Budget(trials=14))
    one, two, four = (ran(spec, slots) for slots in (1, 2, 4))
    assert one.table == two.table == four.table
    assert any(trial.state is TrialState.COMPLETE for trial in one.trials)
    if sampler not in ("grid", "staged"):
        assert len({trial.fingerprint for trial in one.trials}) == 14


@pytest.mark.parametrize("pruner", PRUNERS)
def test_any_number_of_slots_gives_the_same_verdicts(pruner: str) -> None:
    spec = spec_of(RandomSampler(seed=5), PRUNERS[pruner], budget=Budget(trials=40))
    one, two, four = (ran(spec, slots) for slots in (1, 2, 4))
    assert one.table == two.table == four.table
    pruned = [t for t in one.trials if t.state is TrialState.PRUNED and not t.diverged]
    assert (pruned != []) == (pruner != "none")
    assert all(
        one.reasons[t.number].startswith(f"pruned at update {max(t.curve)}: {METRIC}")
        or "best" in one.reasons[t.number]
        for t in pruned
    )
    assert all(max(t.curve) < 400 for t in pruned), "a trial that reached its end is complete"


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii", "random", "qmc", "staged"])
def test_conditional_leaves_too(sampler: str) -> None:
    spec = spec_of(SAMPLERS[sampler], MedianPruner(n_startup_trials=2), CONDITIONAL)
    one, three = ran(spec, 1), ran(spec, 3)
    assert one.table == three.table
    assert {("loss.gamma_beta_ratio" in t.params) == (t.params["loss.kind"] == "simpo") for t in one.trials} == {True}


def test_asap_never_waits_and_may_differ() -> None:
    spec = spec_of(TpeSampler(n_startup_trials=3), SuccessiveHalvingPruner(), order=Asap(), budget=Budget(trials=30))
    asap = ran(spec, 4, lag=None)
    assert asap.idle == 0
    assert asap.table != ran(spec, 1, lag=None).table
    assert asap.table == ran(spec, 4, lag=None).table, "with the same clock it is the same"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_trial_and_no_trial(sampler: str) -> None:
    policy = SamplingPolicy(spec_of(SAMPLERS[sampler], NoPruner()), 2)
    first = policy.sample([])
    assert policy.sample([]) == first
    assert policy.blocking_trial([]) is None
    second = policy.sample(
        [TrialSnapshot(0, first.params, fingerprint=first.fingerprint, sampler_note=first.sampler_note)]
    )
    assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsgaii"])
def test_a_sampler_that_learns_finds_better_trials_than_chance(sampler: str) -> None:
    def value(trial: TrialSnapshot) -> float:
        rate = math.log10(trial.params["training.learning_rate"]) + 6
        return (
            -(rate**2)
            - 0.05 * (trial.params["loss.beta"] - 4) ** 2
            - (trial.params["loss.gamma_beta_ratio"] - 0.3) ** 2
        )

    def mean_of_late_ones(config: Sampler) -> float:
        policy, trials = SamplingPolicy(spec_of(config, NoPruner()), 2), list[TrialSnapshot]()
        for number in range(45):
            sampled = policy.sample(trials)
            trial = TrialSnapshot(
                number,
                sampled.params,
                TrialState.COMPLETE,
                sampler_note=sampled.sampler_note,
                fingerprint=sampled.fingerprint,
            )
            trials.append(replace(trial, values=(value(trial),)))
        return sum(t.values[0] for t in trials[30:] if t.values) / 15

    assert mean_of_late_ones(SAMPLERS[sampler]) > mean_of_late_ones(RandomSampler()) / 2  # values are negative


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsgaii"])
def test_diverged_failed_and_strange_trials_do_no_harm(sampler: str) -> None:
    policy, trials = SamplingPolicy(spec_of(SAMPLERS[sampler], NoPruner()), 1), list[TrialSnapshot]()
    for number in range(12):
        sampled = policy.sample(trials)
        trial = TrialSnapshot(
            number, sampled.params, sampler_note=sampled.sampler_note, fingerprint=sampled.fingerprint
        )
        ends: list[TrialSnapshot] = [
            replace(trial, state=TrialState.PRUNED, values=(-math.inf,), diverged=True, curve={3: math.nan}),
            replace(trial, state=TrialState.FAILED),
            replace(trial, state=TrialState.PRUNED, values=None),
            replace(trial, state=TrialState.COMPLETE, values=(0.5 + number / 100,), curve={5: 0.6}),
            replace(trial, state=TrialState.COMPLETE, values=(0.9,), params={**trial.params, "loss.beta": 77.0}),
        ]
        trials.append(ends[number % 5])
    assert policy.sample(trials) is not None


def through_the_study(folder: SweepFolder, spec: SweepSpec, slots: int, seed: int, *, kills: bool) -> list[str]:
    """Drive the study with workers that finish in a random order and a driver that dies at random."""
    chance, study = random.Random(seed), Study.open(folder)
    live: dict[int, tuple[Trial, int]] = {}
    while True:
        if kills and chance.random() < 0.08:
            study.dispose()
            study = Study.open(folder)
            live.clear()
        claimed: Trial | WaitForTrial | None = None
        if len(live) < slots:
            claimed = study.ask()
            if isinstance(claimed, Trial):
                live[claimed.number] = (claimed, 0)
                continue
            assert claimed is None or live, "waiting for a trial that nobody runs"
        if not live:
            break
        number = chance.choice(sorted(live))
        trial, path = live[number]
        curve = world(number, trial.params)
        steps = sorted(curve.values)[3::4]  # evaluations cost a transaction each
        step_metrics = steps[path]
        value = curve.values[step_metrics]
        loss = math.nan if math.isnan(value) else 0.5
        metrics = {"loss": loss} if math.isnan(value) else {METRIC: value, "loss": loss}
        _, decision = study.report(trial, [StepMetrics(step_metrics, metrics)])
        if kills and chance.random() < 0.05:
            assert study.report(trial, [StepMetrics(step_metrics, metrics)])[1] == decision, "asked twice, said twice"
        if decision.stop:
            study.tell(trial, Outcome(TrialState.PRUNED, decision.reason, diverged=math.isnan(value)))
        elif step_metrics == steps[-1]:
            study.tell(trial, bug("late") if number == 2 else COMPLETE)
        else:
            live[number] = (trial, path + 1)
            continue
        del live[number]
    rows = [(t.number, dict(t.params), t.state, t.reason, t.values, t.diverged) for t in study.trials()]
    reported = [study.metric_history(number) for number in range(len(rows))]
    study.dispose()
    return [*map(repr, rows), repr(reported)]  # NaN is like NaN


SWEEPS = {
    "tpe hyperband": (SAMPLERS["tpe"], HyperbandPruner()),
    "cmaes median": (SAMPLERS["cmaes"], MedianPruner(n_startup_trials=2)),
    "nsgaii none": (SAMPLERS["nsgaii"], NoPruner()),
    "staged halving": (SAMPLERS["staged"], SuccessiveHalvingPruner()),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_killed_and_reopened_it_is_the_same_sweep(
    tmp_path: Path, template: Callable[[Path, SweepSpec], SweepFolder], name: str
) -> None:
    sampler, pruner = SWEEPS[name]
    spec = spec_of(sampler, pruner, order=Reproducible(lag=4), budget=Budget(trials=10))
    spec = spec.model_copy(
        update={
            "base": spec.base.model_copy(update={"training": spec.base.training.model_copy(update={"max_steps": 400})})
        }
    )
    quiet = through_the_study(template(tmp_path / "a", spec), spec, 1, 0, kills=False)
    assert through_the_study(template(tmp_path / "b", spec), spec, 3, 1, kills=True) == quiet
    assert len(quiet) == 10 + 1


def test_several_goals_give_a_front(tmp_path: Path, template: Callable[[Path, SweepSpec], SweepFolder]) -> None:
    also = (Objective(metric="eval_nll_loss", direction="minimize"),)
    spec = spec_of(TpeSampler(n_startup_trials=2), NoPruner(), also=also, budget=Budget(trials=5))
    values = [(0.5, 1.0), (0.6, 2.0), (0.55, 3.0), (0.6, 1.5), (math.nan, 1.0)]
    with Study.open(template(tmp_path, spec)) as study:
        for accuracy, nll in values:
            trial = study.ask()
            assert isinstance(trial, Trial)
            study.report(trial, [StepMetrics(1, {METRIC: accuracy, "eval_nll_loss": nll})])
            study.tell(trial, COMPLETE)
        records = study.trials()
        assert [r.values for r in records[:4]] == values[:4]
        assert records[4].state is TrialState.FAILED
        assert [r.number for r in study.pareto_front()] == [3, 0]
        assert study.best().number == 3
