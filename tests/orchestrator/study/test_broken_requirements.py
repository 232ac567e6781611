"""A trial that breaks a requirement is never the best: ranking, samplers and stages under kills, seeds and fronts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.checkpoint_retention import models_to_keep
from orchestrator.errors import NoTrialCompleted, SpecChanged
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.pruners import MedianPruner, WilcoxonPruner
from orchestrator.spec.requirements import Requirement
from orchestrator.spec.samplers import Asap, StagedSampler, TpeSampler
from orchestrator.spec.sweep_spec import Budget, Objective, SweepSpec
from orchestrator.study.repeats import rank_configurations
from orchestrator.study.sampling.warm_start import warm_start
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import SweepTerms
from orchestrator.study.trial_records import Outcome, Trial, requirements_text
from tests.support.metrics import COMPLETE, DIVERGED, bug
from tests.support.specs import BASE, GRID, METRIC, PRUNERS, RANGES, SAMPLERS, make_spec
from trainer.results import StepMetrics

Template = Callable[[Path, SweepSpec], SweepFolder]
ANSWERS, REPETITION = "eval_exact_answers", "eval_repetition"
KEEP = Requirement.parse(ANSWERS, ">= initial")
INITIAL = {METRIC: 0.5, ANSWERS: 0.39, REPETITION: 0.0}


def end(study: Study, trial: Trial, outcome: Outcome = COMPLETE, **metrics: float) -> None:
    named = {"value": METRIC, "answers": ANSWERS, "repetition": REPETITION, "margin": "eval_margins/logp"}
    last = {named[name]: value for name, value in metrics.items()}
    start = [] if trial.fork is not None else [StepMetrics(0, INITIAL)]
    study.report(trial, [*start, StepMetrics(10, last)])
    study.tell(trial, outcome)


def claimed(study: Study) -> Trial:
    trial = study.ask()
    assert isinstance(trial, Trial)
    return trial


def test_the_best_trial_keeps_every_requirement_whatever_others_reach(template: Template, tmp_path: Path) -> None:
    spec = make_spec(5, require=(KEEP, Requirement.parse(REPETITION, "<= 0.1")), keep_models=2)
    with Study.open(template(tmp_path, spec)) as study:
        end(study, claimed(study), value=0.9, answers=0.25, repetition=0.0)
        assert study.best() is None
        assert [r.number for r in models_to_keep(spec, study.trials())] == [0], "so far nothing is better"
        end(study, claimed(study), value=0.95, answers=0.30, repetition=0.3)
        end(study, claimed(study), value=0.6, answers=0.39, repetition=0.1)
        end(study, claimed(study), value=0.7, answers=0.45, repetition=0.0)
        end(study, claimed(study), DIVERGED, value=0.99, answers=0.5, repetition=0.0)
        ranked = study.ranked()
        assert [record.number for record in ranked] == [3, 2, 0, 1]
        assert study.best() == ranked[0]
        assert ranked[3].breaks == ("eval_exact_answers 0.3 < 0.39", "eval_repetition 0.3 > 0.1")
        assert [r.number for r in models_to_keep(spec, study.trials())] == [3, 2]
        text = "2 of 4 complete trials break a requirement and cannot be the best: "
        assert requirements_text(ranked) == (
            f"{text}eval_exact_answers >= initial: trials 0, 1; eval_repetition <= 0.1: trial 1"
        )
        number = ranked[2].number
    with Study.open(SweepFolder(tmp_path, "s"), read_only=True) as again:
        assert again.ranked() == ranked, "as stored"
        (stored,) = [t for t in again._frozen() if t.number == number]
        by_name = {"eval_exact_answers >= initial": 0.14, "eval_repetition <= 0.1": -0.1}
        assert stored.constraints == pytest.approx(by_name), "where Optuna's own tools find them"


def test_where_none_keeps_them_none_is_the_best_and_the_nearest_is_named(template: Template, tmp_path: Path) -> None:
    spec = make_spec(3, require=(KEEP,), budget=Budget(trials=3, target=0.7))
    with Study.open(template(tmp_path, spec)) as study:
        assert str(study.no_best()) == "no trial of s has completed yet"
        for value, answers in ((0.9, 0.2), (0.6, 0.3), (0.8, 0.1)):
            end(study, claimed(study), value=value, answers=answers)
        assert study.best() is None
        assert study.pareto_front() == []
        assert "reached the target" not in study.no_more_trials_reason()
        assert [record.number for record in study.ranked()] == [1, 0, 2]
        with pytest.raises(NoTrialCompleted, match=r"nearest is trial 1 \(eval_exact_answers 0.3 < 0.39\)") as caught:
            raise study.no_best()
        assert str(caught.value).startswith("s: none of the 3 complete trials keeps every requirement, so none is the ")
        assert str(caught.value).endswith("broken: eval_exact_answers >= initial: trials 0, 1, 2")


def test_a_sweep_of_one_trial_has_its_best_or_none(template: Template, tmp_path: Path) -> None:
    for answers, best in ((0.38, None), (0.39, 0)):
        spec = make_spec(1, require=(KEEP,), description=str(answers))
        with Study.open(template(tmp_path, spec)) as study:
            end(study, claimed(study), value=0.9, answers=answers)
            found = study.best()
            assert (None if found is None else found.number) == best


def test_the_front_holds_trials_that_keep_the_requirements_only(template: Template, tmp_path: Path) -> None:
    also = Objective(metric="eval_margins/logp", direction="maximize")
    spec = make_spec(4, also=(also,), require=(KEEP,))
    with Study.open(template(tmp_path, spec)) as study:
        for value, margin, answers in ((0.9, 0.9, 0.2), (0.8, 0.1, 0.4), (0.6, 0.5, 0.4), (0.5, 0.4, 0.4)):
            end(study, claimed(study), value=value, margin=margin, answers=answers)
        assert [record.number for record in study.pareto_front()] == [1, 2]
        assert [record.number for record in study.ranked()] == [1, 2, 3, 0]
        assert study.best() == study.ranked()[0]


def test_of_several_seeds_the_mean_counts_and_missing_seeds_do_not_excuse(template: Template, tmp_path: Path) -> None:
    spec = make_spec({"loss.beta": {"choice": [1.0, 2.0, 4.0]}}, repeats=2, require=(KEEP,))
    answers = {(1.0, 42): 0.30, (1.0, 43): 0.50, (2.0, 42): 0.30, (2.0, 43): 0.40, (4.0, 42): 0.45}
    with Study.open(template(tmp_path, spec)) as study:
        while isinstance(trial := study.ask(), Trial):
            beta, seed = trial.config.loss.beta, trial.config.training.seed  # type: ignore[union-attr]
            if (beta, seed) in answers:
                end(study, trial, value=0.5 + beta / 10 if beta < 4 else 0.5, answers=answers[beta, seed])
            else:
                study.tell(trial, bug("KeyError: x"))
        ranked = rank_configurations(study.trials(), spec)
        assert [record.params["loss.beta"] for record in ranked] == [1.0, 4.0, 2.0]
        assert ranked[2].breaks == ("eval_exact_answers 0.35 < 0.39",)
        assert study.best() == ranked[0]


def test_a_retried_trial_is_measured_anew(template: Template, tmp_path: Path) -> None:
    with Study.open(template(tmp_path, make_spec(1, require=(KEEP,)))) as study:
        end(study, claimed(study), bug("KeyError: x"), value=0.9, answers=0.1)
        study.retry_failed([0], "again")
        again = claimed(study)
        assert study.trial(0).violations == {}  # type: ignore[union-attr]
        end(study, again, value=0.9, answers=0.5)
        assert study.best().number == 0  # type: ignore[union-attr]


# --- samplers --------------------------------------------------------------------------------------------------------


def outcome_of(params: Mapping[str, Any]) -> dict[str, float]:
    """The objective rises with beta, and the right answers fall below the initial model's beyond beta 2."""
    return {"value": 0.5 + params["loss.beta"] / 10, "answers": 0.39 + (2.0 - params["loss.beta"]) / 10}


