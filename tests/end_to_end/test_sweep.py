"""Whole sweeps through the command, with a tiny model: interrupted, resumed, exported; and what is refused."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import folders
from orchestrator.cli.composition import resume, start
from orchestrator.commands.model_export import export_best_model
from orchestrator.commands.status import best, status
from orchestrator.errors import DataError, ExitCode, SpecError, SweepHeld
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.loader import load_spec_text
from tests.support.processes import LIMIT_SECONDS, called, finished, orchestrate
from tests.support.specs import TINY_MODEL
from tests.support.surface import compare_sweep
from tests.support.without_ray import without_ray

TINY = """
name: tiny
base:
  model: {generated: TINY_MODEL}
  data:
    train: {generated: instructions, rows: 200}
    eval: {generated: instructions, split: eval, rows: 16}
    max_length: 128
  loss: {kind: simpo}
  training: {pairs_per_update: 8, max_steps: 60, eval_steps: 20, save_steps: 10, learning_rate: 1e-3}
  evaluation: {prompts: 2, samples: 1, max_new_tokens: 4}
sft:
  training: {learning_rate: 2e-3, pairs_per_update: 8, max_steps: 4}
search:
  loss.beta: [2.0, 5.0, 10.0]
maximize: eval_accuracies/logp
budget: {concurrency: 1}  # trial 0 is interrupted, and one worker trains all three, however busy the machine is
""".replace("TINY_MODEL", TINY_MODEL)


def test_a_sweep_interrupted_resumed_and_exported(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "tiny.yaml"
    file.write_text(TINY)
    first = orchestrate(root, "sweep", str(file))
    assert first.stderr is not None
    progress: list[str] = []
    for line in first.stderr:
        progress.append(line)
        if line.startswith("trial 0 step 20/"):
            assert status("tiny", root)["state"] == "running"
            os.killpg(first.pid, signal.SIGTERM)
            break
    out, err = first.communicate(timeout=LIMIT_SECONDS)
    logged = "".join(progress) + err
    assert first.returncode == ExitCode.INTERRUPTED, logged
    assert "  orchestrate resume tiny\n" in logged
    left = status("tiny", root)
    assert left["state"] == "interrupted"
    assert "RUNNING" in {t["state"] for t in left["trials"]}

    out, err = called(root, "resume", "tiny", "--set", "keep_models=2")
    assert "Best: " in out
    found = status("tiny", root)
    assert (found["state"], [t["state"] for t in found["trials"]]) == ("finished", ["COMPLETE"] * 3)
    assert {t["step"] for t in found["trials"]} == {60} == {t["steps"] for t in found["trials"]}
    assert json.dumps(found)

    folder = SweepFolder(root, "tiny")
    assert len(list(folder.path.glob("trials/*/*/model"))) == 2
    assert not list(folder.path.glob("trials/*/*/checkpoints"))
    assert not list(folder.path.glob("ray/tune-*")), "Tune's pickles are gone"
    _check_mlflow(root, found)
    assert "Result" in folder.report.read_text(encoding="utf-8")
    assert list((root / "artifacts").rglob("report.html")), "the report is an artifact of the parent run"
    assert "Next:" in err
    assert "orchestrate report tiny" in err
    _check_export(root, tmp_path / "exported")
    assert compare_sweep(root, "tiny") == []


def _check_mlflow(root: Path, found: dict[str, object]) -> None:
    rows = sqlite3.connect(root / "mlflow.db").execute(
        "select t.value, r.run_uuid, r.status from runs r join tags t using (run_uuid) where t.key = 'prefsweep.run'"
    )
    runs = {name: (run_id, state) for name, run_id, state in rows}
    assert {name: state for name, (_, state) in runs.items()} == dict.fromkeys(
        ("sweep", "sft", "0", "1", "2"), "FINISHED"
    )
    trials = found["trials"]
    assert isinstance(trials, list)
    assert {str(t["number"]): t["run_id"] for t in trials} == {n: runs[n][0] for n in ("0", "1", "2")}
    steps = sqlite3.connect(root / "mlflow.db").execute(
        "select step, count(*) from metrics where key = 'loss' and run_uuid = ? group by step", (runs["0"][0],)
    )
    assert dict(steps.fetchall()) == dict.fromkeys(range(1, 61), 1), "each step once, also over the interruption"


def _check_export(root: Path, to: Path) -> None:
    winner = best("tiny", root)
    assert export_best_model("tiny", root, to, merge=False) == to
    card = (to / "README.md").read_text()
    assert "loss.beta" in card
    assert f"trial {winner['number']}" in card
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(to).config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(to).eos_token
    with pytest.raises(Exception, match="exists already"):
        export_best_model("tiny", root, to, merge=False)


def test_bad_data_ends_with_its_list_and_leaves_the_name_free(tmp_path: Path) -> None:
    root, rows = tmp_path / "runs", tmp_path / "rows.jsonl"
    good = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(40)]
    rows.write_text("\n".join(json.dumps(row) for row in [*good, {"prompt": "q", "chosen": "a", "rejected": "a"}]))
    text = TINY.replace("train: {generated: instructions, rows: 200}", f"train: {rows}\n    apply_template: false")
    text = text.replace("    eval: {generated: instructions, split: eval, rows: 16}\n", "")
    with without_ray(), pytest.raises(DataError, match="equal chosen and rejected"):
        start(load_spec_text(text, tmp_path), root)
    assert not (root / "tiny").exists()


def test_prompts_for_the_judge_are_looked_at_before_the_first_trial(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "fine"}\n{"prompt": ""}\n')
    text = f"{TINY}\njudge: {{prompts_from: {tmp_path / 'asked.jsonl'}}}\n"
    with without_ray(), pytest.raises(DataError, match=r"judge\.prompts_from: .*row 2: no prompt"):
        start(load_spec_text(text, tmp_path), tmp_path / "runs")
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_trial_too_large_for_the_machine_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="this machine has"):
        start(load_spec_text(TINY, tmp_path, ["resources.cpus_per_trial=4096"]), tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, "tiny")
    folder.path.mkdir()
    folder.spec.write_text(TINY)
    assert folders.lock_holder(folder) is None
    with folders.sweep_lock(folder):
        assert f"pid {os.getpid()} on" in (folders.lock_holder(folder) or "")
        with pytest.raises(SweepHeld, match=f"pid {os.getpid()}"):
            resume("tiny", tmp_path)
    assert folders.lock_holder(folder) is None
    assert status("tiny", tmp_path)["state"] == "interrupted"


def test_stages_and_looking_import_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'transformers'}"
    code = f"import sys, orchestrator.driver.run_sweep; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_a_sweep_of_two_processes_from_its_sft_stage_on(tmp_path: Path) -> None:
    """As on a machine of GPUs: the initial model and each trial are made by two processes, each with slices."""
    file = tmp_path / "tiny.yaml"
    several = ["resources.processes_per_trial=2", "training.max_steps=6", "training.eval_steps=3"]
    several += ["training.distributed=fsdp2", "sft.training.distributed=fsdp2", "search={loss.beta: [2.0, 5.0]}"]
    file.write_text(TINY)
    overrides = [word for one in several for word in ("--set", one)]
    assert "sft: 4 updates done" in finished(tmp_path / "runs", "sweep", str(file), *overrides)[1]
    found = status("tiny", tmp_path / "runs")
    assert [(t["state"], t["attempts"]) for t in found["trials"]] == [("COMPLETE", 1)] * 2
    assert export_best_model("tiny", tmp_path / "runs", tmp_path / "model", merge=False).is_dir()
