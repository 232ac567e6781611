"""Sweeps side by side: the comparison metric ranks, what is not matched is said, and one page holds them all."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dashboards.analysis.comparison import as_json, compare_sweeps
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.report.comparison_page import ComparisonTable, comparison_page, comparison_summary, print_comparison
from orchestrator.study.trial_records import Trial
from tests.dashboards.report.test_report import Tree
from tests.support.scripted_sweep import FAILED, Script, frame_of, make_spec, run_sweep

RATES: dict[str, Any] = {"training.learning_rate": {"choice": [3e-7, 1e-6]}}
DPO = {"loss": {"kind": "dpo", "beta": 0.1}}


def swept(root: Path, name: str, quality: float, pairs: int = 300, steps: int = 40, **more: Any) -> SweepFrame:
    def script(trial: Trial) -> Script:
        return Script(quality=quality - 0.1 * trial.number, steps=steps)

    return frame_of(run_sweep(root, make_spec(name, more.pop("search", RATES), **more), script, pairs=pairs))


def test_the_ruler_ranks_objectives_whatever_their_own_goal(tmp_path: Path) -> None:
    simpo, objective = swept(tmp_path, "simpo", 0.9), {"metric": "eval_loss", "direction": "minimize"}
    dpo = swept(tmp_path, "dpo", 0.3, base=DPO, search={"training.seed": {"int_uniform": [1, 2]}}, goal=objective)
    found = compare_sweeps([dpo, simpo])
    assert [c.frame.name for c in found.sweeps] == ["simpo", "dpo"]
    assert [c.loss_name for c in found.sweeps] == ["simpo", "dpo"]
    assert found.sweeps[1].behind.low > 0
    assert "clearly ahead of all others" in comparison_summary(found)
    assert found.warnings == ()
    merged = found.analysis.frame
    assert (merged.paths[0], merged.ranked[0].label) == ("loss.kind", "simpo/0")
    json.dumps(as_json(found))
    _check_page(comparison_page(found))
    _check_table(found)


def _check_page(text: str) -> None:
    tree = Tree(text)
    assert {"ranking", "answer", "curves", "collapse", "samples", "cost"} <= set(tree.sections)
    assert not {"diagnosis", "timeline", "setup"} & set(tree.sections)
    assert all(address.startswith(("#", "data:,")) for address in tree.addresses)


def _check_table(found: Any) -> None:
    for width in (50, 80, 120, 200):
        console = Console(file=io.StringIO(), width=width, force_terminal=False)
        print_comparison(ComparisonTable.of(found), console)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "simpo" in shown
        assert "dpo" in shown
        assert "clearly ahead" in shown
        assert "…" not in shown.replace(" … ", "")
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    print_comparison(ComparisonTable.of(found), console)
    on_terminal = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, on_terminal.splitlines())) <= 60
    assert comparison_summary(found) in " ".join(on_terminal.split()), "broken between words"


def test_what_is_not_matched_is_said_with_numbers(tmp_path: Path) -> None:
    a = swept(tmp_path, "a", 0.5)
    training = {"pairs_per_update": 16, "max_steps": 20, "bf16": True}
    b = swept(tmp_path, "b", 0.5, pairs=200, steps=20, base={"training": training, "lora": {}})
    c = swept(tmp_path, "c", 0.5, search={"training.seed": {"int_uniform": [1, 5]}})
    text = " ".join(compare_sweeps([a, b, c]).warnings)
    for words in (
        "the held-out pairs are not the same (a: 300; c: 300; b: 200)",
        "pairs per update differ (a: 8; c: 8; b: 16)",
        "updates differ",
        "precision differs",
        "LoRA",
        "complete trials",
    ):
        assert words in text or words.replace("a: 300; c: 300", "c: 300; a: 300") in text, (words, text)


def test_equal_sweeps_cannot_be_told_apart(tmp_path: Path) -> None:
    found = compare_sweeps([swept(tmp_path, "a", 0.5), swept(tmp_path, "b", 0.501)])
    assert "it is not distinguishable from" in comparison_summary(found)


def test_serious_findings_are_the_same_everywhere_on_the_page(tmp_path: Path) -> None:
    def hollow(name: str, chosen: float) -> SweepFrame:
        script = Script(quality=0.9, chosen=chosen)
        return frame_of(run_sweep(tmp_path, make_spec(name, RATES), lambda _: script))

    found = compare_sweeps([hollow("a", -4.0), hollow("b", -3.0)])
    assert [finding.title.split(":")[0] for finding in found.serious] == ["a", "b"]
    text = Tree(comparison_page(found)).text
    assert "no serious finding" not in text
    assert "Do not use this trial yet: a: margins rise" in text
    console = Console(file=io.StringIO(), width=120)
    print_comparison(ComparisonTable.of(found), console)
    assert console.file.getvalue().count("serious: ") == 2  # type: ignore[attr-defined]
    healthy = comparison_page(compare_sweeps([hollow("c", -0.9), hollow("d", -0.8)]))
    assert "no serious finding about this trial" in Tree(healthy).text


def test_one_without_a_complete_trial_comes_last(tmp_path: Path) -> None:
    folder = run_sweep(tmp_path, make_spec("z", RATES), lambda _: Script(outcome=FAILED))
    found = compare_sweeps([frame_of(folder), swept(tmp_path, "a", 0.5)])
    assert [c.frame.name for c in found.sweeps] == ["a", "z"]
    _check_page(comparison_page(found))


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a"]])
def test_two_are_needed(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.cli import main

    assert main(["compare", *names]) == 2
    assert "Traceback" not in capsys.readouterr().err
