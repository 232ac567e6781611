import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.spec.search.corners import extreme_space, find_corner_problems, sample_corners, with_typed_values
from orchestrator.spec.search.space import Grid, SearchSpace
from orchestrator.spec.search.trial_params import UnknownPath, apply_params
from trainer.config.loss_config import DpoLoss, SimpoLoss
from trainer.config.trial import TrialConfig


def space(zipped: Any = (), **dimensions: Any) -> SearchSpace:
    named = {path.replace("__", "."): d for path, d in dimensions.items()}
    listed = {p: {"choice": d} if isinstance(d, (list, tuple)) else d for p, d in named.items()}
    return SearchSpace.model_validate({"dimensions": listed, "zipped": zipped})


METHODS = space(
    loss__gamma={"choice": [0.5, 1.0], "when": {"loss.kind": "simpo"}},
    loss__kind=["simpo", "dpo"],
    training__seed=[1, 2],
)


def points(of: SearchSpace) -> list[dict[str, Any]]:
    return [of.grid_index().params_at(i) for i in range(of.size() or 0)]


def test_the_last_leaf_advances_fastest() -> None:
    grid = points(space(loss__beta=[2.0, 2.5], loss__gamma=[0.3, 0.5, 1.0]))
    assert [tuple(p.values()) for p in grid] == list(itertools.product([2.0, 2.5], [0.3, 0.5, 1.0]))


def test_an_inactive_leaf_multiplies_nothing() -> None:
    assert METHODS.size() == 6
    assert [p for p in points(METHODS) if p["loss.kind"] == "dpo"] == [
        {"loss.kind": "dpo", "training.seed": 1},
        {"loss.kind": "dpo", "training.seed": 2},
    ]


def test_conditions_on_conditions() -> None:
    nested = space(
        loss__kind=["simpo", "dpo"],
        loss__loss_type={"choice": ["sigmoid", "hinge"], "when": {"loss.kind": "simpo"}},
        loss__label_smoothing={"choice": [0.0, 0.1, 0.2], "when": {"loss.loss_type": "sigmoid"}},
    )
    assert nested.size() == 5
    assert {tuple(p) for p in points(nested)} == {
        ("loss.kind", "loss.loss_type", "loss.label_smoothing"),
        ("loss.kind", "loss.loss_type"),
        ("loss.kind",),
    }
    sampled = {"loss.kind": "dpo", "loss.loss_type": "sigmoid", "loss.label_smoothing": 0.1}
    assert nested.active(sampled) == {"loss.kind": "dpo"}


def test_a_large_grid_is_reached_without_building_it() -> None:
    huge = space(**{f"training__{path}": list(range(1, 1001)) for path in ("seed", "max_steps", "eval_steps")})
    assert huge.size() == 10**9
    assert huge.grid_index().params_at(10**9 - 1) == {
        "training.seed": 1000,
        "training.max_steps": 1000,
        "training.eval_steps": 1000,
    }
    with pytest.raises(IndexError):
        huge.grid_index().params_at(10**9)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_combination_comes_once(lengths: list[int], conditional: bool) -> None:
    params = ["training.seed", "training.max_steps", "training.eval_steps", "training.save_steps"]
    dimensions: dict[str, Any] = {}
    for i, length in enumerate(lengths):
        dimensions[params[i]] = {"choice": list(range(1, length + 1))}
        if conditional and i > 0:
            dimensions[params[i]]["when"] = {params[0]: 1}
    grid = points(SearchSpace.model_validate({"dimensions": dimensions}))
    rest = math.prod(lengths[1:])
    assert len(grid) == (rest + lengths[0] - 1 if conditional else rest * lengths[0])
    assert len({tuple(sorted(p.items())) for p in grid}) == len(grid)


def test_zip_advances_together() -> None:
    zipped = space(zipped=[{"loss.beta": (2.0, 2.5), "loss.gamma": (1.0, 1.4)}], training__seed=[1, 2])
    assert zipped.size() == 4
    assert {(p["loss.beta"], p["loss.gamma"]) for p in points(zipped)} == {(2.0, 1.0), (2.5, 1.4)}


