import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.spec.guard_config import ChosenLogpsRule, GradNormRule, GuardConfig
from orchestrator.study.pruning.divergence_guard import DivergenceGuard, as_number
from trainer.results import CONTINUE, StepMetrics, StopDecision

METRIC = "eval_accuracies/logp"
OFF = GuardConfig.model_validate("off")
LOGP, MARGIN = "logps_per_token/chosen", "margins/logp"


def decision_after(history: list[StepMetrics], config: GuardConfig | None = None) -> StopDecision:
    guard = DivergenceGuard(config or GuardConfig(), METRIC)
    guard.update(history)
    return guard.decision


def curve(updates: int, start: dict[str, float], each: Callable[[int], dict[str, float]]) -> list[StepMetrics]:
    return [StepMetrics(0, start), *(StepMetrics(step, each(step)) for step in range(1, updates + 1))]


# --- what is not finite ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss", METRIC])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [GuardConfig(), OFF])
def test_a_value_out_of_bounds_stops_with_its_name_value_and_step(name: str, value: float, config: GuardConfig) -> None:
    decision = decision_after([StepMetrics(1, {"loss": 1.0}), StepMetrics(2, {name: value})], config)
    assert decision == StopDecision(stop=True, reason=f"diverged: {name} is {value} at step 2", diverged=True)


def test_finite_points_go_on() -> None:
    assert decision_after([StepMetrics(1, {"loss": 1e30, "grad_norm": 0.0})]) is CONTINUE
    assert decision_after([]) is CONTINUE


def test_other_metrics_may_be_undefined() -> None:
    assert decision_after([StepMetrics(1, {"loss": 1.0, "eval_exact_answers": math.nan})]) is CONTINUE


@pytest.mark.parametrize("value", [None, "abc", [1.0]])
def test_what_is_no_number_stops_and_is_kept_as_nan_never_as_zero(value: Any) -> None:
    guard = DivergenceGuard(GuardConfig(), METRIC)
    counted = guard.update([StepMetrics(4, {"loss": 1.0, "weird": value})])
    assert guard.decision.reason == f"diverged: weird={value!r} at step 4 is not a number"
    assert math.isnan(counted[0].metrics["weird"])
    assert math.isnan(as_number(value))


# --- each rule: a curve that trips it, and a near miss ---------------------------------------------------------------
def test_a_loss_above_its_own_start_for_too_long() -> None:
    def rising(to: float) -> list[StepMetrics]:
        return curve(60, {"eval_loss": 1.31}, lambda step: {"loss": 1.3 if step < 11 else to})

    decision = decision_after(rising(2.0))
    assert decision.diverged
    assert decision.reason == (
        "diverged: the loss was above 1.5 times its initial value (1.31) for 20 updates, and is 2 at update 30; "
        "lower training.learning_rate"
    )
    assert decision_after(rising(1.9)) is CONTINUE, "1.31 * 1.5 is 1.965"
    spikes = curve(200, {"eval_loss": 1.31}, lambda step: {"loss": 9.0 if step % 20 else 1.3})
    assert decision_after(spikes) is CONTINUE, "19 bad updates, then a good one"


@pytest.mark.parametrize("start", [0.6931, 1.3133, 5.0067, 25.0])
def test_the_loss_is_measured_by_the_trials_own_start(start: float) -> None:
    """DPO, SimPO with gamma 1 and 5, IPO: what is high for one is where another begins."""
    steady = curve(100, {"eval_loss": start}, lambda _: {"loss": start * 1.2})
    assert decision_after(steady) is CONTINUE
    assert decision_after([*steady, *(StepMetrics(s, {"loss": start * 1.9}) for s in range(101, 121))]).diverged


def test_training_pairs_that_are_harder_than_the_held_out_ones_are_no_divergence() -> None:
    assert decision_after(curve(100, {"eval_loss": 0.2}, lambda _: {"loss": 0.7})) is CONTINUE


