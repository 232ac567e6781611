"""The terminal's views, rendered for real on consoles of several widths."""

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dashboards.analysis.distance import distance_column
from dashboards.analysis.sweep_frame import TrialCurves
from dashboards.formatting import (
    format_changes,
    format_duration,
    format_half_widths,
    format_intervals,
    format_measured,
    format_settings,
    format_value,
    progress_bar,
    short_names,
    sparkline,
)
from dashboards.terminal.advice_output import print_advice_of_plan
from dashboards.terminal.progress_views import REFRESH_SECONDS, LiveTableView, PlainLogView, SweepProgress, open_view
from dashboards.terminal.trial_tables import print_final_summary, trial_table
from orchestrator.cli.sweep_summary import watch_sweep
from orchestrator.spec.advice.advice_lines import AdviceLine
from orchestrator.spec.search.space import Choice, SearchSpace
from orchestrator.spec.sweep_spec import Objective, SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, Trial, TrialRecord, TrialState, rank_trials
from tests.support.scripted_sweep import COMPLETE, PRUNED, Script, make_spec, run_sweep
from trainer.config.trial import DataConfig, ModelConfig, TrialConfig
from trainer.results import StepMetrics

OBJECTIVE = Objective(metric="eval_accuracies/logp", direction="maximize")
SPEC = SweepSpec(
    name="shown",
    base=TrialConfig(model=ModelConfig(name_or_path="m"), data=DataConfig.model_validate({"train": "a.jsonl"})),
    search=SearchSpace(
        dimensions={"loss.beta": Choice(choice=(2.0, 2.5)), "training.learning_rate": Choice(choice=(6e-7, 1e-6))}
    ),
    goal=OBJECTIVE,
)
PARAMS = {"loss.beta": 2.5, "training.learning_rate": 6e-7}


def record(number: int, state: TrialState, **more: object) -> TrialRecord:
    return TrialRecord(number=number, state=state, params=PARAMS, attempts=1, **more)  # type: ignore[arg-type]


def curve(values: list[float]) -> list[StepMetrics]:
    return [StepMetrics(step, {"eval_accuracies/logp": v, "eval_margins/logp": v / 2}) for step, v in enumerate(values)]


@pytest.fixture(params=[60, 80, 120, 200])
def console(request: pytest.FixtureRequest) -> Console:
    return Console(file=io.StringIO(), width=request.param, height=30, force_terminal=True, color_system=None)


class Hands:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_stopped_trial_is_shown_with_its_reason_at_every_width(console: Console) -> None:
    view = LiveTableView(SweepProgress(SPEC, 3, lambda _: 4), console)
    view.update_trial(record(0, TrialState.RUNNING))
    view.add_metrics(0, curve([0.5, 0.6, 0.7]))
    view.update_trial(record(1, TrialState.RUNNING))
    view.update_trial(record(1, TrialState.PRUNED, reason="loss is nan at step 3", diverged=True))
    view.update_trial(record(2, TrialState.RUNNING))
    view.update_trial(record(2, TrialState.FAILED, reason="out of memory", failure=FailureKind.OUT_OF_MEMORY))
    view.close()
    shown = text_of(console)
    assert "trial 1 DIVERGED: loss is nan at step 3" in shown
    assert "trial 2 FAILED: out of memory" in shown
    assert all(len(line) <= console.width for line in shown.replace("\x1b", "\n").splitlines() if "[" not in line)


def test_plain_lines_carry_no_control_characters() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    view = PlainLogView(SweepProgress(SPEC, 1, lambda _: 2), console)
    view.update_trial(record(0, TrialState.RUNNING))
    view.add_metrics(0, curve([0.5, 0.75]))
    view.update_trial(record(0, TrialState.COMPLETE, value=0.75))
    shown = text_of(console)
    assert "\x1b" not in shown
    assert "trial 0 step 1/2  eval_accuracies/logp=0.75" in shown
    assert "trial 0 COMPLETE  beta=2.5 learning_rate=6e-7  eval_accuracies/logp=0.75" in shown


