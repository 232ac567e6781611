"""What the report, the tables, `status` and `compare` say of finalists, from sweeps of scripted curves."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dashboards.analysis.comparison import compare_sweeps
from dashboards.analysis.load_frame import load_frame
from dashboards.analysis.seed_means import merge_curves
from dashboards.analysis.sweep_frame import SweepFrame, TrialCurves
from dashboards.diagnosis.diagnose import analyze
from dashboards.formatting import format_signed, wide_console
from dashboards.report.blocks import KeyFigures, Paragraph, Table
from dashboards.report.panels import PANELS
from dashboards.report.panels.finalists_panel import finalists_panel
from dashboards.report.panels.judgements_panel import judgements_panel
from dashboards.report.panels.result_panels import winner_panel
from dashboards.sweep_reporter import DashboardReporter
from dashboards.terminal.command_output import print_best, print_status
from dashboards.terminal.trial_tables import print_final_summary
from orchestrator.commands.status import best, status
from orchestrator.driver.finalists_stage import confirm_finalists
from orchestrator.driver.parent_run import end_parent_run
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.report_data import as_json, reasons_not_to_export
from orchestrator.spec.sweep_spec import Finalists, Objective
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.dashboards.report.test_judged import judgement
from tests.support import scripted_sweep
from tests.support.recorders import ListSink
from tests.support.scripted_sweep import Script, make_spec, run_sweep
from tests.support.specs import METRIC
from trainer.metrics import CHOSEN
from trainer.metrics import KL as KL_METRIC
from trainer.results import StepMetrics

SEARCH = {"loss.beta": {"choice": [2.0, 4.0, 8.0]}, "loss.gamma": {"choice": [1.0]}}
DATA = {"train": [{"generated": "instructions"}], "confirm_share": 0.5}


def lucky(trial: Trial) -> Script:
    """Beta 8 is best in the search by luck; confirmed, beta 4 is."""
    beta = trial.config.loss.beta  # type: ignore[union-attr]
    if trial.config.data.eval_on == "confirm":
        return Script(quality={4.0: 0.6, 8.0: 0.3}[beta] + 0.01 * (trial.config.training.seed % 3))
    return Script(quality={2.0: 0.2, 4.0: 0.5, 8.0: 0.7}[beta])


def confirmed(root: Path, name: str = "s", script: Any = lucky) -> tuple[SweepFolder, SweepFrame]:
    spec = make_spec(name, SEARCH, base={"data": DATA}, finalists=Finalists(top=2, seeds=3))
    folder = run_sweep(root, spec, script)
    with Study.open(folder) as study:
        confirm_finalists(study, ListSink(), DashboardReporter(), lambda _: None)
        return folder, load_frame(study, state="finished", updates_of=lambda _: 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepFolder, SweepFrame]:
    return confirmed(tmp_path_factory.mktemp("runs"))


def test_the_report_has_the_values_of_the_search_beside_the_confirmed_ones(
    made: tuple[SweepFolder, SweepFrame],
) -> None:
    frame = made[1]
    assert frame.confirmation is not None
    assert (frame.confirmation.pairs, frame.confirmation.recommended) == (scripted_sweep.PAIRS, 1)
    assert [trial.number for trial in frame.trials] == [0, 1, 2], "finalists are no trials of the search"
    assert (len(frame.all_trials), frame.planned) == (9, 9)
    panel = finalists_panel(analyze(frame))
    assert panel is not None
    (table,) = [block for block in panel.blocks if isinstance(block, Table)]
    in_search, confirmed_value = ([float(row[k]) for row in table.rows] for k in (3, 4))
    assert [row[0] for row in table.rows] == ["1", "2"], "the best confirmed one first"
    assert in_search[1] > in_search[0]
    assert confirmed_value[0] > confirmed_value[1]
    assert table.marked == {0}
    text = " ".join(block.text for block in panel.blocks if isinstance(block, Paragraph))
    assert "Trial 1's configuration is clearly better than the other finalists" in text
    assert f"{scripted_sweep.PAIRS} held-out pairs, corrected for 2 finalists" in text
    assert "the search's value is" in text
    drawn = [panel for make in PANELS if (panel := make(analyze(frame))) is not None]
    assert "finalists" in {panel.key for panel in drawn}
    assert analyze(frame).significance is not None
    assert analyze(frame).significance.winner.number == 1  # type: ignore[union-attr]


def test_tables_and_commands_show_the_confirmed_winner(
    made: tuple[SweepFolder, SweepFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, frame = made
    found, root = best("s", folder.root), folder.root
    assert found["params"]["loss.beta"] == 4.0
    assert (found["complete_seeds"], found["finalists"]["recommended"]) == (3, 1)
    assert found["finalists"]["search_values"]["1"] == pytest.approx(frame.trials[1].record.value)
    print_best(found)
    shown = status("s", root)
    assert [trial.get("finalist_of") for trial in shown["trials"]] == [None] * 3 + [2, 1] * 3
    print_status(shown)
    with Study.open(folder) as study:
        curves = [TrialCurves(record) for record in study.trials()]
        for each in curves:
            each.add(study.metric_history(each.record.number))
        print_final_summary(study.spec, curves, wide_console(200), updates_of=None)
        assert [len(c.record.seeds) for c in merge_curves(curves, study.spec)] == [0, 0, 0, 3, 3]
    out = capsys.readouterr().out
    assert "value in the search" in out
    assert "finalists: trial 1's configuration is clearly better" in out
    assert "finalist, as trial 1; best, mean of 3 seeds" in " ".join(out.split())
    assert "Confirmed on held-out rows that the search has not seen; in the search it had" in out


def test_a_confirmed_mean_has_the_interval_of_seeds_and_pairs_everywhere(
    made: tuple[SweepFolder, SweepFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the seeds alone has no width where a share is the same for all of them."""
    folder, frame = made
    assert frame.confirmation is not None
    mean = frame.confirmation.values[0].mean
    found = best("s", folder.root)
    assert found["interval"] == [mean.low, mean.high]
    assert found["finalist_of"] == 1
    assert as_json(analyze(frame))["finalists"] == found["finalists"] == status("s", folder.root)["finalists"]
    print_best(found)
    shown = status("s", folder.root)
    print_status(shown)
    out = " ".join(capsys.readouterr().out.split())
    assert f"which counts seeds and {scripted_sweep.PAIRS} held-out pairs" in out
    assert "enqueued" not in out
    assert "finalist: trial 1's configuration" in out
    assert "seed 1 of 3" not in out
    sink = ListSink()
    with Study.open(folder) as study:
        record = study.best()
        assert record is not None
        assert record.seeds_text == f"mean of 3 seeds, 95% interval {mean.low:.4g} to {mean.high:.4g}"
        end_parent_run(study, sink, "FINISHED", "FINISHED", "")
    assert sink.tags(SWEEP_RUN)["best.interval"] == f"{mean.low} to {mean.high}"


