"""No two findings of a diagnosis advise opposite moves of one setting, none rests on a tie, and `suggest` agrees."""

import re
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given

from dashboards.analysis.follow_up import NothingLearned, follow_up
from dashboards.analysis.param_effects import difference_of_trials, levels
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.conflicts import HARM
from dashboards.diagnosis.diagnose import analyze, diagnose
from dashboards.diagnosis.findings import DiagnosisFinding, Direction, FindingLevel
from dashboards.diagnosis.setting_steps import LossTrend, loss_trend
from orchestrator.spec.search.dimensions import Choice, IntUniform, LogUniform, Uniform
from tests.support.random_sweeps import CURVES, frame_of_scripts, sweeps
from tests.support.scripted_sweep import Script, make_spec

RATE, BETA = "training.learning_rate", "loss.beta"
NAMES = {"learning rate": RATE, "beta": BETA, "gamma": "loss.gamma", "sft_weight": "loss.sft_weight"}
LENGTHS = ("training.max_steps", "training.num_train_epochs")
CLAUSE = r"\b[^.;,(]{0,30}?\b"
UP, DOWN, FIX = "up", "down", "fix"


def read(finding: DiagnosisFinding) -> set[tuple[str, str]]:
    """The moves that a person reads in the advice: (setting, direction), from its words and not from its steps."""
    text, found = finding.next_step.lower(), set[tuple[str, str]]()
    for clause in re.split(r",| or | and check|[.;:]", text):
        for name, path in NAMES.items():
            if re.search(rf"\b(raise|higher|larger|increase|add){CLAUSE}{name}\b", clause):
                found.add((path, UP))
            if re.search(rf"\b(lower|smaller|reduce|decrease){CLAUSE}{name}\b", clause):
                found.add((path, DOWN))
    if "train longer" in text:
        found.add(("training.max_steps", UP))
    if re.search(r"train for about|with about \d+ updates", text):
        found.add(("training.max_steps", DOWN))
    if "fix it at" in text:
        found.add((LENGTHS[0] if finding.setting in LENGTHS else finding.setting, FIX))
    if finding.rule == "at_the_edge" and "add" in text:
        path = LENGTHS[0] if finding.setting in LENGTHS else finding.setting
        found.add((path, UP if "highest" in finding.title else DOWN))
    if "lengthen the warmup" in text:
        found.add(("training.warmup_ratio", UP))
    if "do not use" in text:
        found |= {(f"trial {label}", "do not use") for label in finding.trials}
    if "use the cheapest" in text:
        found |= {(f"trial {label}", "use") for label in finding.trials}
    return found


@given(sweeps())
def test_no_two_findings_advise_opposite_moves_of_one_setting(frame: SweepFrame) -> None:
    findings = diagnose(frame)
    for one, other in combinations(findings, 2):
        for path, direction in read(one):
            against = {d for p, d in read(other) if p == path} - {direction}
            assert not against, (path, one.title, one.next_step, other.title, other.next_step)
    to_use = [finding.rule for finding in findings if any(direction == "use" for _, direction in read(finding))]
    assert len(to_use) <= 1, "one finding says which trial to use"
    moved = [step.setting for finding in findings for step in finding.steps if step.setting]
    assert len(moved) == len(set(moved)), "one finding for each setting"
    about = [finding.setting for finding in findings if finding.setting]
    assert len(about) == len(set(about)), "one finding for each setting"
    for finding in findings:
        assert {p for p, _ in read(finding)} & {*NAMES.values()} <= {step.setting for step in finding.steps}


@given(sweeps())
def test_no_advice_on_the_edge_rests_on_a_tie(frame: SweepFrame) -> None:
    for finding in diagnose(frame):
        if finding.rule == "at_the_edge" and finding.setting:  # "" where a stronger finding moves the setting
            best = frame.comparable_trials[0].record
            others = [
                c.record
                for c in frame.comparable_trials
                if c.record.params[finding.setting] != best.params[finding.setting]
            ]
            assert others
            assert all(other.value != best.value for other in others), finding.evidence