def test_the_summary_names_the_best_and_never_a_nan() -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    views = [
        TrialCurves(record(0, TrialState.COMPLETE, value=0.6)),
        TrialCurves(record(1, TrialState.COMPLETE, value=0.8)),
        TrialCurves(record(2, TrialState.COMPLETE, value=math.nan)),
    ]
    views[1].add(curve([0.5, 0.8]))
    print_final_summary(SPEC, views, console, updates_of=lambda _: 2)
    shown = text_of(console)
    assert "Best: trial 1" in shown
    assert "The initial model has eval_accuracies/logp=0.5" in shown


def test_the_summary_says_when_nothing_completed() -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    print_final_summary(
        SPEC, [TrialCurves(record(0, TrialState.PRUNED, reason="diverged"))], console, updates_of=lambda _: 2
    )
    assert "No trial completed" in text_of(console)


def test_an_interrupted_sweep_is_not_called_a_failure() -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    print_final_summary(SPEC, [TrialCurves(record(0, TrialState.RUNNING))], console, updates_of=None)
    assert "No trial has completed yet" in text_of(console)


def test_ranking_follows_the_goal_and_breaks_ties_by_number() -> None:
    records = [record(n, TrialState.COMPLETE, value=v) for n, v in enumerate([0.5, 0.7, 0.7, math.inf])]
    assert [r.number for r in rank_trials(records, OBJECTIVE)] == [1, 2, 0]
    assert [r.number for r in rank_trials(records, Objective(metric="eval_nll_loss", direction="minimize"))] == [
        0,
        1,
        2,
    ]


def test_a_step_seen_twice_is_shown_once() -> None:
    view = TrialCurves(record(0, TrialState.RUNNING))
    view.add(curve([0.1, 0.2]))
    view.add(curve([0.1, 0.9, 0.3]))
    assert view.values("eval_accuracies/logp") == [0.1, 0.2, 0.3]


def test_small_texts() -> None:
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█"
    assert sparkline([1, math.nan, 2]) == "▁!█"
    assert len(sparkline(list(range(1000)), 12)) == 12
    assert progress_bar(0.5, 4) == "━━──"
    assert format_duration(3700) == "1 h 01 min"
    assert short_names(["loss.beta", "model.beta", "training.learning_rate"]) == {
        "loss.beta": "loss.beta",
        "model.beta": "model.beta",
        "training.learning_rate": "learning_rate",
    }
    assert [format_value(v) for v in (6e-7, 0.73125, 2, None, "sigmoid", True)] == [
        "6e-7",
        "0.7312",
        "2",
        "–",
        "sigmoid",
        "True",
    ]


@pytest.mark.parametrize("width", [60, 90, 120])
def test_two_hundred_trials_fit_the_screen_with_the_running_and_the_best(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, height=24, force_terminal=True, color_system=None)
    clock = Hands()
    view = LiveTableView(SweepProgress(SPEC, 200, lambda _: 4, clock), console)
    for number in range(150):
        ended = record(number, TrialState.COMPLETE, value=0.9 if number == 7 else 0.5)
        view.update_trial(ended if number % 3 else record(number, TrialState.PRUNED, reason="an earlier verdict"))
    for number in (150, 151):
        view.update_trial(record(number, TrialState.RUNNING))
    view.add_metrics(151, curve([0.5, 0.6, 0.7]))
    before = len(text_of(console))
    clock.now += 1.0
    view.update_trial(record(150, TrialState.PRUNED, reason="a new verdict"))
    frame = text_of(console)[before:]
    view.close()
    last = frame.rpartition("\x1b[2K")[2]  # printing a line draws the table twice
    lines = [line for line in last.splitlines() if line.strip()]
    assert "trial 150 PRUNED: a new verdict" in frame
    assert len(lines) <= console.height
    assert "★ 7" in last
    assert any("151" in line and "RUNNING" in line for line in lines)
    assert "finished trials more" in frame
    assert "trial 3 PRUNED" not in text_of(console)


def test_what_comes_in_a_burst_is_drawn_once_and_nothing_is_left_undrawn() -> None:
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True, color_system=None)
    clock = Hands()
    view = LiveTableView(SweepProgress(SPEC, 200, lambda _: 4, clock), console)
    for number in range(200):
        view.update_trial(record(number, TrialState.COMPLETE, value=0.5))
        view.add_metrics(number, curve([0.4, 0.5]))
    assert text_of(console).count("/200 trials") == 1
    clock.now += REFRESH_SECONDS
    view.refresh()
    view.refresh()
    shown = text_of(console)
    view.close()
    assert shown.count("/200 trials") == 2
    assert "200/200 trials" in shown