def searched(spec: SweepSpec, folder: SweepFolder, *, killed: bool) -> list[tuple[Any, ...]]:
    """Run a sweep; `killed`: every driver ends with a trial issued, and the next one begins it again."""
    Study.create(folder, spec).dispose()
    while True:
        with Study.open(folder) as study:
            while isinstance(trial := study.ask(), Trial):
                if killed and trial.attempt == 1:
                    break
                outcome = DIVERGED if trial.number == 5 else COMPLETE
                end(study, trial, outcome, **outcome_of(trial.params))
            else:
                records = study.trials()
                return [(r.number, dict(r.params), r.state, r.values, dict(r.violations)) for r in records]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii", "cmaes"])
def test_samplers_use_the_requirements_and_kills_change_nothing(sampler: str, fast_tmp_path: Path) -> None:
    spec = make_spec(RANGES, sampler=SAMPLERS[sampler], budget=Budget(trials=14), require=(KEEP,))
    straight = searched(spec, SweepFolder(fast_tmp_path, "s"), killed=False)
    assert searched(spec, SweepFolder(fast_tmp_path / "killed", "s"), killed=True) == straight
    free = spec.model_copy(update={"require": ()})
    without = searched(free, SweepFolder(fast_tmp_path / "without", "s"), killed=False)
    late = [[params["loss.beta"] for _, params, *_ in trials[7:]] for trials in (straight, without)]
    assert sum(late[0]) < sum(late[1]), "the sampler moves to the values that keep the requirement"
    assert [row[4] == {} for row in straight] == [row[0] == 5 for row in straight]
    assert all(row[4] == {} for row in without)


