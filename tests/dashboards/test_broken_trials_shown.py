"""Every place that names a best trial leaves out those that break a requirement, and says which one they break."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dashboards.analysis.comparison import compare_sweeps
from dashboards.analysis.follow_up import follow_up
from dashboards.diagnosis.diagnose import analyze
from dashboards.mlflow_pages import run_description
from dashboards.report.comparison_page import comparison_page
from dashboards.report.html_page import report_page
from dashboards.terminal.trial_tables import print_final_summary
from orchestrator.cli.sweep_summary import print_summary
from orchestrator.commands import status as status_command
from orchestrator.commands.model_export import export_best_model, model_card
from orchestrator.driver.judge_candidates import make_judge_task
from orchestrator.driver.parent_run import apply_changed_requirements, end_parent_run
from orchestrator.errors import ExitCode, NoTrialCompleted
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.execution.trial_lifecycle import AttemptLauncher, finish_attempt
from orchestrator.folders import SweepFolder
from orchestrator.report_data import as_json
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.requirements import Requirement
from orchestrator.spec.sweep_spec import Budget, Objective
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE
from tests.support.recorders import ListSink, SilentView
from tests.support.scripted_sweep import Script, TrialCurves, frame_of, make_spec, run_sweep
from tests.support.specs import METRIC
from trainer.metrics import MARGIN
from trainer.results import StepMetrics

ANSWERS = "eval_exact_answers"
REQUIRE = (Requirement.parse(ANSWERS, ">= initial"),)
SEARCH = {"loss.beta": {"choice": [2.0, 4.0, 8.0]}}
BREAKS = "eval_exact_answers 0.25 < 0.5"
"""Of the trial with the highest accuracy; the initial model answers half of the prompts right."""


def swept(root: Path, answers: Mapping[float, float], **more: Any) -> SweepFolder:
    """A sweep of three betas; the higher beta, the higher the accuracy."""

    def script(trial: Any) -> Script:
        beta = trial.config.loss.beta
        return Script(quality=0.1 + beta / 10, last={ANSWERS: answers[beta]})

    return run_sweep(root, make_spec(search=SEARCH, require=REQUIRE, **more), script)


@pytest.fixture
def one_breaks(fast_tmp_path: Path) -> SweepFolder:
    return swept(fast_tmp_path, {2.0: 0.5, 4.0: 0.6, 8.0: 0.25})


@pytest.fixture
def all_break(fast_tmp_path: Path) -> SweepFolder:
    return swept(fast_tmp_path, {2.0: 0.4, 4.0: 0.3, 8.0: 0.25})


def summary(folder: SweepFolder) -> str:
    console = Console(record=True, width=200, force_terminal=False)
    with Study.open(folder, read_only=True) as study:
        views = [TrialCurves(record) for record in study.trials()]
        print_final_summary(study.spec, views, console, updates_of=None)
    return console.export_text()


def described(folder: SweepFolder) -> str:
    with Study.open(folder, read_only=True) as study:
        return run_description(study.spec, study.trials(), "finished", findings=analyze(frame_of(folder)).findings)


def ended(folder: SweepFolder) -> Mapping[str, str]:
    """The tags of MLflow's parent run."""
    sink = ListSink()
    with Study.open(folder, read_only=True) as study:
        end_parent_run(study, sink, "finished", "FINISHED", "", at=1.0)
    return sink.tags("sweep")


def test_the_best_is_the_best_of_those_that_keep_the_requirement(one_breaks: SweepFolder) -> None:
    listed = "1 of 3 complete trials break a requirement and cannot be the best: eval_exact_answers >= initial: trial 2"
    shown = summary(one_breaks)
    assert "Best: trial 1" in shown
    assert f"breaks: {BREAKS}" in shown
    assert listed in shown
    found = status_command.best("s", one_breaks.path.parent)
    assert (found["number"], found["initial"][ANSWERS]) == (1, 0.5)
    status = status_command.status("s", one_breaks.path.parent)
    assert status["best"] == 1
    assert status["initial"][ANSWERS] == 0.5
    assert [trial["breaks"] for trial in status["trials"]] == [[], [], [BREAKS]]
    assert "**Best: [trial 1]" in described(one_breaks)
    assert "eval_exact_answers 0.25 &lt; 0.5" in described(one_breaks)
    analysis = analyze(frame_of(one_breaks))
    page = report_page(analysis)
    assert "best: trial 1" in page
    assert f"{listed}." in page.replace("&gt;", ">")
    assert "eval_exact_answers 0.25 &lt; 0.5" in page
    assert [(f.rule, f.trials) for f in analysis.findings if f.rule == "requirements"] == [("requirements", ("2",))]
    assert as_json(analysis)["best"]["trial"] == 1
    assert as_json(analysis)["breaks"] == {"2": [BREAKS]}
    (compared,) = compare_sweeps([frame_of(one_breaks)]).sweeps
    assert compared.own_best is not None
    assert (compared.own_best.number, compared.trial and compared.trial.number) == (1, 1)
    tags = ended(one_breaks)
    assert (tags["best.trial"], tags["requirements"]) == ("1", listed)


