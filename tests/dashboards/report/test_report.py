"""The report of sweeps of every kind: parsed as HTML, nothing hostile in it alive, nothing from outside."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dashboards.diagnosis.diagnose import analyze
from dashboards.report.blocks import KeyFigures, Table
from dashboards.report.html_page import report_page
from dashboards.report.panels.result_panels import winner_panel
from orchestrator.study.trial_records import Trial
from tests.support.scripted_sweep import (
    COMPLETE,
    DIVERGED,
    FAILED,
    PRUNED,
    Script,
    frame_of,
    grown,
    make_spec,
    run_sweep,
)

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Tree(HTMLParser):
    """Balanced tags, the sections, the scripts, every address, and the text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.sections: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held_trial = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(held_trial["id"] or "")
        if tag == "script":
            self.scripts.append((held_trial, ""))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data") and value]
        assert not any(name.startswith("on") for name in held_trial), held_trial

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            held_trial, text = self.scripts[-1]
            self.scripts[-1] = (held_trial, text + data)
        else:
            self.text += data


def page_of(frame: Any) -> tuple[str, Tree]:
    page = report_page(analyze(frame))
    tree = Tree(page)
    assert all(address.startswith(("#", "data:,")) for address in tree.addresses), tree.addresses
    assert len([text for held_trial, text in tree.scripts if held_trial.get("type") is None]) == 1
    figures = json.loads(next(text for held_trial, text in tree.scripts if held_trial.get("id") == "figures"))
    assert page.count('class="chart"') == len(figures)
    assert "NaN" not in json.dumps(figures)
    return page, tree


def by_rate(trial: Trial) -> Script:
    """A healthy grid: the higher rate is better, beta 10 is better, some are stopped."""
    params = trial.params
    quality = 0.2 + 0.1 * (params["training.learning_rate"] > 5e-7) + 0.1 * (params["loss.beta"] > 5)
    outcome = {3: PRUNED, 5: DIVERGED, 7: FAILED}.get(trial.number, COMPLETE)
    return Script(quality=quality + 0.02 * params["loss.gamma"], outcome=outcome, samples=("no", "<script>x</script>"))


EVERY = {
    "answer",
    "diagnosis",
    "map",
    "curves",
    "collapse",
    "distance",
    "interactions",
    "importance",
    "parallel",
    "samples",
    "length",
    "cost",
    "timeline",
    "trials",
    "setup",
}


def test_a_rich_sweep_has_every_panel_and_no_text_of_others_is_alive(tmp_path: Path) -> None:
    frame = frame_of(run_sweep(tmp_path, make_spec(description="<img src=x onerror=alert(1)>"), by_rate))
    page, tree = page_of(frame)
    assert (set(tree.sections), tree.sections[0]) == (EVERY, "answer")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<script>alert('p')</script> Say it." in tree.text
    assert "scripted <script>alert(1)</script>" in tree.text
    for words in ("✕ diverged", "▼ pruned", "■ failed", "GPU-hours" if frame.gpus else "slot-hours saved"):
        assert words in page, words
    assert "training.learning_rate" not in "".join(tree.sections)
    assert len(page) < 3_000_000


def test_the_answer_says_who_won_how_sure_and_what_to_copy(tmp_path: Path) -> None:
    frame = frame_of(run_sweep(tmp_path, make_spec(), lambda t: Script(quality=0.9 if t.number == 4 else 0.2)))
    analysis = analyze(frame)
    assert analysis.significance.winner.number == 4
    assert [trial_frame.number for trial_frame in analysis.significance.not_distinguishable] == [4]
    assert analysis.significance.against_initial.low > 0
    assert analysis.significance.against_initial.paired
    _, tree = page_of(frame)
    assert "Trial 4 is better than all others" in tree.text
    assert "beta: 2.0" in tree.text
    assert "learning_rate: 3.0e-07" in tree.text


def test_equal_trials_are_called_equal(tmp_path: Path) -> None:
    frame = frame_of(run_sweep(tmp_path, make_spec(), lambda t: Script(quality=0.3 + 0.001 * t.number)))
    _, tree = page_of(frame)
    assert "The 12 configurations are not distinguishable" in tree.text


def test_a_hollow_winner_is_called_one_at_the_top(tmp_path: Path) -> None:
    healthy = frame_of(run_sweep(tmp_path / "a", make_spec(), lambda _: Script(quality=0.5)))
    hollow = frame_of(run_sweep(tmp_path / "b", make_spec(), lambda _: Script(quality=0.5, chosen=-4.0)))
    warned, fine = page_of(hollow)[1].text, page_of(healthy)[1].text
    assert "Do not use this trial yet: margins rise while the chosen responses become less likely" in warned
    assert warned.index("Do not use this trial yet") < warned.index("The winner's searched settings")
    assert "no serious finding about this trial" in fine
    assert "Do not use this trial yet" not in fine