def test_of_several_objectives_the_confirmed_front_is_marked_beside_the_initial_model_on_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trades(trial: Trial) -> Script:
        """What is better is further from the initial model, so that both finalists are on the front."""
        script = lucky(trial)
        return replace(script, last={KL_METRIC: script.quality, CHOSEN: -1.0})

    also = (Objective(metric=KL_METRIC, direction="minimize"),)
    spec = make_spec("front", SEARCH, base={"data": DATA}, also=also, finalists=Finalists(top=2, seeds=2))
    folder = run_sweep(tmp_path, spec, trades)
    with Study.open(folder) as study:
        confirm_finalists(study, ListSink(), DashboardReporter(), lambda _: None)
        curves = [TrialCurves(record) for record in study.trials()]
        for each in curves:
            history = study.metric_history(each.record.number)
            on = 0.25 if each.record.finalist_of is None else 0.75
            each.add([StepMetrics(0, {**history[0].metrics, METRIC: on}), *history[1:]])
        print_final_summary(study.spec, curves, wide_console(200), updates_of=None)
        front = [record.label for record in study.pareto_front()]
    out = capsys.readouterr().out
    marked = re.findall(r"★ (\S+)", out)
    assert sorted(marked) == sorted(front)
    assert set(front) <= {"3,5", "4,6"}
    assert f"The initial model has {METRIC}=0.75" in out
    assert "KL/token" not in out, "the objective has a column already"


def test_one_finalist_is_corrected_for_no_other(tmp_path: Path) -> None:
    spec = make_spec("one", {}, base={"data": DATA}, finalists=Finalists(top=3, seeds=2))
    with Study.open(run_sweep(tmp_path, spec, lambda trial: Script(quality=0.4))) as study:
        found = confirm_finalists(study, ListSink(), DashboardReporter(), lambda _: None)
    assert found is not None
    counted = f"(intervals count seeds and {scripted_sweep.PAIRS} held-out pairs)"
    assert found.text.startswith(f"trial 0's configuration is the only finalist {counted}. It is clearly better")