def test_the_next_stage_begins_at_a_trial_that_keeps_the_requirements(template: Template, tmp_path: Path) -> None:
    search = {"loss.beta": {"choice": [1.0, 2.0, 4.0]}, "training.learning_rate": {"choice": [1e-7, 1e-6]}}
    staged = StagedSampler(stages=(("loss.beta",), ("training.learning_rate",)))
    spec = make_spec(search, sampler=staged, require=(KEEP,))
    with Study.open(template(tmp_path, spec)) as study:
        while isinstance(trial := study.ask(), Trial):
            end(study, trial, **outcome_of({"loss.beta": 1.0} | dict(trial.params)))
        first, second = study.ranked()[0], study.trials()[-1]
        assert first.params["loss.beta"] == second.params["loss.beta"] == 2.0


def test_trials_of_another_sweep_are_measured_by_this_sweeps_requirements(fast_tmp_path: Path) -> None:
    other = make_spec(RANGES, name="other", sampler=TpeSampler(seed=1), budget=Budget(trials=4))
    folder = SweepFolder(fast_tmp_path, "other")
    with Study.create(folder, other) as study:
        folder.spec.write_text(dump_spec(other), encoding="utf-8")
        while isinstance(trial := study.ask(), Trial):
            end(study, trial, **outcome_of(trial.params))
    spec = other.model_copy(update={"name": "s", "warm_start": "other", "require": (KEEP,)})
    taken = warm_start(spec, fast_tmp_path).trials
    expected = [pytest.approx({KEEP.name: (trial.params["loss.beta"] - 2.0) / 10}) for trial in taken]
    assert [dict(trial.violations) for trial in taken] == expected
    with Study.create(SweepFolder(fast_tmp_path, "s"), spec, warm_start_trials=taken) as study:
        assert [trial.violations for trial in study.terms.warm_start_trials] == [t.violations for t in taken]


# --- pruners ---------------------------------------------------------------------------------------------------------

LONG = {**BASE, "training": {"max_steps": 100}}


def verdict(folder: SweepFolder, spec: SweepSpec, answers: list[float], *, killed: bool = False) -> tuple[int, str]:
    """Report answers every ten updates; `killed`: a new driver reports everything again after each evaluation."""
    Study.create(folder, spec).dispose()
    points = [StepMetrics(0, INITIAL)]
    points += [StepMetrics(10 * k, {METRIC: 0.5 + k / 50, ANSWERS: a}) for k, a in enumerate(answers, start=1)]
    while True:
        with Study.open(folder) as study:
            trial = claimed(study)
            upto = len(points) if not killed else min(trial.attempt + 1, len(points))
            counted, decision = study.report(trial, points[:upto])
            if decision.stop or upto == len(points):
                return counted[-1].step, decision.reason


@pytest.mark.parametrize("pruner", [*PRUNERS, "wilcoxon"])
def test_pruners_stop_a_trial_that_moves_away_from_its_bound(pruner: str, fast_tmp_path: Path) -> None:
    chosen = WilcoxonPruner() if pruner == "wilcoxon" else PRUNERS[pruner]
    spec = make_spec(GRID, base=LONG, pruner=chosen, require=(KEEP,))
    away = [0.30, 0.20, 0.20, 0.10]
    straight = verdict(SweepFolder(fast_tmp_path, "s"), spec, away)
    if pruner == "none":
        assert straight == (40, ""), "without a pruner every trial runs to its end"
        return
    assert straight == (
        30,
        "pruned at update 30: it breaks the requirement eval_exact_answers >= initial (eval_exact_answers 0.2 < 0.39), "
        "farther from it at each of 3 evaluations or as far",
    )
    assert verdict(SweepFolder(fast_tmp_path / "killed", "s"), spec, away, killed=True) == straight