@given(sweeps())
def test_no_advice_for_the_objective_moves_a_setting_to_where_the_sweep_got_worse(frame: SweepFrame) -> None:
    """A value tried on that side is worse only where its trials have not moved the loss, or where the model is harmed,
    which the objective does not show. How many updates are enough is read from one trial's curve.
    """
    for finding in diagnose(frame):
        for step in finding.steps if finding.rule not in HARM | {"diverging_region"} else ():
            best: Any = frame.comparable_trials[0].record.params.get(step.setting) if frame.comparable_trials else None
            if step.direction not in (Direction.RAISE, Direction.LOWER) or best is None:
                continue
            if step.setting in LENGTHS and step.direction is Direction.LOWER:
                continue
            for level in levels(frame, step.setting):
                if level.value == best or (level.value > best) != (step.direction is Direction.RAISE):
                    continue
                tied = level.best == pytest.approx(frame.comparable_trials[0].record.value)
                still = all(loss_trend(trial) is LossTrend.FLAT for trial in level.trials)
                assert tied or still, (finding.title, finding.next_step, level)


@given(sweeps())
def test_the_follow_up_searches_where_the_diagnosis_says(frame: SweepFrame) -> None:
    analysis = analyze(frame)
    if analysis.significance is None:
        return
    made, winner = follow_up(analysis), analysis.significance.winner
    for finding in analysis.findings:
        for step in finding.steps:
            dimension, at = made.spec.search.dimensions.get(step.setting), winner.config.flat_params().get(step.setting)
            if step.direction is Direction.FIX:
                assert dimension is None
            elif step.direction in (Direction.RAISE, Direction.LOWER) and dimension is not None:
                low, high = ends(dimension)
                assert high > at if step.direction is Direction.RAISE else low < at
                if finding.rule != "at_the_edge":
                    assert low >= at if step.direction is Direction.RAISE else high <= at
            elif step.setting in frame.paths and step.direction is not Direction.EXCLUDE and step.setting:
                assert "no valid value" in " ".join(made.notes)
    for path in {p for group in made.spec.search.zipped for p in group}:
        assert f"{path} is fixed" not in " ".join(made.notes), "repeated with other seeds"


def ends(dimension: Any) -> tuple[float, float]:
    match dimension:
        case Choice(choice=values):
            return min(values), max(values)
        case Uniform(uniform=found) | LogUniform(log_uniform=found) | IntUniform(int_uniform=found):
            return found
    raise AssertionError(dimension)


def rates(*scripts: Script, pairs: int = 300, **more: Any) -> SweepFrame:
    """One trial for each script, at rising learning rates from 1e-7 by factors of 10."""
    values = [float(f"1e-{7 - k}") for k in range(len(scripts))]
    spec = make_spec(search={RATE: {"choice": values}}, **more)
    return frame_of_scripts(spec, [({RATE: v}, script) for v, script in zip(values, scripts, strict=True)], pairs)


def rules(frame: SweepFrame) -> dict[str, DiagnosisFinding]:
    return {finding.rule: finding for finding in diagnose(frame)}


def test_a_small_rise_of_the_loss_is_no_loss_that_hardly_changed() -> None:
    found = rules(rates(Script(quality=-0.3, loss=CURVES["rises a little"])))
    assert "loss_plateau" not in found
    assert "0.6931 at step 0, 0.7061 at the end" in found["overfitting"].evidence
    assert found["worse_than_start"].next_step.startswith(
        "Do not use any of these trials. Lower the learning rate (try 1e-8 and 3e-8)."
    )
    assert "learning rate" not in found["overfitting"].next_step


def test_no_gain_and_a_flat_loss_are_one_reason_to_raise_the_rate() -> None:
    found = rules(rates(Script(quality=0.099, loss=CURVES["flat"])))
    assert "Raise the learning rate (try 3e-7 and 1e-6) or train longer." in found["worse_than_start"].next_step
    assert (
        found["loss_plateau"].next_step == "For training.learning_rate see: no trial is better than the initial model."
    )


