"""Values that the search does not list are results like any others: given by hand, or those of the base."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.folders import SweepFolder
from orchestrator.spec.samplers import StagedSampler
from orchestrator.spec.sweep_spec import Budget
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE, evaluated
from tests.support.specs import SAMPLERS, make_spec

Create = Callable[..., Study]
LISTS = {
    "loss.beta": {"choice": [2.0, 2.5]},
    "loss.gamma_beta_ratio": {"choice": [0.3, 0.5]},
    "training.learning_rate": {"choice": [3e-7, 5e-7]},
}
NUMBERS = {"loss.beta": {"uniform": [1.0, 4.0]}, "training.learning_rate": {"log_uniform": [1e-7, 1e-5]}}
ROWS = [{"loss.beta": [3.0, 4.0], "loss.gamma": [0.5, 0.7]}]
BASE = {"model": {"generated": {}}, "data": {"train": [{"generated": "instructions"}]}}


def finish(study: Study, trial: Trial, value: float) -> None:
    study.report(trial, [evaluated(1, value)])
    study.tell(trial, COMPLETE)


def run_all(study: Study, value: Callable[[Trial], float]) -> list[Trial]:
    found: list[Trial] = []
    while isinstance(trial := study.ask(), Trial):
        found.append(trial)
        finish(study, trial, value(trial))
    return found


def test_a_staged_search_starts_from_the_bases_own_values(create: Create, folder: SweepFolder) -> None:
    """`orchestrate init --objective simpo`: the margin's default, 0.25, is not among the listed ones."""
    study = create(make_spec(LISTS, sampler=StagedSampler(), base=BASE))
    first = study.ask()
    assert dict(first.params) == {"loss.beta": 2.0, "loss.gamma_beta_ratio": 0.25, "training.learning_rate": 3e-7}
    study.dispose()  # the driver is killed: the trial is issued again as it was
    with Study.open(folder) as later:
        again = later.ask()
        assert (again.number, again.attempt, again.params, again.config) == (0, 2, first.params, first.config)
        finish(later, again, 0.9)
        rest = run_all(later, lambda trial: 0.5 + 0.01 * trial.number)
        assert [t.params["loss.gamma_beta_ratio"] for t in rest] == [0.25, 0.3, 0.5, 0.25]
        assert [dict(r.params) for r in later.trials()] == [dict(t.params) for t in (first, *rest)]
        assert later.no_more_trials_reason() == "all 3 stages done"


def test_a_staged_search_starts_beside_the_rows_of_a_zip(create: Create) -> None:
    study = create(make_spec({"training.learning_rate": {"choice": [3e-7, 5e-7]}}, ROWS, sampler=StagedSampler()))
    found = run_all(study, lambda trial: trial.config.training.learning_rate)
    assert [(t.params["loss.beta"], t.params["loss.gamma"]) for t in found] == [(2, 1), (2, 1), (3, 0.5), (4, 0.7)]


@pytest.mark.parametrize("when", ["before the first trial", "within a stage"])
def test_a_staged_search_returns_to_a_given_trial_that_wins_with_all_of_its_values(create: Create, when: str) -> None:
    study = create(make_spec(LISTS, sampler=StagedSampler(), base=BASE))
    before = 1 if when == "within a stage" else 0
    for number in range(before):
        trial = study.ask()
        assert isinstance(trial, Trial)
        finish(study, trial, 0.1 * number)
    study.enqueue({"loss.beta": 3.0, "training.weight_decay": 0.1}, "enqueued", kind="enqueued")
    given, *rest = run_all(study, lambda trial: 0.9 if trial.number == before else 0.5)
    assert given.params["training.weight_decay"] == 0.1
    around = [t for t in rest if t.params["loss.gamma_beta_ratio"] != 0.25]
    assert {t.params["loss.beta"] for t in around} == {3.0}
    assert {t.config.training.weight_decay for t in around} == {0.1}
    assert {t.params["loss.gamma_beta_ratio"] for t in around} == {0.3, 0.5}
    assert study.no_more_trials_reason() == "all 3 stages done"


def test_a_given_path_that_another_kind_of_loss_does_not_have_is_left_behind(create: Create) -> None:
    kinds = {"training.learning_rate": {"choice": [3e-7]}, "loss.kind": {"choice": ["dpo", "simpo"]}}
    order = StagedSampler(stages=(("training.learning_rate",), ("loss.kind",)))
    study = create(make_spec(kinds, sampler=order, base=BASE))
    study.enqueue({"loss.kind": "dpo", "loss.ld_alpha": 0.5}, "enqueued", kind="enqueued")
    found = run_all(study, lambda trial: 0.9 if trial.number == 0 else 0.5)
    assert [(t.config.loss.kind, t.params.get("loss.ld_alpha")) for t in found] == [
        ("dpo", 0.5),
        ("simpo", None),
        ("simpo", None),
    ]
    assert found[-1].params["training.learning_rate"] == 1e-6, "that of the best trial, which the search does not list"


ILLEGAL = "not a valid trial: loss.loss_type=hinge: loss label_smoothing is not used by loss_type hinge"


@pytest.mark.parametrize("last", [False, True])
def test_a_combination_that_is_no_legal_trial_is_passed_over_and_told(create: Create, last: bool) -> None:
    """Every end of the search is legal, but not beside a value that was given by hand."""
    order = [("training.learning_rate",), ("loss.loss_type",), ("loss.beta",)]
    search: dict[str, Any] = {
        "training.learning_rate": {"choice": [3e-7, 5e-7]},
        "loss.loss_type": {"choice": ["sigmoid", "hinge"]},
        "loss.beta": {"choice": [2.0, 3.0]},
    }
    if last:
        del order[2], search["loss.beta"]
    study = create(make_spec(search, sampler=StagedSampler(stages=tuple(order)), base=BASE))
    study.enqueue({"loss.label_smoothing": 0.1, "training.learning_rate": 3e-7}, "enqueued", kind="enqueued")
    found = run_all(study, lambda trial: 0.9 if trial.number == 0 else 0.5)
    assert "hinge" not in {t.params["loss.loss_type"] for t in found}
    logged = [(event.trial, event.text) for event in study.events() if event.kind == "left out"]
    if last:
        assert logged == []
        assert study.no_more_trials_reason().startswith(f"all 2 stages done; {ILLEGAL}")
    else:
        assert [number for number, _ in logged] == [found[-1].number]
        assert logged[0][1].startswith(ILLEGAL)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_a_trial_outside_of_its_search_as_a_result(
    create: Create, folder: SweepFolder, sampler: str
) -> None:
    space: dict[str, Any] = LISTS if sampler in ("grid", "staged") else NUMBERS
    study = create(make_spec(space, sampler=SAMPLERS[sampler], base=BASE, budget=Budget(trials=9)))
    first = study.ask()
    assert isinstance(first, Trial)
    finish(study, first, 0.5)
    for params in [{"loss.beta": 9.0}, {"loss.beta": 0.5, "training.seed": 3}, {"training.learning_rate": 1e-3}]:
        study.enqueue(params, "enqueued", kind="enqueued")
    found = run_all(study, lambda trial: 0.9 if trial.number == 1 else 0.4 + 0.01 * trial.number)
    assert [t.params.get("loss.beta") for t in found[:2]] == [9.0, 0.5]
    assert len(found) > 3, "the sampler goes on"
    assert study.best().params["loss.beta"] == 9.0
    study.dispose()
    with Study.open(folder) as later:
        assert later.ask() is None
        assert [dict(r.params) for r in later.trials()] == [dict(t.params) for t in (first, *found)]