@pytest.mark.parametrize(
    ("answers", "stopped"),
    [
        ([0.30, 0.20, 0.25, 0.20, 0.22], False),
        ([0.20, 0.20, 0.20, 0.20, 0.20], False),
        ([0.30, 0.20, 0.39, 0.30, 0.20], False),
        ([0.50, 0.38, 0.37, 0.36, 0.35], True),
    ],
)
def test_what_comes_nearer_stays_as_far_or_keeps_it_meanwhile_continues(
    answers: list[float], stopped: bool, fast_tmp_path: Path
) -> None:
    spec = make_spec(GRID, base=LONG, pruner=MedianPruner(), require=(KEEP,))
    assert (verdict(SweepFolder(fast_tmp_path, "s"), spec, answers)[1] != "") == stopped
    off = spec.model_copy(update={"pruner": MedianPruner(broken_evaluations=None)})
    assert verdict(SweepFolder(fast_tmp_path / "off", "s"), off, answers)[1] == ""


def test_a_trial_at_its_end_is_complete_and_a_sweep_of_an_earlier_version_prunes_as_before(
    fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = [0.30, 0.20, 0.10]
    short = {**BASE, "training": {"max_steps": 30}}
    spec = make_spec(GRID, base=short, pruner=MedianPruner(), require=(KEEP,))
    assert verdict(SweepFolder(fast_tmp_path, "s"), spec, away) == (30, "")
    stored = SweepTerms.as_json
    monkeypatch.setattr(
        SweepTerms, "as_json", lambda terms: {k: v for k, v in stored(terms).items() if k != "prunes_broken"}
    )
    earlier = make_spec(GRID, base=LONG, pruner=MedianPruner(), require=(KEEP,))
    assert verdict(SweepFolder(fast_tmp_path / "earlier", "s"), earlier, away) == (30, "")


def test_trials_that_break_a_requirement_are_no_rivals(template: Template, tmp_path: Path) -> None:
    pruner = MedianPruner(n_startup_trials=1)
    reasons = []
    for answers in (0.2, 0.5):
        spec = make_spec(4, base=LONG, pruner=pruner, require=(KEEP,), order=Asap(), description=str(answers))
        with Study.open(template(tmp_path, spec)) as study:
            end(study, claimed(study), value=0.9, answers=answers)
            _, decision = study.report(claimed(study), [StepMetrics(0, INITIAL), StepMetrics(10, {METRIC: 0.6})])
            reasons.append(decision.reason)
    assert reasons[0] == ""
    assert reasons[1].startswith(f"pruned at update 10: {METRIC} 0.6 is below the median 0.9")


# --- other requirements for a sweep that has begun -------------------------------------------------------------------


def test_other_requirements_rank_ended_trials_anew(template: Template, tmp_path: Path) -> None:
    spec = make_spec(4, require=(KEEP,))
    with Study.open(template(tmp_path, spec)) as study:
        end(study, claimed(study), value=0.9, answers=0.25, repetition=0.0)
        end(study, claimed(study), value=0.8, answers=0.36, repetition=0.5)
        end(study, claimed(study), value=0.7, answers=0.50, repetition=0.0)
        end(study, claimed(study), DIVERGED, value=0.99, answers=0.9, repetition=0.0)
        assert [record.number for record in study.ranked()] == [2, 1, 0]
        loose = (Requirement.parse(ANSWERS, ">= initial - 0.05"), Requirement.parse(REPETITION, "<= 0.6"))
        (answers, repetition) = study.amend(spec.model_copy(update={"require": loose}))
        assert str(answers) == f'require.{ANSWERS}: ">= initial" -> ">= initial - 0.05"'
        assert str(repetition) == f'require.{REPETITION}: "off" -> "<= 0.6"'
        assert [record.number for record in study.ranked()] == [1, 2, 0]
        assert study.ranked()[2].breaks == ("eval_exact_answers 0.25 < 0.34",)
        assert study.trials()[3].violations == {}
    with Study.open(SweepFolder(tmp_path, "s"), read_only=True) as again:
        assert again.best().number == 1  # type: ignore[union-attr]
        assert [event.text for event in again.events() if event.kind == "spec"] == [f"{answers}; {repetition}"]
        names = {requirement.name for requirement in loose}
        assert [set(trial.constraints) for trial in again._frozen()] == [names, names, names, set()]
    with Study.open(SweepFolder(tmp_path, "s")) as study:
        study.amend(spec.model_copy(update={"require": ()}))
        assert [record.number for record in study.ranked()] == [0, 1, 2]
        assert all(record.violations == {} for record in study.trials())


def test_trials_of_another_sweep_fix_the_requirements(template: Template, tmp_path: Path) -> None:
    spec = make_spec(RANGES, sampler=TpeSampler(seed=1), budget=Budget(trials=4), warm_start="other", require=(KEEP,))
    with (
        Study.open(template(tmp_path, spec)) as study,
        pytest.raises(SpecChanged, match=r'require\.eval_exact_answers: ">= initial" -> "off"'),
    ):
        study.amend(spec.model_copy(update={"require": ()}))