def test_gradients_against_their_own_median() -> None:
    def norms(bad: int) -> list[StepMetrics]:
        return curve(80, {}, lambda step: {"grad_norm": 50.0 if 30 < step <= 30 + bad else 2.0 + 0.01 * (step % 7)})

    decision = decision_after(norms(5))
    assert decision.reason.startswith(
        "diverged: the gradient's norm was above 20 times its median (2.03) for 5 updates, and is 50 at update 35"
    )
    assert decision_after(norms(4)) is CONTINUE
    doubled = curve(80, {}, lambda step: {"grad_norm": 2.0 * 1.05**step})
    assert decision_after(doubled) is CONTINUE, "a norm that grows slowly moves its own median"


def test_gradients_in_absolute_terms() -> None:
    huge = curve(10, {}, lambda _: {"grad_norm": 2e6})
    assert "above 1e+06 for 5 updates" in decision_after(huge).reason
    assert decision_after(curve(10, {}, lambda _: {"grad_norm": 9e5})) is CONTINUE
    assert decision_after(huge, GuardConfig(grad_norm=GradNormRule(above=None))) is CONTINUE


def start_of(logp: float = -1.21, margin: float = 0.1) -> dict[str, float]:
    return {f"eval_{LOGP}": logp, f"eval_{MARGIN}": margin}


def test_chosen_log_probs_that_collapse_while_the_margin_rises() -> None:
    def falling(to: float, margin: float) -> list[StepMetrics]:
        return [StepMetrics(0, start_of()), StepMetrics(60, start_of(to, margin))]

    decision = decision_after(falling(-4.85, 3.2))
    assert decision.reason == (
        "diverged: the held-out chosen log-prob fell from -1.21 to -4.85 per token by update 60 while the margin rose "
        "from 0.10 to 3.20; lower training.learning_rate, raise loss.beta or add loss.nll_scale"
    )
    assert decision_after(falling(-3.50, 3.2)) is CONTINUE, "2.29 nats"
    assert decision_after(falling(-4.85, 0.05)) is CONTINUE, "the margin does not rise, and 3.64 nats are less than 4.6"
    assert "while the margin went from 0.10 to 0.05" in decision_after(falling(-5.82, 0.05)).reason
    assert decision_after(falling(-4.85, 3.2), GuardConfig(chosen_logps=None)) is CONTINUE


def test_chosen_log_probs_of_single_updates_are_noise() -> None:
    def dips(bad: int) -> list[StepMetrics]:
        return curve(30, start_of(), lambda s: {LOGP: -8.0 if 10 < s <= 10 + bad else -1.2, MARGIN: 0.5})

    assert decision_after(dips(4)) is CONTINUE
    assert "fell from -1.21 to -8.00 per token by update 15 while" in decision_after(dips(5)).reason


def test_a_log_prob_below_what_guessing_has() -> None:
    only = GuardConfig(chosen_logps=ChosenLogpsRule(fall=None, fall_alone=None))
    assert (
        "below -10" in decision_after([StepMetrics(0, start_of()), StepMetrics(5, start_of(-10.2, 0.0))], only).reason
    )
    raw = [StepMetrics(0, start_of(-11.8)), StepMetrics(5, start_of(-12.3, 0.0))]
    assert decision_after(raw, only) is CONTINUE, "a raw model began there"


def test_answers_that_repeat_themselves() -> None:
    def looks(*shares: float) -> list[StepMetrics]:
        return [StepMetrics(10 * k, {"eval_repetition": share}) for k, share in enumerate(shares)]

    assert (
        "repetitions by update 20 (10% at the start), in 2 consecutive evaluations"
        in decision_after(looks(0.1, 0.7, 0.81)).reason
    )
    assert decision_after(looks(0.1, 0.7, 0.3, 0.8, 0.5)) is CONTINUE, "never two in a row"
    assert decision_after(looks(0.6, 0.9, 1.0, 1.0)) is CONTINUE, "the start model repeats itself too"


