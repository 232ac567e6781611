"""A judge's conclusions in the report and on the terminal."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from dashboards.analysis.comparison import compare_sweeps
from dashboards.analysis.load_frame import load_frame
from dashboards.diagnosis.diagnose import analyze
from dashboards.report.html_page import report_page
from dashboards.report.panels import judgements_panel, result_panels
from dashboards.sweep_reporter import DashboardReporter
from dashboards.terminal.judge_output import joint_conclusion, print_judgements
from orchestrator.driver.parent_run import update_description
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.judge.judgements import Judgement, as_json, most_important, parse_judgements
from orchestrator.judge.win_rates import joint_win_rate, wilson
from orchestrator.study.study import Study
from orchestrator.study.trial_records import rank_trials
from orchestrator.tracking.run_metadata import NOTE
from tests.support.recorders import ListSink
from tests.support.scripted_sweep import Script, frame_of, make_spec, run_sweep

GRID = {"loss.beta": {"choice": [2.0, 10.0]}}


def judgement(trial: int, share: float, count: int = 100, **more: Any) -> Judgement:
    wins = round(share * count)
    given = {"trial": trial, "judge": "reward", "by": "org/reward", "decoding": "greedy", "prompts": count, "at": 1.0}
    given |= {"wins": wins, "ties": 0, "losses": count - wins, "left_out": 0, "difficulty": False, "outcomes": ()}
    given |= {"win_rate": wilson(share, count), "lc_win_rate": wilson(share / 2, count), "asked": None}
    given |= {"length": 50.0, "start_length": 40.0, "score": 1.0, "start_score": 0.5, "first": None, "agree": None}
    given |= {"examples": ({"prompt": "<b>p</b>", "ours": "good", "theirs": "bad", "preference": 1.0},)}
    return Judgement.model_validate(given | more)


def judged(root: Path, *judgements: Judgement, name: str = "s") -> SweepFolder:
    def plan(trial: Any) -> Script:
        return Script(quality=0.3 + 0.2 * trial.number)

    folder = run_sweep(root, make_spec(name, search=GRID), plan)
    with Study.open(folder) as study:
        for logged in judgements:
            study.save_judgement(logged.trial, logged.key, logged.model_dump_json())
    return folder


def words(folder: SweepFolder) -> str:
    panel = result_panels.winner_panel(analyze(frame_of(folder)))
    return " ".join(block.text for block in panel.blocks if hasattr(block, "text"))


def test_the_sentence_below_the_judgements_is_about_the_columns_above_it() -> None:
    shown: dict[int, str] = {}
    for width in (60, 120, 250):
        console = Console(file=io.StringIO(), width=width)
        print_judgements([judgement(1, 0.7)], console)
        assert isinstance(console.file, io.StringIO)
        shown[width] = " ".join(console.file.getvalue().split())
    assert ["characters" in shown[width] for width in shown] == [False, False, True]
    assert ["the initial model's." in shown[width] for width in shown] == [False, False, True]
    assert all("In brackets: the 95 % interval of each trial by itself" in text for text in shown.values())


def test_the_answer_names_the_verdict_first(tmp_path: Path) -> None:
    assert "against the initial model" not in words(judged(tmp_path / "none"))
    won = words(judged(tmp_path / "won", judgement(1, 0.7), judgement(0, 0.9)))
    assert "Trial 1 wins 70% (95 % interval 60% … 78%) of 100 prompts against the initial model, 35% at equal" in won
    assert "clearly better" in won
    assert "0 has the highest win rate by this judge: 90%" in won
    assert "not distinguishable from the initial model's" in words(judged(tmp_path / "tied", judgement(1, 0.5)))
    assert "The initial model's answers are better" in words(judged(tmp_path / "lost", judgement(1, 0.2)))


def test_several_judged_trials_need_more_votes_for_the_same_verdict(tmp_path: Path) -> None:
    """60 % of 100 prompts: clear for one judged trial, and not for the best of four."""
    alone, among = [judgement(1, 0.6)], [judgement(n, 0.6 if n == 1 else 0.5) for n in range(4)]
    assert joint_win_rate(alone[0], alone) == (alone[0].win_rate, 1)
    rate, candidates = joint_win_rate(among[1], among)
    assert (rate.is_clear, candidates) == (False, 4)
    assert alone[0].win_rate is not None
    assert rate.low < alone[0].win_rate.low < 0.6 < alone[0].win_rate.high < rate.high
    assert joint_conclusion(alone) == ""
    assert joint_conclusion(among) == "For all judged trials together (95 %): none differs from the initial model."
    better = joint_conclusion([judgement(0, 0.8), judgement(1, 0.4)])
    assert better == "For all judged trials together (95 %): trial 0 is better (reward, greedy)."
    text = words(judged(tmp_path, judgement(0, 0.4), judgement(1, 0.61)))
    assert "For all 2 judged trials together the interval is 50% … 71%." in text


def test_mlflows_description_names_the_best_judged_trial(tmp_path: Path) -> None:
    with Study.open(judged(tmp_path, judgement(0, 0.9), judgement(1, 0.75))) as study:
        best = rank_trials(study.trials(), *study.spec.objectives)[0].number
        sink = ListSink()
        update_description(study, sink, DashboardReporter(), "finished")
    rate = {0: "90%", 1: "75%"}[best]
    assert f"**Judge:** [trial {best}](mlflow:{best}) wins {rate} (95 % interval" in sink.tags(SWEEP_RUN)[NOTE]


def test_which_verdict_counts_first() -> None:
    checker, reward = judgement(0, 0.9, judge="checker"), judgement(0, 0.6)
    endpoint = judgement(0, 0.5, judge="endpoint", by="big")
    assert most_important([checker, reward, endpoint]) is endpoint
    assert most_important([checker, reward]) is reward
    assert most_important([checker]) is checker
    assert most_important([judgement(0, 0.5, win_rate=None)]) is None
    logged = [reward, endpoint]
    assert parse_judgements([v.model_dump_json() for v in logged]) == logged
    assert set(as_json(logged)["0"]) == {"reward_greedy", "endpoint_greedy"}


def test_the_panel_says_what_must_be_known(tmp_path: Path) -> None:
    requested = {"calls": 220, "failures": {"rate_limited": 3, "refused": 2}, "unanswered": 4, "cost": 1.25}
    biased = judgement(1, 0.5, judge="endpoint", by="big", first=wilson(0.9, 100), agree=0.3, asked=requested)
    nothing = judgement(0, 0.5, decoding="sampled", win_rate=None, lc_win_rate=None)
    analysis = analyze(frame_of(judged(tmp_path, biased, judgement(0, 0.6), nothing)))
    panel = judgements_panel.judgements_panel(analysis)
    logged = " ".join(block.text for block in panel.blocks if hasattr(block, "text"))
    assert "position bias: the answer shown first gets 90%" in logged
    assert "3 rate limited, 2 refused" in logged
    assert "4 questions are still unanswered" in logged
    page = report_page(analysis)
    assert "Judgements" in page
    assert "<b>p</b>" not in page, "a prompt is text"
    assert judgements_panel.judgements_panel(analyze(frame_of(judged(tmp_path / "none")))) is None


def test_compared_sweeps_keep_their_verdicts(tmp_path: Path) -> None:
    frames = [frame_of(judged(tmp_path, judgement(1, 0.7), name=name)) for name in ("a", "b")]
    panel = judgements_panel.judgements_panel(compare_sweeps(frames).analysis)
    table = next(block for block in panel.blocks if hasattr(block, "rows"))
    assert [row[0] for row in table.rows] == ["a/1", "b/1"]


def test_a_verdict_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with Study.open(judged(tmp_path, judgement(1, 0.7))) as study:
        study.save_judgement(0, "reward_greedy", "{}")
        frame = load_frame(study, state="finished")
    assert any("judgements cannot be read" in notice for notice in frame.notices)


def test_on_the_terminal() -> None:
    for width, shown in ((220, "characters"), (160, "first shown"), (100, "win rate"), (60, "win rate")):
        console = Console(width=width, record=True, file=None, quiet=False)
        with console.capture() as held_trial:
            print_judgements([judgement(0, 0.7), judgement(1, 0.2, judge="checker", win_rate=None)], console)
        assert shown in held_trial.get()
        assert "70%" in held_trial.get()
        assert "…  " not in held_trial.get(), "no cell is cut"
