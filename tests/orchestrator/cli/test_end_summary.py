"""What the terminal says at the end of a sweep and in `best`: no export of a model that the diagnosis warns of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dashboards.terminal.command_output import resume_command, without_state
from orchestrator.cli import main
from orchestrator.cli.sweep_summary import print_summary
from orchestrator.commands.model_export import model_card
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialRecord, TrialState
from orchestrator.terminal_streams import wrapped
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


def test_best_is_ten_lines_with_the_initial_models_figures_and_all_metrics_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    also = [{"metric": "eval_nll_loss", "direction": "minimize"}]
    spec = make_spec("short", RATES, also=also)
    run_sweep(tmp_path, spec, lambda trial: Script(quality=0.5 + 0.1 * trial.number, last={"eval_nll_loss": 0.5}))
    assert main(["best", "short"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    for objective in spec.objectives:
        (line,) = [line for line in lines if line.split()[0] == objective.metric]
        assert "(initial model " in line
    assert "None" not in "".join(lines)
    assert main(["best", "short", "--metrics"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(lines) + 5


def test_a_trial_without_a_value_and_one_that_was_interrupted_are_shown_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    folder = run_sweep(tmp_path, make_spec("begun", RATES), lambda _: Script(), trials=1)
    with Study.open(folder) as study:
        study.ask()
    assert main(["status", "begun"]) == 0
    shown = capsys.readouterr().out
    assert "INTERRUPTED" in shown
    assert "RUNNING" not in shown
    assert "None" not in shown
    assert main(["status", "begun", "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [(trial["state"], trial["idle"]) for trial in trials] == [("COMPLETE", ""), ("RUNNING", "interrupted")]


def test_status_says_how_to_go_on_and_calls_a_trial_as_the_table_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    folder = run_sweep(tmp_path, make_spec("new", RATES), lambda _: Script(), trials=0)
    assert main(["status", "new"]) == 0
    shown = capsys.readouterr().out
    assert "resume it with: orchestrate resume new" in shown
    assert "no trial has started yet" in shown
    with Study.open(folder) as study:
        trial = study.ask()
        assert isinstance(trial, Trial)
        study.tell(trial, Outcome(TrialState.PRUNED, "diverged: repetitions", diverged=True))
    assert main(["status", "new"]) == 0
    shown = capsys.readouterr().out
    assert "DIVERGED" in shown
    assert "PRUNED" not in shown
    assert main(["status", "new", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"][0]["state"] == "PRUNED"
    out_of_budget = "out of budget: 0.2 of 0.1 hours spent; `--set budget.hours=0.4` extends it"
    assert resume_command("new", out_of_budget) == "orchestrate resume new --set budget.hours=0.4"


def test_status_without_a_name_lists_the_sweeps_of_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    assert main(["status"]) == 0
    assert capsys.readouterr().out == f"sweeps in {tmp_path / 'runs'}: 0\n"
    root = tmp_path / "runs"
    run_sweep(root, make_spec("ended", RATES), lambda trial: Script(quality=0.5 + 0.1 * trial.number))
    folder = run_sweep(root, make_spec("begun", RATES), lambda _: Script(), trials=1)
    with Study.open(folder) as study:
        study.enqueue({"training.learning_rate": 2e-6}, "by hand", kind="enqueued")
    new = SweepFolder(root, "new")
    create_sweep_folder(new, dump_spec(make_spec("new", RATES)))
    damaged = run_sweep(root, make_spec("damaged", RATES), lambda _: Script())
    damaged.database.write_bytes(b"no database")
    assert main(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sweeps = {sweep["name"]: sweep for sweep in found["sweeps"]}
    assert {name: sweep["state"] for name, sweep in sweeps.items()} == {
        "ended": "finished",
        "begun": "interrupted",
        "new": "interrupted",
        "damaged": "unreadable",
    }
    counts = {name: (sweep["finished"], sweep["planned"]) for name, sweep in sweeps.items() if name != "damaged"}
    assert counts == {"ended": (2, 2), "begun": (1, 3), "new": (0, 2)}
    assert sweeps["ended"]["best"]["trial"] == 1
    assert sweeps["new"]["best"] is None
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line for line in shown.splitlines()[2:]}
    assert all(word in rows["ended"] for word in ("finished", "2/2", "eval_accuracies/logp", "trial 1", "ago"))
    assert all(name in rows for name in sweeps)
    assert main(["status", "--watch"]) == 2


def test_messages_break_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"s.yaml:3: there is no ./my-bas (did you mean {'x' * 20} or {'y' * 30}?)\n  second line"
    assert wrapped(text) == text
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    lines = wrapped(text).split("\n")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 60
    assert " ".join(text.split()) == " ".join(" ".join(lines).split())


def test_a_reason_is_not_said_twice() -> None:
    assert without_state("interrupted: by Ctrl-C", "interrupted") == "by Ctrl-C"
    assert without_state("interrupted", "interrupted") == ""
    assert without_state("no disk: full", "interrupted") == "no disk: full"


def test_a_model_card_names_no_folder_of_the_machine_and_no_none(tmp_path: Path) -> None:
    model = {"name_or_path": str(tmp_path / "models" / "tiny"), "generated": None}
    spec = make_spec("card", RATES, base={"model": model})
    values = {"eval_accuracies/logp": 0.7}
    record = TrialRecord(
        3, TrialState.COMPLETE, {"training.learning_rate": 3e-7}, 1, metrics=values, value=0.7, values=(0.7,), step=9
    )
    card = model_card(spec, record, None, merged=False, initial={"eval_accuracies/logp": 0.5})
    assert str(tmp_path) not in card
    assert "None" not in card
    assert "base_model" not in card, "a folder is no hub name"
    assert "from tiny;" in card
    assert "| columns ," not in card
    assert "| eval_accuracies/logp | 0.7 | 0.5 |" in card
    hub = make_spec("card", RATES, base={"model": {"name_or_path": "org/model", "generated": None}})
    assert "base_model: org/model" in model_card(hub, record, None, merged=False)