def test_a_failure_elsewhere_says_nothing_about_the_winner(tmp_path: Path) -> None:
    def one_fails(trial: Trial) -> Script:
        return Script(outcome=FAILED) if trial.number == 3 else Script(quality=0.5)

    text = page_of(frame_of(run_sweep(tmp_path, make_spec(), one_fails)))[1].text
    assert "no serious finding about this trial" in text


def test_one_trial(tmp_path: Path) -> None:
    _, tree = page_of(frame_of(run_sweep(tmp_path, make_spec(search={}), lambda _: Script())))
    assert {"answer", "curves", "collapse", "samples", "cost", "timeline"} <= set(tree.sections)
    assert not {"map", "parallel", "importance"} & set(tree.sections)
    assert "Only one trial completed" in tree.text


def test_all_failed(tmp_path: Path) -> None:
    _, tree = page_of(frame_of(run_sweep(tmp_path, make_spec(), lambda _: Script(outcome=FAILED))))
    assert "No trial completed: 12 failed. The reasons are below." in tree.text
    assert "<script>alert('f')</script>" in tree.text
    assert "12 of 12 trials failed: bug" in tree.text


def test_all_diverged(tmp_path: Path) -> None:
    _, tree = page_of(frame_of(run_sweep(tmp_path, make_spec(), lambda _: Script(outcome=DIVERGED))))
    assert "12 diverged" in tree.text
    assert "12 of 12 finished trials diverged" in tree.text


def test_none_begun_and_none_finished(tmp_path: Path) -> None:
    _, tree = page_of(frame_of(run_sweep(tmp_path, make_spec("a"), lambda _: Script(), trials=0), "running"))
    assert "No trial has started yet." in tree.text
    running = run_sweep(tmp_path, make_spec("b"), lambda _: Script(outcome=None), trials=2)
    _, tree = page_of(frame_of(running, "running"))
    assert "No trial has completed yet; 2 running." in tree.text
    assert "No trial has completed yet; 2 interrupted." in page_of(frame_of(running, "interrupted"))[1].text
    assert "curves" in tree.sections
    figures = json.loads(next(text for held, text in tree.scripts if held.get("id") == "figures"))
    curves = [each["layout"] for each in figures if each["layout"]["xaxis"].get("title", {}).get("text") == "update"]
    assert len(curves) >= 4
    assert all(layout["yaxis"].get("automargin") for layout in curves), "long labels, as 0.054665, are not cut"


def test_in_the_middle(tmp_path: Path) -> None:
    folder = run_sweep(tmp_path, make_spec(), lambda t: Script(outcome=None if t.number == 4 else COMPLETE), trials=5)
    _, tree = page_of(frame_of(folder, "running"))
    assert "The sweep is running: these are preliminary results." in tree.text
    assert "5 of 12" in tree.text


def test_an_interrupted_trial_ran_until_it_was_last_heard_of(tmp_path: Path) -> None:
    folder = run_sweep(tmp_path, make_spec(), lambda t: Script(outcome=None if t.number == 4 else COMPLETE), trials=5)
    frame = frame_of(folder, "interrupted")
    page, _ = page_of(replace(frame, at=frame.at + 86400))
    assert "seconds in which the sweep ran" in page
    running, _ = page_of(replace(frame, at=frame.at + 86400, state="running"))
    assert "hours in which the sweep ran" in running


def test_maps_of_many_columns_stand_where_they_fit(tmp_path: Path) -> None:
    """Six gammas side by side are wider than a third of a page: cells behind a scroll are not seen at a glance."""
    grid = {"loss.beta": {"choice": [2.0, 2.5]}, "loss.gamma": {"choice": [0.3, 0.5, 1.0, 1.2, 1.4, 1.6]}}
    page, _ = page_of(frame_of(run_sweep(tmp_path / "a", make_spec(search=grid), lambda _: Script(), pairs=20)))
    assert '<div class="charts roomy" data-min-width="494">' in page
    few, _ = page_of(frame_of(run_sweep(tmp_path / "b", make_spec(), lambda _: Script(), pairs=20)))
    assert "charts roomy" not in few


