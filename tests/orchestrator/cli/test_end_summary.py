"""What the terminal says at the end of a sweep and in `best`: no export of a model that the diagnosis warns of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.cli.sweep_summary import print_summary
from orchestrator.execution.stop_reasons import StopKind, StopReason
from tests.support.scripted_sweep import Script, make_spec, run_sweep

RATES: dict[str, Any] = {"training.learning_rate": {"choice": [3e-7, 1e-6]}}


def ended(
    root: Path, capsys: pytest.CaptureFixture[str], name: str, script: Script, **more: Any
) -> tuple[str, Sequence[str]]:
    """Finish a sweep in which every trial does the same; return what its end printed, and the reasons of `best`."""
    spec = make_spec(name, RATES, **more)
    folder = run_sweep(root, spec, lambda _: script)
    print_summary(folder, spec, StopReason(StopKind.FINISHED))
    printed = "".join(capsys.readouterr())
    assert main(["best", name, "--json"]) == 0
    reasons = json.loads(capsys.readouterr().out)["do_not_use"]
    assert main(["best", name]) == 0
    assert ("Do not use trial 0 yet: " in capsys.readouterr().err) is bool(reasons)
    return printed, reasons


def test_the_end_and_best_offer_no_model_that_is_not_to_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    printed, reasons = ended(tmp_path, capsys, "sound", Script(quality=0.9, chosen=-0.9))
    assert "orchestrate best sound --export DIR" in printed
    assert reasons == []
    printed, reasons = ended(tmp_path, capsys, "hollow", Script(quality=0.9, chosen=-4.0))
    assert "--export" not in printed
    assert "Do not use the best trial yet" in printed
    assert "orchestrate report hollow" in printed
    assert reasons == ["margins rise while the chosen responses become less likely"]


def test_a_rehearsal_ends_without_a_diagnosis_and_without_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    base = {"training": {"pairs_per_update": 4, "max_steps": 4}}
    script = Script(quality=-0.3, chosen=-4.0, steps=4, every=2)
    printed, reasons = ended(tmp_path, capsys, "mine-rehearsal", script, base=base)
    assert "A rehearsal shows that the sweep runs" in printed
    assert "serious" not in printed
    assert "--export" not in printed
    assert reasons == ["it belongs to a rehearsal"]
    assert main(["suggest", "mine-rehearsal"]) == 3
    assert main(["report", "mine-rehearsal"]) == 0
    page = (tmp_path / "mine-rehearsal" / "report.html").read_text(encoding="utf-8")
    assert "its figures say nothing about the settings" in page
    assert "No trial is better" not in page