def test_steps_are_round_numbers() -> None:
    stepped = space(loss__gamma={"uniform": (0.1, 0.5), "step": 0.1})
    assert [p["loss.gamma"] for p in points(stepped)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [p["training.seed"] for p in points(space(training__seed={"int_uniform": (1, 7), "step": 3}))] == [1, 4, 7]


def test_a_continuous_range_has_no_size() -> None:
    endless = space(training__learning_rate={"log_uniform": (1e-7, 1e-5)})
    assert endless.size() is None
    with pytest.raises(ValueError, match="continuous"):
        endless.grid_index().params_at(0)


@pytest.mark.parametrize(
    ("dimension", "said"),
    [
        ({"uniform": (2, 1)}, "is not from low to high"),
        ({"uniform": (1, 1)}, "for one value write a list"),
        ({"uniform": (0, 1), "step": 0.3}, "the last value is 0.9"),
        ({"log_uniform": (0, 1)}, "greater than 0"),
        ({"int_uniform": (0, 8), "log": True}, "above 0"),
        ({"int_uniform": (1, 9), "log": True, "step": 2}, "exclude each other"),
        ({"int_uniform": (1, 8), "step": 3}, "the last value is 7"),
    ],
)
def test_ranges_that_make_no_sense(dimension: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        space(training__seed=dimension)


@pytest.mark.parametrize(
    ("dimensions", "zipped", "said"),
    [
        ({"loss.gamma": [1.0], "loss.gamma_beta_ratio": [0.5]}, (), "search one"),
        ({"loss.beta": [1.0]}, [{"loss.beta": [1.0]}], "searched twice"),
        ({}, [{"loss.beta": [1.0], "loss.gamma": [1.0, 2.0]}], "equal length: loss.beta has 1, loss.gamma has 2"),
        ({"loss.beta": {"choice": [1.0], "when": {"loss.kind": "dpo"}}}, (), "is not searched"),
    ],
)
def test_searches_that_make_no_sense(dimensions: dict[str, Any], zipped: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        space(zipped=zipped, **{p.replace(".", "__"): d for p, d in dimensions.items()})


def by_kind(*values: Any, **when: str) -> dict[str, Any]:
    return {"choice": list(values), "when": {path.replace("__", "."): value for path, value in when.items()}}


def test_objectives_are_compared_at_the_same_data_and_updates() -> None:
    kinds = ["simpo", "dpo"]
    with pytest.raises(ValidationError, match=r"training.pairs_per_update: .* may not depend on loss.kind"):
        space(loss__kind=kinds, training__pairs_per_update=by_kind(8, 16, loss__kind="dpo"))
    with pytest.raises(ValidationError, match=r"data.max_length: .* may not depend on loss.kind"):
        space(
            loss__kind=kinds,
            loss__loss_type=by_kind("ipo", "hinge", loss__kind="dpo"),
            data__max_length=by_kind(96, 128, loss__loss_type="ipo"),
        )
    with pytest.raises(ValidationError, match=r"training.max_steps: .* may not depend on loss.kind"):
        space(zipped=[{"loss.kind": kinds, "training.max_steps": [10, 20], "loss.beta": [2.0, 0.1]}])
    space(loss__kind=kinds, training__pairs_per_update=[8, 16])
    space(loss__kind=kinds, training__learning_rate=by_kind(1e-6, loss__kind="dpo"))


def test_a_condition_must_be_able_to_hold() -> None:
    with pytest.raises(ValidationError, match=r"never drawn \(only simpo, dpo\)"):
        space(loss__kind=["simpo", "dpo"], loss__gamma={"choice": [1.0], "when": {"loss.kind": "orpo"}})
    with pytest.raises(ValidationError, match="circular"):
        space(
            training__seed={"choice": [1], "when": {"training.max_steps": 1}},
            training__max_steps={"choice": [1], "when": {"training.seed": 1}},
        )


def test_a_drawn_margin_clears_the_other_name(base: TrialConfig) -> None:
    ratio = base.model_copy(update={"loss": SimpoLoss(gamma_beta_ratio=0.5)})
    assert apply_params(ratio, {"loss.gamma": 1.2}).loss == SimpoLoss(gamma=1.2)
    gamma = base.model_copy(update={"loss": SimpoLoss(gamma=1.0)})
    assert apply_params(gamma, {"loss.gamma_beta_ratio": 0.4}).loss == SimpoLoss(gamma_beta_ratio=0.4)


def test_another_kind_starts_from_its_own_defaults(base: TrialConfig) -> None:
    tuned = base.model_copy(update={"loss": SimpoLoss(beta=10.0)})
    assert apply_params(tuned, {"loss.kind": "dpo"}).loss == DpoLoss()
    assert apply_params(tuned, {"loss.kind": "dpo", "loss.beta": 0.05}).loss == DpoLoss(beta=0.05)
    assert apply_params(tuned, {"loss.kind": "simpo"}).loss == SimpoLoss(beta=10.0)


def test_only_active_leaves_are_placed(base: TrialConfig) -> None:
    assert METHODS.apply(base, {"loss.kind": "dpo", "loss.gamma": 0.5, "training.seed": 1}).loss == DpoLoss()


def test_a_path_must_be_a_leaf(base: TrialConfig) -> None:
    with pytest.raises(UnknownPath, match=r"did you mean loss\.beta"):
        apply_params(base, {"loss.bta": 1.0})
    with pytest.raises(UnknownPath, match="lora is null"):
        apply_params(base, {"lora.r": 8})
    with pytest.raises(UnknownPath, match="is a group"):
        apply_params(base, {"training": 1})


@given(st.floats(1e-3, 1e3), st.floats(0, 10), st.floats(1e-9, 1e-2))
@settings(max_examples=30, deadline=None)
def test_what_is_placed_is_what_is_logged(beta: float, gamma: float, rate: float) -> None:
    base = TrialConfig.model_validate({"model": "m", "data": {"train": "rows.jsonl"}})
    sampled = {"loss.beta": beta, "loss.gamma": gamma, "training.learning_rate": rate}
    params = apply_params(base, sampled).flat_params()
    assert {path: params[path] for path in sampled} == sampled
    assert params["loss.gamma_beta_ratio"] == gamma / beta


def test_equal_points_come_once_and_are_told(base: TrialConfig) -> None:
    grid = Grid(space(loss__beta=[2, 2.5, 2.0], loss__gamma=[None, 0.5]), base)
    # gamma left out is 0.25 * beta: with beta 2 that is 0.5, the same trial written twice.
    assert [tuple(p.values()) for p in grid] == [(2, None), (2.5, None), (2.5, 0.5)]
    assert [stored for _, stored in grid.equal] == [{"loss.beta": 2, "loss.gamma": None}] * 3
    assert grid.count() == 3
    assert grid.params_at(3) is None


def test_the_ratio_and_the_margin_are_one_identity(base: TrialConfig) -> None:
    gamma = apply_params(base, {"loss.beta": 2.5, "loss.gamma": 1.4})
    ratio = apply_params(base, {"loss.beta": 2.5, "loss.gamma_beta_ratio": 0.56})
    assert gamma.canonical_params() == ratio.canonical_params()


def test_every_end_is_tried(base: TrialConfig) -> None:
    wrong = space(
        loss__beta={"uniform": (0.0, 2.0)}, training__max_steps={"int_uniform": (0, 4)}, loss__gamma=[1.0, -1.0]
    )
    messages = {(p.path, p.value): p.problem for p in find_corner_problems(wrong, base)}
    assert set(messages) == {("loss.beta", 0.0), ("training.max_steps", 0), ("loss.gamma", -1.0)}
    assert messages["training.max_steps", 0] == "must be at least 1, not 0"


def test_values_that_cannot_meet(base: TrialConfig) -> None:
    (problem,) = find_corner_problems(
        space(loss__loss_type=["sigmoid", "hinge"], loss__label_smoothing=[0.0, 0.1]), base
    )
    assert "label_smoothing is not used by loss_type hinge" in problem.problem
    (problem,) = find_corner_problems(space(loss__kind=["simpo", "dpo"], loss__gamma=[0.5]), base)
    assert (problem.path, "when" in problem.hint) == ("loss.gamma", True)


@pytest.mark.parametrize(
    ("leaf", "value"), [("training__max_steps", True), ("loss__beta", "2.0"), ("training__bf16", "no")]
)
def test_a_value_is_of_its_leafs_type(base: TrialConfig, leaf: str, value: Any) -> None:
    (problem,) = find_corner_problems(space(**{leaf: [value]}), base)
    assert "write" in problem.problem


def test_values_become_their_leafs(base: TrialConfig) -> None:
    typed = with_typed_values(space(loss__beta=[2, 2.5], zipped=[{"training.max_steps": (1.0, 2.0)}]), base)
    assert [type(v) for v in typed.listed_values("loss.beta")] == [float, float]
    assert [type(v) for v in typed.listed_values("training.max_steps")] == [int, int]


def test_corners_of_a_large_search_are_spread(base: TrialConfig) -> None:
    wide = space(training__seed=list(range(1, 101)), training__max_steps=list(range(1, 101)))
    tried = list(sample_corners(wide.corners()))
    assert len(tried) == 512
    assert tried[0] == {"training.seed": 1, "training.max_steps": 1}
    assert tried[-1] == {"training.seed": 100, "training.max_steps": 100}
    assert len(extreme_space(wide)) == 4
