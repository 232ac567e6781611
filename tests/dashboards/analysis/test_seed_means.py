"""A configuration trained with several seeds is one row with mean and interval, wherever trials are shown."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dashboards.analysis.param_effects import seed_groups
from dashboards.analysis.seed_means import merge_curves
from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.diagnosis.diagnose import analyze
from dashboards.mlflow_pages import run_description
from dashboards.report.html_page import report_page
from dashboards.terminal.command_output import print_best, print_status
from dashboards.terminal.trial_tables import print_final_summary
from orchestrator.commands.model_export import model_card
from orchestrator.commands.status import best, status
from orchestrator.execution.trial_lifecycle import AttemptLauncher
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.dashboards.report.test_report import Tree
from tests.support.recorders import ListSink, SilentView
from tests.support.scripted_sweep import Script, frame_of, make_spec, run_sweep
from tests.support.specs import METRIC

BETAS = {"loss.beta": {"choice": [2.0, 10.0]}}
SWEEPS = {
    "repeats": make_spec(search=BETAS, repeats=3),
    "a list of seeds": make_spec(search=BETAS | {"training.seed": {"choice": [42, 43, 44]}}),
}


def one_lucky_seed(trial: Trial) -> Script:
    """Beta 2 has one seed that is far ahead; beta 10 is better on average."""
    if trial.params["loss.beta"] == 2.0:
        return Script(quality=0.9 if trial.config.training.seed == 43 else 0.2)
    return Script(quality=0.6)


@pytest.fixture(params=SWEEPS)
def swept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SweepSpec, SweepFolder]:
    spec = SWEEPS[request.param]
    return spec, run_sweep(tmp_path, spec, one_lucky_seed)


def test_best_status_and_summary_show_one_row_a_configuration(
    swept: tuple[SweepSpec, SweepFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    spec, folder = swept
    found = best("s", folder.root)
    assert (found["number"], found["params"], found["complete_seeds"]) == (3, {"loss.beta": 10.0}, 3)
    assert [seed["seed"] for seed in found["seeds"]] == [42, 43, 44]
    assert found["interval"] == pytest.approx([found["value"], found["value"]])
    print_best(found)
    shown = capsys.readouterr().out
    assert "training.seed" not in shown
    shown_status = status("s", folder.root)
    assert [trial["number"] for trial in shown_status["trials"]] == list(range(6)), "every training, as before"
    assert [entry["label"] for entry in shown_status["configurations"]] == ["0-2", "3-5"]
    print_status(shown_status)
    rows = capsys.readouterr().out
    assert "0-2" in rows
    assert "★ 3-5" in rows
    assert "(3 seeds)" in rows
    assert "training.seed" not in rows
    with Study.open(folder) as study:
        curves = [TrialCurves(record) for record in study.trials()]
        for each in curves:
            each.add(study.metric_history(each.record.number))
        text = run_description(spec, study.trials(), "finished")
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    print_final_summary(spec, curves, console, updates_of=lambda _: 40)
    summary = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Best: trials 3-5  beta=10" in summary
    assert " ± " in summary
    assert "seed=" not in summary
    assert "mean of 3 seeds, 95% interval" in text
    merged = merge_curves(curves, spec)[0]
    finals = [each.values(METRIC)[-1] for each in curves[:3]]
    assert merged.values(METRIC)[-1] == pytest.approx(sum(finals) / 3)


def test_the_report_ranks_and_tests_means(swept: tuple[SweepSpec, SweepFolder]) -> None:
    frame = frame_of(swept[1])
    assert [trial.label for trial in frame.ranked] == ["3-5", "0-2"]
    assert (frame.paths, len(frame.trials), len(frame.all_trials)) == (("loss.beta",), 2, 6)
    assert [len(group.trials) for group in seed_groups(frame)] == [3, 3]
    analysis = analyze(frame)
    assert analysis.significance is not None
    ((other, difference),) = analysis.significance.runners_up
    winner = frame.ranked[0].record.value
    assert winner is not None
    assert other.record.value is not None
    assert difference.mean == pytest.approx(winner - other.record.value)
    text = Tree(report_page(analysis)).text
    assert "95 % t interval over seeds" in text
    assert "Trials that differ in training.seed only are one configuration" in text


def test_the_model_card_names_the_seed_of_its_weights(swept: tuple[SweepSpec, SweepFolder]) -> None:
    spec, folder = swept
    with Study.open(folder) as study:
        record = study.best()
    assert record is not None
    card = model_card(spec, record, None, merged=False)
    searched, _, fixed = card.partition("## Configuration")
    assert "mean of 3 seeds, 95% interval" in searched
    assert "(training.seed 42)" in searched
    assert "| training.seed |" not in searched
    assert "| training.seed | 42 |" in fixed


def test_a_training_is_tagged_with_its_group_and_repeat(tmp_path: Path) -> None:
    for name, spec in SWEEPS.items():
        sink = ListSink()
        with Study.create(SweepFolder(tmp_path / name, "s"), spec, slots=4) as study:
            launcher = AttemptLauncher(study, sink, SilentView(), lambda config, _: config)
            for _ in range(4):
                trial = study.ask()
                assert isinstance(trial, Trial)
                launcher.start_attempt(trial)
        tags = [sink.tags(str(number)) for number in range(4)]
        assert [(tag["group"], tag["repeat"]) for tag in tags] == [("0", "0"), ("0", "1"), ("0", "2"), ("3", "0")]
