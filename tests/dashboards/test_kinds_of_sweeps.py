"""Sweeps in which no trial keeps the requirements, of one trial, and of several objectives: what each command says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.parent_run import end_parent_run, start_parent_run
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.objectives import Objective
from orchestrator.spec.requirements import Requirement
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from orchestrator.tracking.run_metadata import NOTE
from tests.support.processes import call, json_of
from tests.support.recorders import ListSink
from tests.support.scripted_sweep import Script, make_spec, run_sweep
from trainer.metrics import CHOSEN, EXACT_ANSWERS

RATE = "training.learning_rate"
RATES = {RATE: {"choice": [1e-6, 3e-6, 1e-5]}}
NEAR = {"require": (Requirement.parse(CHOSEN, ">= initial - 0.5"),)}
"""A bound that the initial model keeps and no trial does."""
HIGH = {"require": (Requirement.parse(EXACT_ANSWERS, ">= 0.9"),)}
"""A bound that the initial model, with half of the answers right, breaks too."""
BOTH = {"also": (Objective(metric=EXACT_ANSWERS, direction="maximize"),)}


def trades(trial: Trial) -> Script:
    """Each trial has a better objective, fewer right answers and less likely chosen responses than the one before."""
    answers = {EXACT_ANSWERS: 0.5 - trial.number / 10}
    return Script(quality=0.2 + 0.2 * trial.number, chosen=-3.0 - trial.number / 10, last=answers)


@pytest.fixture
def swept(tmp_path: Path) -> Callable[..., SweepFolder]:
    def make(name: str, search: Any = RATES, **more: Any) -> SweepFolder:
        return run_sweep(tmp_path, make_spec(name=name, search=search, **more), trades)

    return make


def tracked(folder: SweepFolder) -> dict[str, str]:
    """The tags of the parent run after a driver's life."""
    sink = ListSink()
    with Study.open(folder) as study:
        start_parent_run(study, sink, DashboardReporter(), "fingerprint")
        end_parent_run(study, sink, "FINISHED", "FINISHED", "")
        return sink.tags(SWEEP_RUN) | {NOTE: DashboardReporter().describe(study, "finished", updates_of=None)}


def said(folder: SweepFolder, *arguments: str, code: int = 0) -> str:
    ended, out, err = call(folder.root, *arguments)
    assert ended == code, out + err
    return " ".join((out + err).split())


@pytest.mark.parametrize("more", [{}, BOTH])
def test_where_no_trial_keeps_the_requirements_every_command_says_so_and_suggest_goes_nearer(
    more: dict[str, Any], swept: Callable[..., SweepFolder], tmp_path: Path
) -> None:
    folder, one = swept("bounded", **NEAR, **more), swept("one", {})
    none = "one of the 3 complete trials keeps every requirement, so none is the best; nearest is trial 0"
    assert none in said(folder, "status", "bounded")
    assert "breaks: eval_logps_per_token/chosen -3" in said(folder, "status", "bounded")
    assert "★" not in said(folder, "status", "bounded")
    for command in (["best", "bounded"], ["best", "bounded", "--export", str(tmp_path / "out")], ["judge", "bounded"]):
        assert none in said(folder, *command, code=3)
    assert not (tmp_path / "out").exists()
    found = json_of(folder.root, "report", "bounded")
    assert (found["best"], found["front"]) == (None, [])
    assert none in found["requirements"]
    assert none in folder.report.read_text(encoding="utf-8")
    assert "no trial keeps the requirements" in said(folder, "compare", "bounded", "one")
    assert folder.root == one.root
    tags = tracked(folder)
    assert "best.trial" not in tags
    assert none in tags["requirements"]
    assert none in tags[NOTE]
    assert "--export" not in tags[NOTE]

    text = call(folder.root, "suggest", "bounded")[1]
    follow_up = load_spec_text(text, tmp_path)
    assert max(follow_up.search.choices(RATE) or ()) < 1e-6
    assert follow_up.require == NEAR["require"]
    assert "every complete trial breaks a requirement, the lowest rate is 1e-6" in " ".join(
        text.replace("#", "").split()
    )


def test_a_bound_that_the_initial_model_breaks_too_is_named_instead_of_lower_rates(
    swept: Callable[..., SweepFolder],
) -> None:
    folder = swept("high", **HIGH)
    (finding,) = [f for f in json_of(folder.root, "report", "high")["findings"] if f["rule"] == "requirements"]
    assert "The initial model breaks: eval_exact_answers 0.5 < 0.9." in finding["evidence"]
    assert finding["moves"] == []
    assert "set a bound that can be kept" in finding["next_step"]
    refused = said(folder, "suggest", "high", code=3)
    assert "the initial model breaks a requirement too (eval_exact_answers 0.5 < 0.9)" in refused
    assert "orchestrate resume high --set 'require.eval_exact_answers=\"BOUND\"'" in refused


def test_a_sweep_of_one_trial_is_compared_with_the_initial_model_alone(swept: Callable[..., SweepFolder]) -> None:
    folder, other = swept("one", {}), swept("two", {})
    assert "best: trial 0, after 40 updates" in said(folder, "best", "one")
    assert "the only configuration" in said(folder, "best", "one")
    assert "Only one trial completed: it can only be compared with the initial model." in folder_page(folder)
    assert "name: one-2" in said(folder, "suggest", "one")
    assert "one" in said(folder, "compare", "one", "two")
    assert "**Best: [trial 0](mlflow:0)** `the only configuration`" in tracked(folder)[NOTE]
    assert other.root == folder.root


def folder_page(folder: SweepFolder) -> str:
    called = said(folder, "report", folder.name)
    assert called.endswith("report.html")
    return folder.report.read_text(encoding="utf-8")


def test_a_sweep_of_several_objectives_shows_its_front_everywhere(swept: Callable[..., SweepFolder]) -> None:
    folder = swept("both", **BOTH)
    swept("one", {})
    best = said(folder, "best", "both")
    assert "first of 3 trials of the Pareto front: trial 2" in best
    assert said(folder, "status", "both").count("★") == 3
    page = folder_page(folder)
    assert "Pareto front, which no other trial equals or beats in every objective: 2, 1, 0. By eval_" in page
    assert "first of the Pareto front: trial 2" in page
    found = json_of(folder.root, "report", "both")
    assert [goal["metric"] for goal in found["goals"]] == ["eval_accuracies/logp", EXACT_ANSWERS]
    assert found["front"] == [2, 1, 0]
    tags = tracked(folder)
    assert (tags["goals"], tags["front.trials"]) == (
        f"maximize eval_accuracies/logp, maximize {EXACT_ANSWERS}",
        "2, 1, 0",
    )
    assert "**Pareto front: trials [2](mlflow:2), [1](mlflow:1), [0](mlflow:0).** The first has" in tags[NOTE]
    text = said(folder, "suggest", "both")
    assert "first of the Pareto front of 3" in text.replace("# ", "")
    assert "eval_exact_answers 0.3" in text
