"""Interactions of settings and importances: found where they were put in, unknown where trials are too few."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashboards.analysis.interactions import Interaction, describe, interacting_paths, interactions
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.diagnose import analyze
from dashboards.report.blocks import Paragraph, Table
from dashboards.report.panels.heatmaps import interactions_panel
from dashboards.report.panels.hyperparameters import importance_panel
from orchestrator.report_data import as_json
from orchestrator.study.importance import MIN_PED_ANOVA_TRIALS
from orchestrator.study.trial_records import Trial
from tests.support.scripted_sweep import Script, frame_of, make_spec, run_sweep

RATE, BETA, GAMMA = "training.learning_rate", "loss.beta", "loss.gamma"
GRID = {GAMMA: {"choice": [0.3, 1.0]}, BETA: {"choice": [2.0, 10.0]}, RATE: {"choice": [3e-7, 1e-6, 3e-6]}}
RANGES = {RATE: {"log_uniform": [1e-7, 1e-5]}, BETA: {"uniform": [1.0, 10.0]}}


def crossed(trial: Trial) -> Script:
    """Beta 10 is better with the higher rates only; gamma adds the same everywhere."""
    higher = trial.params[BETA] == 10 and trial.params[RATE] > 5e-7
    return Script(quality=0.2 + 0.5 * higher + 0.2 * (trial.params[GAMMA] == 1.0))


def by_pair(frame: SweepFrame) -> dict[tuple[str, str], Interaction]:
    paths = interacting_paths(frame, [])
    return {(found.first, found.second): found for found in interactions(frame, paths)}


def test_the_effect_of_beta_depends_on_the_rate_and_not_on_gamma(tmp_path: Path) -> None:
    goal = {"metric": "eval_margins/logp", "direction": "maximize"}
    frame = frame_of(run_sweep(tmp_path, make_spec(search=GRID, goal=goal), crossed))
    found = by_pair(frame)
    assert list(found) == [(BETA, GAMMA), (BETA, RATE), (GAMMA, RATE)]
    assert found[BETA, RATE].is_clear
    assert found[BETA, RATE].mean == pytest.approx(0.5)
    assert describe(frame, found[BETA, RATE]) == "beta 2 → 10, at learning_rate 1e-6 against 3e-7"
    assert not found[BETA, GAMMA].is_clear
    assert not found[GAMMA, RATE].is_clear
    assert {each.comparisons for each in found.values()} == {7}, "one family: 1 + 3 + 3 differences of differences"
    in_json = {tuple(each["settings"]): each for each in as_json(analyze(frame))["interactions"]}
    assert [pair for pair, each in in_json.items() if each["effect"]["clear"]] == [(BETA, RATE)]
    assert in_json[BETA, RATE]["steps"] == found[BETA, RATE].steps
    assert in_json[BETA, RATE]["effect"]["mean"] == pytest.approx(0.5)
    panel = interactions_panel(analyze(frame))
    assert panel is not None
    (table,) = [block for block in panel.blocks if isinstance(block, Table)]
    verdicts = [row[3].split(" (")[0] for row in table.rows]
    assert verdicts == ["not distinguishable from none", "depend on each other", "not distinguishable from none"]


def drawn(root: Path, trials: int, strength: float) -> SweepFrame:
    rng = np.random.default_rng(0)

    def script(trial: Trial) -> Script:
        place = (math.log10(trial.params[RATE]) + 6, (trial.params[BETA] - 5.5) / 4.5)
        return Script(quality=0.5 + 0.1 * place[0] + strength * place[0] * place[1] + 0.02 * rng.normal())

    more: dict[str, Any] = {"sampler": {"kind": "random", "seed": 3}, "budget": {"trials": trials}}
    goal = {"metric": "eval_margins/logp", "direction": "maximize"}
    return frame_of(run_sweep(root, make_spec(search=RANGES, goal=goal, **more), script, pairs=20))


def test_settings_drawn_from_ranges_are_fitted(tmp_path: Path) -> None:
    found = by_pair(drawn(tmp_path / "strong", 24, 0.15))[BETA, RATE]
    assert found.fitted
    assert found.is_clear
    assert found.low < 4 * 0.15 < found.high
    none = by_pair(drawn(tmp_path / "none", 24, 0.0))[BETA, RATE]
    assert not none.is_clear


def test_too_few_trials_are_said_to_be_too_few(tmp_path: Path) -> None:
    panel = interactions_panel(analyze(drawn(tmp_path, 6, 0.15)))
    assert panel is not None
    (text,) = [block.text for block in panel.blocks if isinstance(block, Paragraph)]
    assert text.startswith("beta × learning_rate: too few trials: no four complete trials")
    assert "a linear model needs 14 complete trials (there are 6)" in text


def test_ped_anova_stands_beside_fanova_and_knows_conditional_settings(tmp_path: Path) -> None:
    search = {
        "loss.kind": {"choice": ["simpo", "cpo"]},
        GAMMA: {"choice": [0.5, 1.0, 1.5, 2.0], "when": {"loss.kind": "simpo"}},
        RATE: {"choice": [1e-7, 3e-7, 1e-6, 3e-6, 1e-5]},
    }

    def script(trial: Trial) -> Script:
        return Script(quality=0.2 + 0.2 * math.log10(trial.params[RATE] * 1e7) + 0.01 * (trial.number % 3))

    analysis = analyze(frame_of(run_sweep(tmp_path / "all", make_spec(search=search), script, pairs=50)))
    assert analysis.ped_anova.trials == 25
    assert next(iter(analysis.ped_anova.shares)) == RATE
    assert GAMMA in analysis.ped_anova.shares
    assert GAMMA not in analysis.importances
    assert sum(analysis.ped_anova.shares.values()) == pytest.approx(1.0)
    panel = importance_panel(analysis)
    assert panel is not None
    assert "PED-ANOVA, which Optuna recommends: which settings the best 20% of the trials have in common" in panel.lead
    few = analyze(frame_of(run_sweep(tmp_path / "few", make_spec(search=GRID), crossed, pairs=50)))
    assert few.ped_anova.shares == {}
    panel = importance_panel(few)
    assert panel is not None
    assert f"needs {MIN_PED_ANOVA_TRIALS} complete trials; there are 12" in panel.lead
