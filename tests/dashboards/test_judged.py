"""A judge's verdicts in the report and on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from scripted_sweep import Script, frame_of, make_spec, run_sweep

from dashboards.analysis.comparison import compare
from dashboards.analysis.load_frame import gather
from dashboards.diagnosis.diagnose import insight
from dashboards.report.html_page import report_page
from dashboards.report.panels import judgements_panel, winner
from dashboards.sweep_reporter import DashboardReporter
from dashboards.terminal.judge_output import print_verdicts
from orchestrator.driver.parent_run import tell_standing
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP
from orchestrator.judge.judgements import Verdict, as_json, headline, read_verdicts
from orchestrator.judge.win_rates import wilson
from orchestrator.study.study import Study
from orchestrator.study.trial_records import ranking
from orchestrator.tracking.run_metadata import NOTE
from tests.engine.scripted import ListSink

GRID = {"loss.beta": {"choice": [2.0, 10.0]}}


def verdict(trial: int, share: float, count: int = 100, **more: Any) -> Verdict:
    wins = round(share * count)
    given: dict[str, Any] = {
        "trial": trial,
        "judge": "reward",
        "by": "org/reward",
        "decoding": "greedy",
        "wins": wins,
        "ties": 0,
        "losses": count - wins,
        "left_out": 0,
        "prompts": count,
        "win_rate": wilson(share, count),
        "lc_win_rate": wilson(share / 2, count),
        "difficulty": False,
        "length": 50.0,
        "start_length": 40.0,
        "score": 1.0,
        "start_score": 0.5,
        "first": None,
        "agree": None,
        "asked": None,
        "outcomes": (),
        "examples": ({"prompt": "<b>p</b>", "ours": "good", "theirs": "bad", "preference": 1.0},),
        "at": 1.0,
    }
    return Verdict.model_validate(given | more)


def judged(root: Path, *verdicts: Verdict, name: str = "s") -> SweepFolder:
    def plan(trial: Any) -> Script:
        return Script(quality=0.3 + 0.2 * trial.number)

    folder = run_sweep(root, make_spec(name, search=GRID), plan)
    with Study.open(folder) as study:
        for told in verdicts:
            study.keep_judged(told.trial, told.key, told.model_dump_json())
    return folder


def words(folder: SweepFolder) -> str:
    panel = winner.answer_panel(insight(frame_of(folder)))
    assert panel is not None
    return " ".join(block.text for block in panel.blocks if hasattr(block, "text"))


def test_the_answer_names_the_verdict_first(tmp_path: Path) -> None:
    assert "against the start model" not in words(judged(tmp_path / "none"))
    won = words(judged(tmp_path / "won", verdict(1, 0.7), verdict(0, 0.9)))
    assert "Trial 1 wins 70% (95 % interval 60% … 78%) of 100 prompts against the start model, 35% at equal" in won
    assert "clearly better" in won
    assert "0 does best by this judge: 90%" in won
    assert "cannot be told from the start model's" in words(judged(tmp_path / "tied", verdict(1, 0.5)))
    assert "The start model answers better" in words(judged(tmp_path / "lost", verdict(1, 0.2)))


def test_mlflows_description_names_the_best_judged_trial(tmp_path: Path) -> None:
    folder = judged(tmp_path, verdict(0, 0.9), verdict(1, 0.75))
    with Study.open(folder) as study:
        best = ranking(study.trials(), *study.spec.goals)[0].number
        sink = ListSink()
        tell_standing(study, sink, DashboardReporter(), "finished")
    rate = {0: "90%", 1: "75%"}[best]
    assert f"**Judge:** [trial {best}](mlflow:{best}) wins {rate} (95 % interval" in sink.tags(SWEEP)[NOTE]


def test_which_verdict_counts_first() -> None:
    checker, reward = verdict(0, 0.9, judge="checker"), verdict(0, 0.6)
    endpoint = verdict(0, 0.5, judge="endpoint", by="big")
    assert headline([checker, reward, endpoint]) is endpoint
    assert headline([checker, reward]) is reward
    assert headline([checker]) is checker
    assert headline([verdict(0, 0.5, win_rate=None)]) is None
    told = [reward, endpoint]
    texts = [v.model_dump_json() for v in told]
    assert read_verdicts(texts) == told
    assert set(as_json(told)["0"]) == {"reward_greedy", "endpoint_greedy"}


def test_the_panel_says_what_must_be_known(tmp_path: Path) -> None:
    asked = {"calls": 220, "failures": {"rate_limited": 3, "refused": 2}, "unanswered": 4, "cost": 1.25}
    biased = verdict(1, 0.5, judge="endpoint", by="big", first=wilson(0.9, 100), agree=0.3, asked=asked)
    nothing = verdict(0, 0.5, decoding="sampled", win_rate=None, lc_win_rate=None)
    folder = judged(tmp_path, biased, verdict(0, 0.6), nothing)
    seen = insight(frame_of(folder))
    panel = judgements_panel.panel(seen)
    assert panel is not None
    told = " ".join(block.text for block in panel.blocks if hasattr(block, "text"))
    assert "position bias: the answer shown first gets 90%" in told
    assert "3 rate limited, 2 refused" in told
    assert "4 questions are still open" in told
    page = report_page(seen)
    assert "What a judge says" in page
    assert "<b>p</b>" not in page, "a prompt is text"
    assert judgements_panel.panel(insight(frame_of(judged(tmp_path / "none")))) is None


def test_compared_sweeps_keep_their_verdicts(tmp_path: Path) -> None:
    frames = [frame_of(judged(tmp_path, verdict(1, 0.7), name=name)) for name in ("a", "b")]
    panel = judgements_panel.panel(compare(frames).seen)
    assert panel is not None
    table = next(block for block in panel.blocks if hasattr(block, "rows"))
    assert [row[0] for row in table.rows] == ["a/1", "b/1"]


def test_a_verdict_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = judged(tmp_path, verdict(1, 0.7))
    with Study.open(folder) as study:
        study.keep_judged(0, "reward_greedy", "{}")
        frame = gather(study, state="finished")
    assert any("verdicts cannot be read" in notice for notice in frame.notices)


def test_on_the_terminal() -> None:
    for width, shown in ((220, "characters"), (160, "first shown"), (100, "win rate"), (60, "win rate")):
        console = Console(width=width, record=True, file=None, quiet=False)
        with console.capture() as held:
            print_verdicts([verdict(0, 0.7), verdict(1, 0.2, judge="checker", win_rate=None)], console)
        assert shown in held.get()
        assert "70%" in held.get()
        assert "…  " not in held.get(), "no cell is cut"