def test_the_time_left_follows_from_the_speed_of_this_driver() -> None:
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True, color_system=None)
    clock = Hands()
    view = LiveTableView(SweepProgress(SPEC, 15, lambda _: 4, clock), console)
    clock.now += 300.0  # an sft stage before them
    for number in range(10):
        view.update_trial(record(number, TrialState.COMPLETE, value=0.5))  # an earlier driver's
    for number in (10, 11):
        clock.now += 30.0
        view.update_trial(record(number, TrialState.RUNNING))
        clock.now += 30.0
        view.update_trial(record(number, TrialState.COMPLETE, value=0.5))
    view.close()
    assert "12/15 trials · 7 min 00 s so far · about 3 min left" in text_of(console)


def test_sparklines_go_where_there_is_room_for_them() -> None:
    shown: dict[int, str] = {}
    for width in (50, 90, 140):
        console = Console(file=io.StringIO(), width=width, force_terminal=False)
        view = TrialCurves(record(0, TrialState.RUNNING))
        view.add(curve([0.1, 0.5, 0.9]))
        print_final_summary(SPEC, [view], console, updates_of=lambda _: 2)
        shown[width] = text_of(console)
    assert ["\u2581\u2585\u2588" in shown[width] for width in (50, 90, 140)] == [False, True, True]


@pytest.mark.parametrize("width", [40, 60, 80, 107, 108, 200])
def test_no_value_is_cut_at_any_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    params = {"loss.beta": 2.5, "loss.gamma": 1.375, "training.learning_rate": 6e-7, "training.seed": 12345}
    done = TrialRecord(number=12, state=TrialState.COMPLETE, params=params, attempts=1, value=0.7312, step=1000)
    view = TrialCurves(done)
    view.add(curve([0.1, 0.5, 0.7312]))
    console.print(trial_table([view], list(params), OBJECTIVE, updates_of=lambda _: 1000, width=width))
    shown = "".join(text_of(console).split())
    assert "…" not in shown
    for value in ("12", "COMPLETE", "2.5", "1.375", "6e-7", "12345", "0.7312"):
        assert value in shown, value
    assert all(len(line) <= width for line in text_of(console).splitlines())


def test_a_dumb_terminal_gets_plain_lines_and_whole_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, standard output is a terminal
    with Study.open(run_sweep(tmp_path, make_spec(), lambda _: Script(), trials=2)) as study:
        spec, views = study.spec, [TrialCurves(record) for record in study.trials()]
    console = Console(file=io.StringIO(), width=80, height=25, force_terminal=True)
    assert isinstance(open_view(spec, console), PlainLogView)
    console.print(trial_table(views, spec.search.paths, spec.first_objective, updates_of=None, width=80))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "COMPLETE" in shown
    assert "…" not in shown


def test_watching_a_sweep_that_is_over_shows_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_sweep(tmp_path, make_spec("mine"), lambda trial: Script(outcome=PRUNED if trial.number else COMPLETE), trials=2)
    watch_sweep("mine", tmp_path)
    messages = capsys.readouterr()
    assert "Best: trial 0" in messages.out
    assert "trial 1 PRUNED" in messages.err
    assert "2/12 trials" in messages.err
    assert "mine is interrupted" in messages.err
    assert "orchestrate resume mine" in messages.err


def test_a_pareto_front_is_marked_among_configurations_with_the_most_of_their_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(
        search={"loss.beta": {"choice": [2.0, 2.5]}}, repeats=2, also=[{"metric": "eval_loss", "direction": "minimize"}]
    )

    def script(trial: Trial) -> Script:
        return Script(quality=0.9 if trial.number == 0 else 0.5, outcome=PRUNED if trial.number == 1 else COMPLETE)

    folder = run_sweep(tmp_path, spec, script)
    watch_sweep(folder.name, tmp_path)
    shown = capsys.readouterr().out
    assert "★ 2-3" in shown
    assert "★ 0-1" not in shown, "one lucky seed"
    assert "trials 2-3 " in shown.partition("Pareto front of 2 objectives:")[2]