def gain_of(root: Path, quality: float) -> tuple[SweepFolder, SweepFrame]:
    """A sweep whose search gains, and whose finalists have this mean gap; the initial model's is 0.1."""

    def script(trial: Trial) -> Script:
        is_finalist = trial.config.data.eval_on == "confirm"
        return Script(quality=quality if is_finalist else lucky(trial).quality)

    return confirmed(root, script=script)


@pytest.mark.parametrize(
    ("quality", "level", "said"),
    [
        (0.0, "serious", "It is clearly worse than the initial model on the same rows (gain -"),
        (0.11, "warning", "It is not clearly better than the initial model on the same rows (gain +"),
        (0.6, None, "It is clearly better than the initial model on the same rows (gain +"),
    ],
)
def test_a_gain_of_the_search_is_measured_again_on_rows_that_it_has_not_seen(
    quality: float, level: str | None, said: str, tmp_path: Path
) -> None:
    folder, frame = gain_of(tmp_path, quality)
    assert frame.confirmation is not None
    assert said in frame.confirmation.text
    findings = {finding.rule: finding for finding in analyze(frame).findings}
    assert "gain_not_clear" not in findings
    found = findings.get("gain_not_confirmed")
    assert (found and found.level) == level
    answer, panel = winner_panel(analyze(frame)), finalists_panel(analyze(frame))
    assert answer is not None
    assert panel is not None
    (block,) = [block for block in answer.blocks if isinstance(block, KeyFigures)]
    figures = {figure.name: figure for figure in block.figures}
    gain = frame.confirmation.gain
    assert gain is not None
    assert figures["better than the initial model by"].value == format_signed(gain.value)
    (table,) = [block for block in panel.blocks if isinstance(block, Table)]
    column = table.head.index("better than the initial model by")
    assert table.rows[0][column].startswith(format_signed(gain.value))
    best_trial = best("s", folder.root)["number"]
    assert reasons_not_to_export("s", folder.root, best_trial) == (
        ["the confirmed configuration is no better than the initial model"] if level == "serious" else []
    )
    with Study.open(folder) as study:
        described = DashboardReporter().describe(study, "finished", updates_of=None)
    assert ("--export" in described) == (level != "serious")


def test_compare_uses_confirmed_values_where_every_sweep_has_them(
    made: tuple[SweepFolder, SweepFrame], tmp_path: Path
) -> None:
    def worse(trial: Trial) -> Script:
        return Script(quality=lucky(trial).quality - (0.25 if trial.config.data.eval_on == "confirm" else 0.0))

    other = confirmed(tmp_path, "other", worse)[1]
    plain = make_spec("plain", SEARCH)
    with Study.open(run_sweep(tmp_path, plain, lucky)) as study:
        unconfirmed = load_frame(study, state="finished")
    both = compare_sweeps([other, made[1]])
    assert [sweep.frame.name for sweep in both.sweeps] == ["s", "other"]
    assert [sweep.trial and sweep.trial.record.finalist_of for sweep in both.sweeps] == [1, 1]
    assert both.sweeps[1].behind is not None
    assert both.sweeps[1].behind.is_clear
    mixed = compare_sweeps([made[1], unconfirmed])
    assert [sweep.trial and sweep.trial.number for sweep in mixed.sweeps] == [2, 2]
    assert any("Only s confirmed its best by finalists" in text for text in mixed.warnings)


def test_judgements_of_finalists_come_before_those_of_the_search(tmp_path: Path) -> None:
    folder, _ = confirmed(tmp_path)
    with Study.open(folder) as study:
        best = study.best()
        assert best is not None
        other = next(r.number for r in study.trials() if r.finalist_of not in (None, best.finalist_of))
        for number, share in ((2, 0.5), (other, 0.6), (best.number, 0.8)):
            found = judgement(number, share)
            study.save_judgement(number, found.key, found.model_dump_json())
        analysis = analyze(load_frame(study, state="finished", updates_of=lambda _: 40))
    assert [trial.number for trial in analysis.frame.judged] == [best.number, other, 2]
    assert judgements_panel(analysis) is not None
    answer = winner_panel(analysis)
    assert answer is not None
    texts = [block.text for block in answer.blocks if isinstance(block, Paragraph)]
    assert any(text.startswith(f"Trial {best.number} wins 80%") for text in texts)
    assert as_json(analysis)["judge"].keys() == {"2", str(other), str(best.number)}
