"""After the search its best configurations are trained again with fresh seeds, whatever the sampler and the driver."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.checkpoint_retention import models_to_keep
from orchestrator.errors import SpecChanged
from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import MedianPruner, ThresholdPruner
from orchestrator.spec.requirements import Requirement
from orchestrator.spec.sweep_spec import Budget, Finalists, Objective, SweepSpec
from orchestrator.study.confirmation import Confirmation, ConfirmedValue, Interval
from orchestrator.study.study import Study
from orchestrator.study.sweep_terms import RowsSeen
from orchestrator.study.trial_records import FailureKind, Outcome, Trial, TrialState, WaitForTrial
from tests.support.specs import BASE, GRID, METRIC, RANGES, SAMPLERS, make_spec
from trainer.results import StepMetrics

Template = Callable[[Path, SweepSpec], SweepFolder]
COMPLETE = Outcome(TrialState.COMPLETE)
OTHER = "eval_exact_answers"
CONFIRMING: dict[str, Any] = BASE | {"data": {"train": [{"generated": "instructions"}], "confirm_share": 0.5}}


def finalists_spec(search: Any = GRID, *, top: int = 2, seeds: int = 3, **more: Any) -> SweepSpec:
    return make_spec(search, base=CONFIRMING, finalists=Finalists(top=top, seeds=seeds), **more)


def value_of(trial: Trial) -> float:
    """High for a high beta in the search; on the rows of the finalists for a low one."""
    beta = trial.config.loss.beta / 10  # type: ignore[union-attr]
    return 1 - beta if trial.config.data.eval_on == "confirm" else beta


def end(study: Study, trial: Trial, outcome: Outcome = COMPLETE, other: float = 0.5) -> None:
    study.report(
        trial, [StepMetrics(0, {METRIC: 0.1, OTHER: 0.5}), StepMetrics(1, {METRIC: value_of(trial), OTHER: other})]
    )
    study.tell(trial, outcome)


def run(study: Study, count: int = 1000, other: float = 0.5) -> list[Trial]:
    out: list[Trial] = []
    while len(out) < count and isinstance(trial := study.ask(), Trial):
        end(study, trial, other=other)
        out.append(trial)
    return out


def is_finalist(trial: Trial) -> bool:
    return trial.config.data.eval_on == "confirm"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_search_is_the_same_with_finalists_after_it(
    sampler: str, repeats: int, template: Template, tmp_path: Path
) -> None:
    search = GRID if sampler in ("grid", "staged") else RANGES
    more: dict[str, Any] = {"sampler": SAMPLERS[sampler], "budget": Budget(trials=8), "repeats": repeats}
    with Study.open(template(tmp_path, make_spec(search, base=CONFIRMING, **more))) as study:
        without = [(trial.number, trial.config) for trial in run(study)]
    with Study.open(template(tmp_path, finalists_spec(search, **more))) as study:
        trials = run(study)
        records = study.trials()
        reason = study.no_more_trials_reason()
    found = [trial for trial in trials if is_finalist(trial)]
    assert [(trial.number, trial.config) for trial in trials if not is_finalist(trial)] == without
    assert trials[-6:] == found, "after the search"
    used = {trial.config.training.seed for trial in trials if not is_finalist(trial)}
    assert [trial.config.training.seed for trial in found] == [1042, 1042, 1043, 1043, 1044, 1044]
    assert not used & {1042, 1043, 1044}
    best = sorted(without, key=lambda each: -each[1].loss.beta)  # type: ignore[union-attr]
    assert {t.config.loss.beta for t in found} >= {best[0][1].loss.beta}  # type: ignore[union-attr]
    assert reason.endswith("; 2 finalists")
    assert [record.finalist_of for record in records if record.finalist_of is not None][:2] != [None, None]


@pytest.mark.parametrize("sampler", ["grid", "tpe", "staged"])
def test_a_driver_killed_at_any_trial_goes_on_with_the_same_finalists(
    sampler: str, template: Template, tmp_path: Path
) -> None:
    search = RANGES if sampler == "tpe" else GRID
    spec = finalists_spec(search, sampler=SAMPLERS[sampler], budget=Budget(trials=4), pruner=MedianPruner())
    with Study.open(template(tmp_path, spec)) as study:
        whole = [(t.number, dict(t.params), t.config) for t in run(study)]
    folder = template(tmp_path, spec)
    again: list[tuple[Any, ...]] = []
    while len(again) < len(whole):
        with Study.open(folder) as study:  # a driver for each trial: it dies once it was issued, and after its end
            issued = study.ask()
            assert isinstance(issued, Trial)
        with Study.open(folder) as study:
            (trial,) = run(study, 1)
            assert (trial.number, trial.params, trial.config) == (issued.number, issued.params, issued.config)
            again.append((trial.number, dict(trial.params), trial.config))
    assert again == whole


def test_finalists_wait_for_the_trials_of_the_search_and_are_not_pruned(template: Template, tmp_path: Path) -> None:
    never = ThresholdPruner(lower=0.95)
    with Study.open(template(tmp_path, finalists_spec(pruner=never, order={"kind": "asap"}))) as study:
        first = [study.ask() for _ in range(4)]
        assert all(isinstance(trial, Trial) for trial in first)
        assert study.ask() == WaitForTrial(0)
        assert study.no_more_trials_reason() == ""
        for trial in first:
            assert isinstance(trial, Trial)
            end(study, trial)
        finalist = study.ask()
        assert isinstance(finalist, Trial)
        assert study.report(finalist, [StepMetrics(1, {METRIC: 0.2})])[1].stop is False


def test_paused_trials_of_the_search_do_not_hold_finalists_up(template: Template, tmp_path: Path) -> None:
    with Study.open(template(tmp_path, finalists_spec())) as study:
        paused = study.ask()
        assert isinstance(paused, Trial)
        study.pause(paused.number, "by hand")
        assert sum(map(is_finalist, run(study))) == 6


def test_fewer_feasible_configurations_than_asked_for_and_none(template: Template, tmp_path: Path) -> None:
    require = (Requirement.parse(OTHER, ">= initial"),)
    with Study.open(template(tmp_path, finalists_spec(top=3, require=require))) as study:
        end(study, study.ask(), other=0.6)  # type: ignore[arg-type]
        trials = run(study, other=0.4)
        assert [is_finalist(trial) for trial in trials] == [False] * 3 + [True] * 3
        reason = "; 1 finalist, fewer than finalists.top 3: no others keep every requirement"
        assert study.no_more_trials_reason().endswith(reason)
        assert study.best() is None, "its only feasible configuration broke the requirement as a finalist"
    with Study.open(template(tmp_path, finalists_spec(top=3, require=require))) as study:
        assert not any(map(is_finalist, run(study, other=0.4)))
        assert study.no_more_trials_reason().endswith("; no finalists: no complete trial keeps every requirement")
    with Study.open(template(tmp_path, finalists_spec())) as study:
        while isinstance(trial := study.ask(), Trial):
            study.tell(trial, Outcome(TrialState.FAILED, "a bug", FailureKind.BUG))
        assert len(study.trials()) == 4
        assert study.no_more_trials_reason().endswith("; no finalists: no trial completed")


def test_a_sweep_of_one_trial_confirms_it(template: Template, tmp_path: Path) -> None:
    with Study.open(template(tmp_path, finalists_spec({}, top=3, seeds=2))) as study:
        assert [is_finalist(trial) for trial in run(study)] == [False, True, True]
        best = study.best()
        assert best is not None
        assert (best.finalist_of, best.complete_seeds) == (0, 2)
        assert study.no_more_trials_reason().endswith("1 finalist, fewer than finalists.top 3: no more completed")


def test_the_best_is_a_confirmed_one_and_its_weights_are_kept(template: Template, tmp_path: Path) -> None:
    spec = finalists_spec({"loss.beta": {"choice": [2.0, 3.0, 4.0]}})
    with Study.open(template(tmp_path, spec)) as study:
        run(study, 5)  # of each finalist one seed
        best = study.best()
        assert best is not None
        assert best.finalist_of is None, "a single seed confirms nothing"
        assert {r.number for r in models_to_keep(spec, study.trials())} >= {3, 4, best.number}
        run(study)
        best = study.best()
        assert best is not None
        assert (best.finalist_of, best.value, best.complete_seeds) == (1, pytest.approx(0.7), 3)
        assert {record.finalist_of for record in models_to_keep(spec, study.trials())} == {1, 2}
        tied = Confirmation(
            trials=(3, 4, 5, 6, 7, 8),
            pairs=0,
            values=tuple(
                ConfirmedValue(of=of, seeds=3, mean=Interval(value=0.6, low=0.5, high=0.7), behind=None)
                for of in (1, 2)
            ),
            tied=(1, 2),
            recommended=2,
            reason="tied",
        )
        study.save_confirmation(tied)
        best = study.best()
        assert best is not None
        assert best.finalist_of == 2, "the recommended one"
        assert study.confirmation() == tied
        assert [record.finalist_of for record in study.pareto_front()] == [2]


def test_more_seeds_and_another_search_extend_a_finished_sweep(template: Template, tmp_path: Path) -> None:
    spec = finalists_spec({"loss.beta": {"choice": [2.0, 3.0, 4.0]}}, top=1, seeds=2)
    with Study.open(template(tmp_path, spec)) as study:
        assert len(run(study)) == 5
        study.amend(spec.model_copy(update={"finalists": Finalists(top=1, seeds=4)}))
        assert [trial.config.training.seed for trial in run(study)] == [1044, 1045]
        wider = spec.search.model_validate({"dimensions": {"loss.beta": {"choice": [2.0, 3.0, 4.0, 5.0]}}})
        study.amend(study.spec.model_copy(update={"search": wider}))
        more = run(study)
        assert [(t.config.loss.beta, is_finalist(t)) for t in more] == [(5.0, False)] + [(5.0, True)] * 4  # type: ignore[union-attr]
        study.amend(study.spec.model_copy(update={"finalists": None}))
        assert run(study) == []


def test_finalists_of_a_search_that_has_seen_every_row_are_refused(template: Template, tmp_path: Path) -> None:
    spec = make_spec(GRID)
    with Study.open(template(tmp_path, spec)) as study:
        run(study)
        with pytest.raises(RowsSeen, match="evaluated on all held-out rows"):
            study.amend(spec.model_copy(update={"finalists": Finalists()}))
    kept = make_spec(GRID, base=CONFIRMING)
    with Study.open(template(tmp_path, kept)) as study:
        run(study)
        study.amend(kept.model_copy(update={"finalists": Finalists(top=1, seeds=2)}))
        assert list(map(is_finalist, run(study))) == [True, True]
        with pytest.raises(SpecChanged):
            study.amend(study.spec.model_copy(update={"base": spec.base}))


def test_several_objectives_confirm_the_front_by_the_first(template: Template, tmp_path: Path) -> None:
    also = (Objective(metric=OTHER, direction="maximize"),)
    with Study.open(template(tmp_path, finalists_spec({"loss.beta": {"choice": [2.0, 3.0, 4.0]}}, also=also))) as study:
        while isinstance(trial := study.ask(), Trial):
            end(study, trial, other=1 - value_of(trial))
        assert [record.finalist_of for record in study.trials()] == [None] * 3 + [2, 1] * 3
        front = study.pareto_front()
        assert {record.finalist_of for record in front} == {1, 2}


def test_the_target_ends_the_search_and_not_the_finalists(template: Template, tmp_path: Path) -> None:
    search = {"loss.beta": {"choice": [2.0, 4.0, 3.0]}}
    with Study.open(template(tmp_path, finalists_spec(search, budget=Budget(target=0.35)))) as study:
        trials = run(study)
        assert [is_finalist(trial) for trial in trials] == [False] * 2 + [True] * 6
        assert "reached the target" in study.no_more_trials_reason()


def test_a_limit_on_time_leaves_finalists_theirs(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial takes a tenth of the limit: the search stops where six finalists would use up the rest, at half."""
    from orchestrator.study.sweep_terms import Usage

    def usage(study: Study, _: object) -> Usage:
        return Usage(0.1 * sum(trial.state.is_final for trial in study._optuna_trials.snapshots()), 0.0)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(Study, "_usage", usage)
    spec = finalists_spec(RANGES, sampler=SAMPLERS["random"], budget=Budget(hours=1))
    with Study.open(template(tmp_path, spec)) as study:
        trials = run(study)
        assert [is_finalist(trial) for trial in trials] == [False] * 5 + [True] * 5
        assert study.no_more_trials_reason().startswith("1 of 1 hours spent")
