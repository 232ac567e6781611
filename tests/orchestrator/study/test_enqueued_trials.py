"""Trials given by people: they run first, each exactly once, and the sampler's own count goes on around them."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.folders import SweepFolder
from orchestrator.spec.samplers import RandomSampler
from orchestrator.spec.search.manual_trials import check_manual_trial, out_of_space, resolve_params
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import Budget, Objective
from orchestrator.study.database import enqueued_trials
from orchestrator.study.study import Study
from tests.support.metrics import COMPLETE, evaluated
from tests.support.specs import BASE, GRID, RANGES, make_spec

Create = Callable[..., Study]


def drawn(study: Study) -> list[dict[str, Any]]:
    return [dict(t.params) for t in iter(study.ask, None)]


def test_a_grid_passes_over_what_was_given_and_budget_is_for_the_sampler(create: Create) -> None:
    plain, study = drawn(create()), create(make_spec(GRID, budget=Budget(trials=4)))
    study.enqueue({"loss.beta": 2.5, "loss.gamma": 0.5}, "enqueued by ann", kind="enqueued")
    study.enqueue({"loss.beta": 3, "training.seed": 7}, "enqueued by bob", kind="enqueued")
    assert [g.trial for g in study.enqueued_trials()] == [None, None]
    found = drawn(study)
    assert found[0] == {"loss.beta": 2.5, "loss.gamma": 0.5}
    assert found[1] == {"loss.beta": 3.0, "loss.gamma": 1.0, "training.seed": 7}
    assert found[2:] == [p for p in plain if p != found[0]]
    assert [g.trial for g in study.enqueued_trials()] == [0, 1]
    records = study.trials()
    assert [r.origin for r in records[:3]] == ["enqueued by ann", "enqueued by bob", ""]
    assert dict(records[1].params) == found[1]
    assert study.no_more_trials_reason() == "all points tried: 4 of the grid"


def test_a_random_sweep_draws_the_same_with_and_without(create: Create) -> None:
    spec = make_spec(RANGES, sampler=RandomSampler(seed=3), budget=Budget(trials=4))
    plain, study = drawn(create(spec)), create(spec)
    first = study.ask()
    study.enqueue({"loss.beta": 9.0}, "by hand", kind="enqueued")
    found = drawn(study)
    assert found[0]["loss.beta"] == 9.0
    assert [dict(first.params), *found[1:]] == plain, "one more trial by hand, and no other moved"
    assert study.no_more_trials_reason() == "4 of 4 trials issued, and 1 enqueued beyond them"
    study.enqueue({"loss.beta": 2.0}, "by hand", kind="enqueued")
    assert study.no_more_trials_reason() == ""
    assert len(drawn(study)) == 1


def test_a_given_trial_survives_its_driver_whole(create: Create, folder: SweepFolder) -> None:
    study = create()
    study.enqueue({"loss.beta": 3.5, "training.max_steps": 9}, "by hand", kind="enqueued")
    issued = study.ask()
    study.dispose()  # the driver dies
    with Study.open(folder) as later:
        again = later.ask()
        assert (again.number, again.attempt) == (0, 2)
        assert (again.config, again.params) == (issued.config, issued.params)
        assert again.config.training.max_steps == 9
        later.report(again, [evaluated(1, 0.9)])
        later.tell(again, COMPLETE)
        best = later.best()
        assert apply_params(later.spec.base, best.params) == again.config


def test_a_kill_between_taking_and_creating_neither_loses_nor_doubles(
    create: Create, folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = create()
    study.enqueue({"loss.beta": 3.5}, "by hand", kind="enqueued")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(enqueued_trials.TrialQueue, "mark_issued", killed)
        with pytest.raises(KeyboardInterrupt):
            study.ask()
    study.dispose()
    with Study.open(folder) as later:
        assert later.trials() == []
        found = drawn(later)
        assert ([p["loss.beta"] for p in found].count(3.5), len(found)) == (1, 5)


def test_the_files_trials_count_in_the_budget_and_come_after_those_by_hand(create: Create) -> None:
    study = create(make_spec(GRID, budget=Budget(trials=2)))
    with study._database.transaction() as c:  # pyright: ignore[reportPrivateUsage]
        study._queue.add(c, {"loss.beta": 7.0}, "given in the file", by_command=False)  # pyright: ignore[reportPrivateUsage]
    study.enqueue({"loss.beta": 8.0}, "by hand", kind="enqueued")
    assert [p["loss.beta"] for p in drawn(study)] == [8.0, 7.0, 2.0]


@pytest.mark.parametrize(
    ("leaves", "path", "said"),
    [
        ({"loss.bta": 1.0}, "loss.bta", "did you mean loss.beta?"),
        ({"loss": 1.0}, "loss", "its settings: loss."),
        ({"loss.beta": -1.0}, "loss.beta", "must be greater than 0, not -1"),
        ({"loss.kind": "simp"}, "loss.kind", "must be one of simpo, dpo"),
        ({"loss.beta": "much"}, "loss.beta", "must be a number"),
        ({"data.max_length": 99}, "data.max_length", "changes the held-out pairs"),
        ({"model.dtype": "bfloat16"}, "model.dtype", "the same for all trials"),
        ({"loss.kind": "orpo", "loss.gamma": 1.0}, "loss.gamma", "no such setting"),
    ],
)
def test_what_is_no_trial_of_the_sweep_is_refused(leaves: dict[str, Any], path: str, said: str) -> None:
    spec = make_spec(GRID)
    found = check_manual_trial(spec.base, spec.search, spec.first_objective, leaves)
    assert [problem.path for problem in found] == [path]
    assert said in str(found[0])


def test_a_leaf_that_scales_the_goal_is_refused_also_where_the_search_leaves_it_alone() -> None:
    spec = make_spec({}, goal=Objective(metric="eval_rewards/margins", direction="maximize"))
    (problem,) = check_manual_trial(spec.base, spec.search, spec.first_objective, {"loss.beta": 3.0})
    assert problem.path == "loss.beta"
    assert "is scaled by" in problem.problem


def test_what_the_search_could_have_drawn_is_told_from_the_rest() -> None:
    space = make_spec(
        {"loss.beta": {"uniform": [1.0, 2.0], "step": 0.1}, "training.learning_rate": {"log_uniform": [1e-7, 1e-5]}},
        [{"loss.gamma": [0.5, 1.0], "training.seed": [1, 2]}],
    )
    given = {"loss.beta": 1.3, "training.learning_rate": 1e-4, "loss.gamma": 0.5, "training.seed": 2, "lora": None}
    params = resolve_params(space.base, space.search, given | {"training.max_steps": 5})
    assert out_of_space(space.search, params) == [
        "training.learning_rate",
        "loss.gamma",
        "training.seed",
        "lora",
        "training.max_steps",
    ]
    assert "loss.beta" in out_of_space(space.search, {"loss.beta": 1.35})


def test_the_ratio_of_a_searched_margin_is_written_as_the_margin() -> None:
    spec = make_spec({"loss.gamma": {"choice": [0.5, 1.0]}})
    assert resolve_params(spec.base, spec.search, {"loss.gamma_beta_ratio": 0.25}) == {"loss.gamma": 0.5}
    assert BASE["loss"]["beta"] == 2.0
