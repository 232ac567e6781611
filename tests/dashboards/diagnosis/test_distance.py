"""Gain against distance from the initial model: the front, the panel, and the two rules that rest on it."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from dashboards.analysis.distance import KL_NAME, LOG_RATIO_NAME, find_distances
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.diagnose import analyze, diagnose
from dashboards.diagnosis.findings import DiagnosisFinding, FindingLevel
from dashboards.report.blocks import Charts, Table
from dashboards.report.html_page import report_page
from dashboards.report.panels.distance_panel import distance_panel
from orchestrator.spec.requirements import DEFAULT_BOUNDS, Requirement, default_requirements
from orchestrator.study.trial_records import Trial
from tests.support.random_sweeps import frame_of_scripts, sweeps
from tests.support.scripted_sweep import COMPLETE, DIVERGED, Script, frame_of, make_spec, run_sweep

RATE = "training.learning_rate"
KL, ANSWERS = "eval_kl_per_token", "eval_exact_answers"
EXACT_BOUND = f"{ANSWERS} {DEFAULT_BOUNDS[ANSWERS]}"


def frame_at(*trials: tuple[float, float | None, Script], **more: Any) -> SweepFrame:
    """One trial for each (quality, KL, rest of the script), at rising learning rates."""
    values = [round(1e-7 * 1.5**k, 12) for k in range(len(trials))]
    spec = make_spec(search={RATE: {"choice": values}}, base={"evaluation": {"prompts": 64}}, **more)
    scripts = [
        replace(script, quality=quality, last={**script.last, **({} if kl is None else {KL: kl})})
        for quality, kl, script in trials
    ]
    return frame_of_scripts(spec, [({RATE: v}, script) for v, script in zip(values, scripts, strict=True)])


def rules(frame: SweepFrame) -> dict[str, DiagnosisFinding]:
    return {finding.rule: finding for finding in diagnose(frame)}


HEALTHY = Script(chosen=-0.95)


def test_the_front_has_the_trials_that_no_other_beats_in_both() -> None:
    frame = frame_at((0.3, 0.05, HEALTHY), (0.2, 0.06, HEALTHY), (0.6, 0.2, HEALTHY), (0.9, 0.2, HEALTHY))
    found = find_distances(frame)
    assert found is not None
    assert (found.name, found.by_trial) == (KL_NAME, {0: 0.05, 1: 0.06, 2: 0.2, 3: 0.2})
    assert [trial.number for trial in found.front] == [0, 3]


def test_without_a_kl_of_every_trial_the_log_ratios_are_the_distance() -> None:
    """As in sweeps of earlier versions, of which the log-probs are known and neither metric."""
    frame = frame_at((0.3, None, HEALTHY), (0.9, 0.2, Script(chosen=-1.4)))
    found = find_distances(frame)
    assert found is not None
    assert found.name == LOG_RATIO_NAME
    for trial in frame.trials:
        chosen, rejected = (trial.change(f"eval_logps_per_token/{side}") for side in ("chosen", "rejected"))
        assert chosen is not None
        assert rejected is not None
        assert found.by_trial[trial.number] == pytest.approx((abs(chosen) + abs(rejected)) / 2)
    logged = {"eval_log_ratio_per_token/chosen": -0.5, "eval_log_ratio_per_token/rejected": -1.5}
    as_logged = find_distances(frame_at((0.3, None, Script(last=logged))))
    assert as_logged is not None
    assert as_logged.by_trial == {0: 1.0}


@given(sweeps())
def test_no_kept_trial_dominates_one_of_the_front(frame: SweepFrame) -> None:
    found = find_distances(frame)
    if found is None:
        return
    points = [(found.by_trial[t.number], frame.sign * (frame.value(t) or 0.0)) for t in found.front]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(points)), "further and better, without ties"
    for trial in frame.eligible:
        distance, value = found.by_trial[trial.number], frame.sign * (frame.value(trial) or 0.0)
        assert any(at <= distance and best >= value for at, best in points)


def test_answers_that_fall_with_the_distance() -> None:
    def trials(slope: float) -> list[tuple[float, float, Script]]:
        return [(0.3 + 0.1 * k, 0.05 * (k + 1), Script(last={ANSWERS: 0.55 - slope * k})) for k in range(8)]

    found = rules(frame_at(*trials(0.05)))["answers_fall_with_distance"]
    assert found.level is FindingLevel.WARNING
    assert "Over 8 complete trials" in found.evidence
    assert "is +1.00 with a better eval_accuracies/logp and -1.00 with eval_exact_answers" in found.evidence
    assert 'require: {eval_exact_answers: ">= initial"}' in found.next_step
    assert "answers_fall_with_distance" not in rules(frame_at(*trials(-0.01))), "they rise"
    assert "answers_fall_with_distance" not in rules(frame_at(*trials(0.05)[:4])), "four trials show nothing"
    required = frame_at(*trials(0.01), require=(Requirement.parse(ANSWERS, ">= initial - 0.5"),))
    assert "answers_fall_with_distance" not in rules(required), "the requirement decides"
    guarded = frame_at(*trials(0.01), require=default_requirements(required.spec.base))
    assert EXACT_BOUND in {requirement.name for requirement in guarded.spec.require}
    assert "answers_fall_with_distance" in rules(guarded), "the bound of every sweep allows them to fall"


def test_the_panel_shows_objective_against_distance(tmp_path: Path) -> None:
    def script(trial: Trial) -> Script:
        quality, kl = [(0.3, 0.05), (0.2, 0.1), (0.9, 0.4), (0.5, 0.2)][trial.number]
        return Script(quality, -0.95, {KL: kl}, DIVERGED if trial.number == 3 else COMPLETE)

    spec = make_spec(search={RATE: {"choice": [1e-7, 3e-7, 1e-6, 3e-6]}})
    analysis = analyze(frame_of(run_sweep(tmp_path, spec, script)))
    panel = distance_panel(analysis)
    assert panel is not None
    table = next(block for block in panel.blocks if isinstance(block, Table))
    assert table.head[:4] == ("trial", "learning_rate", "accuracies/logp", "KL per token")
    assert [row[0] for row in table.rows] == ["0", "2"]
    assert [row[3] for row in table.rows] == ["0.05", "0.40"]
    (chart,) = next(block for block in panel.blocks if isinstance(block, Charts)).charts
    (front,) = [trace for trace in chart.figure["data"] if "lines" in trace["mode"]]
    assert front["x"] == [0.05, 0.4]
    xs = sorted(x for trace in chart.figure["data"] for x in trace["x"])
    assert xs == [0.0, 0.05, 0.1, 0.4], "the initial model and the complete trials"
    page = report_page(analysis)
    assert "Gain against distance" in page
    assert "KL per token" in page
    json.dumps(chart.figure, allow_nan=False)


def test_one_trial_has_no_front_to_show(tmp_path: Path) -> None:
    frame = frame_of(run_sweep(tmp_path, make_spec(search={RATE: {"choice": [1e-7]}}), lambda _: HEALTHY))
    assert distance_panel(analyze(frame)) is None