def test_a_resumed_sweep_counts_nothing_before_it_knows_its_trials() -> None:
    resumed = SweepProgress(make_spec(), total=None)
    assert "trials" not in resumed.headline()
    assert "0/12 trials" in SweepProgress(make_spec(), total=12).headline()


def test_what_stands_in_brackets_has_the_columns_number_format() -> None:
    assert format_changes([0.54, 0.6, None], [0.16, 0.2, None]) == ["0.54 (+0.16)", "0.60 (+0.20)", "–"]
    assert format_intervals([None, (0.012, -0.2, 0.16)]) == ["–", "0.012 (-0.200 … +0.160)"]
    assert format_half_widths([(0.1, 0.3), None, (0.1, 0.13)]) == [" ± 0.100", "", " ± 0.015"]
    drawn = np.random.default_rng(7)
    for _ in range(200):
        size = 10.0 ** drawn.integers(-5, 5)
        pairs = [(float(v), abs(float(c))) for v, c in drawn.normal(0, size, (5, 2))]
        for cells in (
            format_changes([v for v, _ in pairs], [c for _, c in pairs]),
            format_intervals([(v, v - c, v + c) for v, c in pairs]),
            format_half_widths([(v, v + c) for v, c in pairs]),
        ):
            rows = [re.findall(r"[+-]?[\d.]+(?:e-?\d+)?", cell) for cell in cells]
            for column in zip(*rows, strict=True):
                assert len({len(n.partition("e")[0].partition(".")[2]) for n in column}) == 1, cells
                assert len({"e" in n for n in column}) == 1, cells


def test_a_column_has_one_number_format() -> None:
    assert format_settings([6e-7, 1.5e-6, 1e-6]) == ["6.0e-7", "1.5e-6", "1.0e-6"]
    assert format_settings([0.1, 1.0, 100, None]) == ["0.1", "1.0", "100.0", "–"]
    assert format_settings([1e-3, 5e-4]) == ["1e-3", "5e-4"]
    assert format_settings([16, 32]) == ["16", "32"]
    assert format_settings(["sigmoid", 1.0, True]) == ["sigmoid", "1", "True"]
    assert format_measured([0.7312, 0.71, None, math.nan]) == ["0.7312", "0.7100", "–", "nan"]
    assert format_measured([-1.234, 0.0004]) == ["-1.234", "0.000"]
    assert format_measured([0.5, 0.25]) == ["0.50", "0.25"]
    assert format_measured([2e-5, 1e-6], 2) == ["2.0e-5", "1.0e-6"]


BOTH = SPEC.model_copy(update={"also": (Objective(metric="eval_nll_loss", direction="minimize"),)})


def test_the_tables_of_several_objectives_show_all_and_mark_the_front() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    values = {0: (0.7, 1.2), 1: (0.8, 1.4), 2: (0.6, 1.3)}
    trials = [TrialCurves(record(n, TrialState.COMPLETE, value=v[0], values=v)) for n, v in values.items()]
    trials[0].add([StepMetrics(0, {"eval_accuracies/logp": 0.5, "eval_nll_loss": 1.1})])
    print_final_summary(BOTH, trials, console, updates_of=None)
    shown = text_of(console)
    assert "eval_nll_loss" in shown
    lines = shown.splitlines()
    assert [line for line in lines if "★ 0" in line and "0.7" in line and "1.2" in line]
    assert [line for line in lines if "★ 1" in line and "0.8" in line and "1.4" in line]
    assert "★ 2" not in shown
    assert "The initial model has eval_accuracies/logp=0.5, eval_nll_loss=1.1." in shown


def test_a_tie_has_one_star_and_is_named() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    trials = [TrialCurves(record(n, TrialState.COMPLETE, value=0.7, values=(0.7,))) for n in range(2)]
    print_final_summary(SPEC, trials, console, updates_of=None)
    shown = text_of(console)
    assert shown.count("★") == 1
    assert "A tie: trial 1 has the same value as trial 0, which began first." in shown