def test_where_none_keeps_it_no_trial_is_called_the_best(all_break: SweepFolder) -> None:
    root = all_break.path.parent
    none = "None of the 3 complete trials keeps every requirement, so none is the best; nearest is trial 0 "
    shown = summary(all_break)
    assert f"{none}(eval_exact_answers 0.4 < 0.5)" in shown
    assert "Best:" not in shown
    assert "★" not in shown
    assert status_command.status("s", root)["best"] is None
    for command in (
        lambda: status_command.best("s", root),
        lambda: export_best_model("s", root, root / "exported", merge=False),
    ):
        with pytest.raises(NoTrialCompleted, match="nearest is trial 0"):
            command()
    with (
        Study.open(all_break, read_only=True) as study,
        pytest.raises(NoTrialCompleted, match="nearest is trial 0"),
    ):
        make_judge_task(study, JudgeConfig())
    text = described(all_break)
    assert none in text
    assert "Best:" not in text
    assert "--export" not in text
    analysis = analyze(frame_of(all_break))
    assert [(f.rule, f.level) for f in analysis.findings if f.rule == "requirements"] == [("requirements", "serious")]
    page = report_page(analysis)
    assert none in page
    assert "best: trial" not in page
    assert as_json(analysis)["best"] is None
    assert any("nearest is trial 0" in note for note in follow_up(analysis, ()).notes)
    tags = ended(all_break)
    assert tags["requirements"].startswith(none)
    assert "best.trial" not in tags


def test_the_last_lines_of_such_a_sweep_name_another_bound_and_no_export(
    all_break: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with Study.open(all_break, read_only=True) as study:
        assert print_summary(all_break, study.spec, StopReason(StopKind.FINISHED)) == ExitCode.DONE
    last = " ".join(capsys.readouterr().err.split())
    assert last.startswith("No trial to export: none keeps every requirement, trial 0 is nearest.")
    assert f"orchestrate resume s --set 'require.{ANSWERS}=\"BOUND\"'" in last
    assert "--export" not in last


def test_one_trial_and_several_objectives_say_it_too(fast_tmp_path: Path) -> None:
    also = Objective(metric=MARGIN, direction="maximize")
    for name, more in (("front", {"also": (also,)}), ("one", {"budget": Budget(trials=1)})):
        folder = swept(fast_tmp_path / name, {2.0: 0.4, 4.0: 0.3, 8.0: 0.25}, **more)
        text = (
            "The complete trial does not keep every" if name == "one" else "None of the 3 complete trials keeps every"
        )
        analysis = analyze(frame_of(folder))
        for shown in (summary(folder), described(folder), report_page(analysis), ended(folder)["requirements"]):
            assert text in shown
            assert "★" not in shown
        with pytest.raises(NoTrialCompleted, match="nearest is trial 0"):
            status_command.best("s", folder.path.parent)
        (compared,) = compare_sweeps([frame_of(folder)]).sweeps
        assert compared.trial is None
        assert text[1:] in comparison_page(compare_sweeps([frame_of(folder)]))


def test_a_model_card_lists_the_bounds_and_what_the_model_has(one_breaks: SweepFolder) -> None:
    with Study.open(one_breaks, read_only=True) as study:
        best = study.best()
        assert best is not None
        card = model_card(study.spec, best, None, merged=False, initial=study.initial_metrics())
        bare = study.spec.model_copy(update={"require": ()})
        assert "## Requirements" not in model_card(bare, best, None, merged=False)
    assert "| bound | this model |\n|---|---|\n| eval_exact_answers >= initial (0.5) | 0.6 |" in card


def test_a_sweep_without_requirements_shows_nothing_of_them(fast_tmp_path: Path) -> None:
    folder = run_sweep(fast_tmp_path, make_spec(search=SEARCH), lambda _: Script(last={ANSWERS: 0.1}))
    shown = f"{summary(folder)}{described(folder)}{report_page(analyze(frame_of(folder)))}"
    assert "requirement" not in shown
    assert "breaks" not in shown
    assert "requirements" not in ended(folder)
    assert "breaks" not in status_command.status("s", folder.path.parent)["trials"][0]


def test_a_run_in_mlflow_is_tagged_with_what_its_trial_breaks(fast_tmp_path: Path) -> None:
    sink = ListSink()
    spec = make_spec(search=SEARCH, require=REQUIRE)
    with Study.create(SweepFolder(fast_tmp_path, "s"), spec, slots=2) as study:
        launcher = AttemptLauncher(study, sink, SilentView(), lambda config, _: config)
        for answers in (0.25, 0.5):
            trial = study.ask()
            assert isinstance(trial, Trial)
            active = launcher.start_attempt(trial)
            metrics = [{METRIC: 0.5, ANSWERS: 0.5}, {METRIC: 0.7, ANSWERS: answers}]
            study.report(trial, [StepMetrics(10 * k, each) for k, each in enumerate(metrics)])
            finish_attempt(study, sink, active, COMPLETE)
    assert sink.tags("0")["breaks"] == BREAKS
    assert "breaks" not in sink.tags("1")


def test_another_bound_on_resume_follows_into_mlflow_and_names_lost_weights(one_breaks: SweepFolder) -> None:
    sink = ListSink()
    with Study.open(one_breaks) as study:
        assert apply_changed_requirements(study, sink) == []
        assert sink.calls == []
        changed = load_spec_text(dump_spec(study.spec), one_breaks.path, [f'require.{ANSWERS}=">= initial - 0.3"'])
        assert [change.path for change in study.amend(changed)] == [f"require.{ANSWERS}"]
        (notice,) = apply_changed_requirements(study, sink)
        assert notice == (
            "by the changed requirements trial 2 is the best, and its weights were removed when it was not"
        )
    assert [sink.tags(str(number))["breaks"] for number in range(3)] == ["none", "none", "none"]
    assert status_command.best("s", one_breaks.path.parent)["number"] == 2
