from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.study.guard import as_number, judge
from trainer.report import GO_ON, Point


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_out_of_bounds_stops_with_its_name_value_and_step(name: str, value: float) -> None:
    verdict = judge([Point(1, {"loss": 1.0}), Point(2, {name: value})])
    assert (verdict.stop, verdict.reason) == (True, f"diverged: {name} is {value} at step 2")


def test_finite_points_go_on() -> None:
    assert judge([Point(1, {"loss": 1e30, "grad_norm": 0.0})]) is GO_ON
    assert judge([]) is GO_ON


def test_other_metrics_may_be_undefined() -> None:
    assert judge([Point(1, {"loss": 1.0, "exact_answers": math.nan})]) is GO_ON


@pytest.mark.parametrize("value", [None, "abc", [1.0]])
def test_what_is_no_number_stops_and_is_kept_as_nan_never_as_zero(value: Any) -> None:
    verdict = judge([Point(4, {"loss": 1.0, "weird": value})])
    assert (verdict.stop, verdict.reason) == (True, f"weird={value!r} at step 4 is not a number")
    assert math.isnan(as_number(value))