def test_a_flat_loss_does_not_raise_the_rate_of_a_model_that_it_harms() -> None:
    flat = Script(quality=0.11, chosen=-3.0, loss=CURVES["flat"])
    found = rules(rates(flat))
    assert found["chosen_falling"].level is FindingLevel.SERIOUS
    assert "Lower the learning rate (try 2.5e-8 and 5e-8)" in found["chosen_falling"].next_step
    assert "learning rate" not in found["loss_plateau"].next_step


def test_rates_that_are_not_told_apart_and_hardly_train_are_left_for_higher_ones() -> None:
    frame = rates(*[Script(quality=0.11, loss=CURVES["flat"])] * 3)
    found = rules(frame)
    assert "not_told_apart" not in found
    assert "Raise the learning rate (try 3e-5 and 1e-4)" in found["loss_plateau"].next_step, "above all that were tried"
    assert "Also weighed: the values of learning_rate are not distinguishable" in found["loss_plateau"].evidence
    assert follow_up(analyze(frame)).spec.search.choices(RATE) == (1e-7, 3e-5, 1e-4)


def test_a_higher_rate_that_was_clearly_worse_is_not_advised() -> None:
    found = rules(rates(Script(quality=0.11, loss=CURVES["flat"]), Script(quality=-0.9)))
    assert found["loss_plateau"].next_step.startswith("Train longer.")


@pytest.mark.parametrize(("higher", "advised"), [("falls", False), ("rises a little", False), ("flat", True)])
def test_a_higher_rate_that_was_not_better_speaks_against_higher_ones_unless_it_did_not_train(
    higher: str, advised: bool
) -> None:
    """Two trials on 60 pairs, whose difference is not clear; the loss of the better one has hardly changed."""
    frame = rates(Script(quality=0.099, loss=CURVES["flat"]), Script(quality=0.05, loss=CURVES[higher]), pairs=60)
    found = rules(frame)
    difference = difference_of_trials(frame, *frame.comparable_trials)
    assert difference is not None
    assert not difference.is_clear
    assert [t.number for t in frame.comparable_trials] == [0, 1]
    assert any("aise the learning rate (try 3e-6" in f.next_step for f in found.values()) is advised
    assert any("rain longer" in f.next_step for f in found.values())


def test_a_short_run_with_two_evaluations_gets_no_advice_against_its_own_results() -> None:
    found = rules(rates(Script(quality=0.11, every=40), Script(quality=0.05, every=40), pairs=60))
    assert not [f.title for f in found.values() if "aise the learning rate" in f.next_step]


def test_the_edge_of_a_harmful_optimum_is_evidence_and_no_advice() -> None:
    frame = rates(Script(quality=0.3), Script(quality=0.5), Script(quality=0.9, chosen=-3.0))
    found = rules(frame)
    assert "at_the_edge" not in found
    assert "Also weighed: the best learning_rate is the highest that was tried." in found["chosen_falling"].evidence
    assert follow_up(analyze(frame)).spec.search.choices(RATE) == (2.5e-6, 5e-6, 1e-5)


@pytest.mark.parametrize("second", [0.9, 0.5])
def test_an_edge_needs_a_best_value_without_a_tie(second: float) -> None:
    found = rules(rates(Script(quality=0.3), Script(quality=second), Script(quality=0.9)))
    assert ("at_the_edge" in found) == (second != 0.9)


def test_equal_trials_are_not_offered_for_use_where_none_is_to_be_used() -> None:
    found = rules(rates(*[Script(quality=-0.3)] * 3))
    assert "Do not use any of these trials." in found["worse_than_start"].next_step
    assert "until then train them with several seeds (repeats: 3)." in found["too_few_pairs"].next_step


def test_a_rehearsal_has_no_diagnosis_and_no_follow_up() -> None:
    training = {"pairs_per_update": 4, "max_steps": 4}
    frame = rates(Script(quality=-0.3, chosen=-3.0), name="s-rehearsal", base={"training": training})
    assert diagnose(frame) == []
    with pytest.raises(NothingLearned, match="s-rehearsal is a rehearsal"):
        follow_up(analyze(frame))