def test_trials_without_a_worker_wait_and_enqueued_ones_count_from_the_start() -> None:
    console = Console(file=io.StringIO(), width=200, height=40, force_terminal=False)
    view = PlainLogView(SweepProgress(SPEC, 2, lambda _: 4), console)
    for number in range(2):
        view.update_trial(record(number, TrialState.RUNNING, started_at=1.0))  # an earlier driver's
    again = record(0, TrialState.RUNNING, started_at=1.0)
    view.update_trial(replace(again, attempts=2))
    view.update_trial(replace(again, attempts=2, state=TrialState.COMPLETE, value=0.5))
    view.update_trial(record(2, TrialState.RUNNING, by_command=True))
    view.update_trial(record(2, TrialState.FAILED, by_command=True, reason="no", failure=FailureKind.BUG))
    lines = text_of(console).splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["trial 0 WAITING", "trial 1 WAITING", "trial 0 RUNNING"]
    assert "1/2 trials · 1 waiting" in lines[4]
    assert "2/3 trials (1 enqueued) · 1 waiting · 1 failed" in lines[-1]


def test_the_summary_after_a_stop_calls_nothing_running() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    print_final_summary(SPEC, [TrialCurves(record(0, TrialState.RUNNING))], console, updates_of=None)
    assert "INTERRUPTED" in text_of(console)
    assert "RUNNING" not in text_of(console)


def test_no_time_left_is_shown_until_some_work_was_measured_and_it_never_jumps() -> None:
    clock = Hands()
    progress = SweepProgress(SPEC, 10, lambda _: 100, clock)
    progress.update(record(0, TrialState.RUNNING))
    clock.now += 5.0
    progress.trials[0].add([StepMetrics(30, {"loss": 1.0})])
    assert "left" not in progress.headline(), "five seconds say little"
    clock.now += 5.0
    assert "about 5 min left" in progress.headline()
    clock.now += 1.0
    progress.trials[0].add([StepMetrics(60, {"loss": 1.0})])
    assert "about 5 min left" in progress.headline(), "twice the speed in one second is not believed at once"


def test_a_stage_with_known_length_has_a_bar() -> None:
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True, color_system=None)
    clock = Hands()
    view = LiveTableView(SweepProgress(SPEC, 2, clock=clock), console)
    view.set_activity("sft: 0 of 40 updates")
    clock.now += 1.0
    view.set_stage_progress(30, 40)
    view.close()
    assert "━━━━━━━━━━━━━━━───── 30/40  sft" in text_of(console)


def far(number: int, value: float, state: TrialState = TrialState.COMPLETE, **distances: float) -> TrialCurves:
    found = TrialCurves(record(number, state, value=value))
    found.add([StepMetrics(step, {"eval_accuracies/logp": value, "eval_margins/logp": value}) for step in range(4)])
    found.add([StepMetrics(4, {name.replace("__", "/"): v for name, v in distances.items()})])
    return found


def test_the_distance_from_the_initial_model_has_a_column_where_there_is_room(console: Console) -> None:
    rows = [far(0, 0.6, eval_kl_per_token=0.0123), far(1, 0.8, eval_kl_per_token=1.5), far(2, 0.7, TrialState.RUNNING)]
    console.print(trial_table(rows, ("loss.beta",), OBJECTIVE, updates_of=lambda _: 4, width=console.width))
    shown = text_of(console)
    assert ("KL/token" in shown) is (console.width >= 80)
    assert ("0.01 " in shown, "1.50 " in shown) == (console.width >= 80,) * 2
    assert all(len(line) <= console.width for line in re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())


def test_distances_of_one_table_have_one_measure() -> None:
    ratios = {"eval_log_ratio_per_token__chosen": -0.2, "eval_log_ratio_per_token__rejected": -0.6}
    rows = [far(0, 0.6, eval_kl_per_token=0.5, **ratios), far(1, 0.8, **ratios)]
    assert distance_column(rows) == ("log-ratio", [pytest.approx(0.4)] * 2)
    assert distance_column(rows[:1]) == ("KL/token", [0.5])
    assert distance_column([far(0, 0.6)]) == ("", [None])


def test_a_plan_says_in_a_sentence_which_settings_need_no_change() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    lines = [AdviceLine(topic, "keep", "", "") for topic in ("learning rate", "beta", "duration")]
    print_advice_of_plan(console, lines)
    assert "The learning rate, beta and the number of updates need no change." in text_of(console)
    print_advice_of_plan(console, lines[1:2])
    assert "Beta needs no change." in text_of(console)