def test_when_the_trials_folders_are_gone(tmp_path: Path) -> None:
    folder = run_sweep(tmp_path, make_spec(), by_rate)
    shutil.rmtree(folder.path / "trials")
    _, tree = page_of(frame_of(folder))
    assert "The folders of" in tree.text
    assert not {"samples", "length"} & set(tree.sections)
    assert "curves" in tree.sections


def test_a_damaged_file_is_named_not_fatal(tmp_path: Path) -> None:
    folder = run_sweep(tmp_path, make_spec(), by_rate)
    (folder.attempt(0, 1) / "eval_pairs.safetensors").write_bytes(b"no")
    (folder.attempt(1, 1) / "samples.jsonl").write_text("{", encoding="utf-8")
    _, tree = page_of(frame_of(folder))
    assert "0000/1/eval_pairs.safetensors cannot be read" in tree.text
    assert "0001/1/samples.jsonl cannot be read" in tree.text


SPACES: dict[str, dict[str, Any]] = {
    "one list": {"training.learning_rate": {"choice": [1e-7, 3e-7, 1e-6, 3e-6]}},
    "ranges": {"loss.beta": {"uniform": [1.0, 10.0]}, "training.learning_rate": {"log_uniform": [1e-7, 1e-5]}},
    "no numbers": {"loss.loss_type": {"choice": ["sigmoid", "hinge"]}, "training.bf16": {"choice": [True, False]}},
    "conditional": {
        "loss.kind": {"choice": ["simpo", "cpo"]},
        "loss.gamma": {"choice": [0.5, 1.0], "when": {"loss.kind": "simpo"}},
        "training.learning_rate": {"choice": [1e-7, 1e-6]},
    },
    "seeds": {"loss.beta": {"choice": [2.0, 10.0]}, "training.seed": {"choice": [1, 2, 3]}},
}


@pytest.mark.parametrize("space", SPACES)
def test_other_spaces(space: str, tmp_path: Path) -> None:
    endless = space == "ranges"
    more: dict[str, Any] = {"sampler": {"kind": "random"}, "budget": {"trials": 12}} if endless else {}
    spec = make_spec(search=SPACES[space], **more)
    frame = frame_of(run_sweep(tmp_path, spec, lambda t: Script(quality=0.2 + 0.03 * (t.number % 5))))
    page, tree = page_of(frame)
    assert {"answer", "map", "curves", "importance"} <= set(tree.sections)
    if space == "seeds":
        assert "over seeds" in tree.text
    if space == "conditional":
        assert "not searched" in page


def test_two_hundred_trials_fit_in_a_mail(tmp_path: Path) -> None:
    search = {
        "loss.beta": {"uniform": [1.0, 10.0]},
        "loss.gamma": {"uniform": [0.1, 2.0]},
        "training.learning_rate": {"log_uniform": [1e-7, 1e-5]},
    }
    spec = make_spec(search=search, sampler={"kind": "random"}, budget={"trials": 20})

    def plan(trial: Trial) -> Script:
        outcome = (COMPLETE, COMPLETE, PRUNED, DIVERGED, FAILED)[trial.number % 5]
        return Script(quality=0.1 + 0.01 * trial.number, outcome=outcome, steps=200)

    frame = grown(frame_of(run_sweep(tmp_path, spec, plan), steps=200), 10)
    assert len(frame.trials) == 200
    page, tree = page_of(frame)
    assert set(tree.sections) == EVERY
    assert len(page) < 6_000_000
    assert "Long curves are drawn with at most" in tree.text


def test_several_goals_have_a_front(tmp_path: Path) -> None:
    def trade(trial: Trial) -> Script:
        return Script(quality=0.1 + 0.05 * trial.number, last={"eval_nll_loss": 1.0 + 0.1 * (trial.number % 4)})

    also = [{"metric": "eval_nll_loss", "direction": "minimize"}]
    frame = frame_of(run_sweep(tmp_path, make_spec(also=also), trade))
    assert {trial_frame.number for trial_frame in frame.pareto_front} == {8, 9, 10, 11}
    _, tree = page_of(frame)
    assert set(tree.sections) == {*EVERY, "front"}
    assert "eval_nll_loss (minimize)" in tree.text
    answer = winner_panel(analyze(frame))
    (key_figures,) = [block for block in answer.blocks if isinstance(block, KeyFigures)]
    figures = {figure.name: figure for figure in key_figures.figures}
    assert figures["eval_nll_loss"].value == "1.3"
    assert "before training" in figures["eval_nll_loss"].note
    (table,) = [block for block in answer.blocks if isinstance(block, Table)]
    assert table.head[:3] == ("trial", "accuracies/logp", "nll_loss")
    assert table.rows[0][2] == "1.3"