def test_answers_that_grow_out_of_hand() -> None:
    def looks(chosen: float, *lengths: float) -> list[StepMetrics]:
        start = {"eval_answer_length": 6.0, "eval_lengths/chosen": chosen}
        return [StepMetrics(0, start), *(StepMetrics(10 + k, {"eval_answer_length": n}) for k, n in enumerate(lengths))]

    assert "have 26 tokens by update 11 (6 at the start" in decision_after(looks(6.5, 20.0, 26.0)).reason
    assert decision_after(looks(6.5, 20.0, 19.0)) is CONTINUE
    assert decision_after(looks(30.0, 80.0, 80.0)) is CONTINUE, "the data asks for long answers"


# --- recorded curves -------------------------------------------------------------------------------------------------
RECORDED = [json.loads(line) for line in Path(__file__).with_name("recorded_curves.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("trial", RECORDED, ids=lambda t: f"{t['trial']} at {t['learning_rate']:g}")
def test_recorded_trials_of_the_quickstarts_model(trial: dict[str, Any]) -> None:
    """Sound and so-so trials run on; those whose model died without a NaN are stopped within a seventh of the run."""
    by_step: dict[int, dict[str, float]] = {}
    for name, column in trial["metrics"].items():
        for step, value in column:
            by_step.setdefault(step, {})[name] = value
    guard = DivergenceGuard(GuardConfig(), METRIC)
    counted = guard.update([StepMetrics(step, metrics) for step, metrics in by_step.items()])
    dead = trial["learning_rate"] >= 1e-2 and trial["trial"] != "orpo"  # its cross-entropy keeps it alive
    assert guard.decision.stop is dead, guard.decision.reason
    if dead:
        assert "log-prob fell from -0.67 to " in guard.decision.reason
        assert counted[-1].step <= 15


# --- pure in the points -----------------------------------------------------------------------------------------------
VALUES = st.sampled_from([0.5, 1.0, 2.0, 9.0, 60.0, 2e6])
LOW = st.sampled_from([-0.7, -1.2, -4.0, -9.0, -12.0])


@st.composite
def histories(draw: st.DrawFn) -> list[StepMetrics]:
    history = [StepMetrics(0, {"eval_loss": 1.0, "eval_repetition": 0.0, **start_of()})]
    value, logp = draw(VALUES), draw(LOW)
    for step in range(1, draw(st.integers(1, 60))):
        if draw(st.integers(0, 9)) == 0:
            value, logp = draw(VALUES), draw(LOW)
        metrics = {"loss": value, "grad_norm": value, LOGP: logp, MARGIN: value / 10}
        if step % 10 == 0:
            metrics |= {"eval_repetition": min(1.0, value / 10), **start_of(logp, value / 10)}
        history.append(StepMetrics(step, metrics))
    return history


@settings(max_examples=60, deadline=None)
@given(points=histories(), data=st.data())
def test_batches_and_repetitions_change_nothing(points: list[StepMetrics], data: st.DataObject) -> None:
    """However points are batched, and however much of them an attempt that was issued again tells twice."""
    complete = DivergenceGuard(GuardConfig(), METRIC)
    stored = complete.update(points)
    assert stored == points[: len(stored)]
    assert complete.decision.stop or len(stored) == len(points)
    one_by_one = next((n for n in range(1, len(points) + 1) if decision_after(points[:n]).stop), len(points))
    assert len(stored) == one_by_one, "nothing beyond the point at which it stops counts"
    guard, got, at = DivergenceGuard(GuardConfig(), METRIC), list[StepMetrics](), 0
    while at < len(points) and not guard.decision.stop:
        back, end = data.draw(st.integers(0, at)), data.draw(st.integers(at + 1, len(points)))
        if data.draw(st.booleans()):  # another driver, who knows what was kept
            guard = DivergenceGuard(GuardConfig(), METRIC)
            guard.update(got)
        got += [p for p in guard.update(points[back:end]) if not got or p.step > got[-1].step]
        at = end
    assert (got, guard.decision) == (stored, complete.decision)
