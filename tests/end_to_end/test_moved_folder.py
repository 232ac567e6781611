"""A sweep with an SFT stage and adapters: stopped, its runs folder renamed and its data moved, resumed, exported."""

import json
import os
import shutil
import signal
import sqlite3
from pathlib import Path

from orchestrator.commands.status import history, status
from orchestrator.errors import ExitCode
from tests.support.processes import LIMIT_SECONDS, called, orchestrate
from tests.support.specs import TINY_MODEL
from trainer.config.trial import GeneratedSource
from trainer.synthetic.instructions import generate_rows

SWEEP = """
name: tiny
base:
  model: {generated: TINY_MODEL}
  data: {train: rows.jsonl, eval_share: 0.1, max_length: 128}
  loss: {kind: simpo}
  lora: {r: 2}
  training: {pairs_per_update: 8, max_steps: 40, eval_steps: 20, save_steps: 5, learning_rate: 1e-3}
  evaluation: {prompts: 2, samples: 1, max_new_tokens: 4}
sft:
  training: {learning_rate: 2e-3, pairs_per_update: 8, max_steps: 4}
search:
  loss.beta: [2.0, 5.0]
maximize: eval_accuracies/logp
budget: {concurrency: 1}
""".replace("TINY_MODEL", TINY_MODEL)


def statuses(root: Path) -> dict[str, str]:
    """MLflow's status of every run, by its name."""
    with sqlite3.connect(root / "mlflow.db") as store:
        query = "select tags.value, status from runs join tags using (run_uuid) where tags.key = 'prefsweep.run'"
        return dict(store.execute(query).fetchall())


def test_a_stopped_sweep_continues_in_a_renamed_runs_folder_with_its_data_elsewhere(tmp_path: Path) -> None:
    old, root = tmp_path / "old", tmp_path / "new"
    rows = generate_rows(GeneratedSource(generated="instructions", rows=120))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    first = orchestrate(old, "sweep", str(tmp_path / "tiny.yaml"))
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("trial 0 step 20/"):
            os.killpg(first.pid, signal.SIGINT)
            break
    err = first.communicate(timeout=LIMIT_SECONDS)[1]
    assert first.returncode == ExitCode.INTERRUPTED, err
    assert set(statuses(old).values()) == {"FINISHED", "KILLED"}, "none is left running"

    old.rename(root)
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    err = called(root, "resume", "tiny", code=2)[1]
    assert f"there is no {tmp_path}/rows.jsonl" in err
    assert "orchestrate resume tiny --set base.data.train=NEW_PATH" in err
    err = called(root, "resume", "tiny", "--set", f"base.data.train={tmp_path}/moved.jsonl")[1]
    assert "changed base.data.train" in err
    found = status("tiny", root)
    assert (found["state"], [t["state"] for t in found["trials"]]) == ("finished", ["COMPLETE"] * 2)
    texts = [event["text"] for event in history("tiny", root)["events"]]
    (worker,) = (text for text in texts if "worker.trials=1" in text)
    assert "worker.model_loaded=1" in worker
    assert not list(root.glob("tiny/trials/0000/1/checkpoints"))
    assert len(list((root / "cache" / "sft").iterdir())) == 1, "the SFT stage's model was not trained again"
    assert not old.exists(), "nothing is written where the folder was"
    assert set(statuses(root).values()) == {"FINISHED"}
    assert found["tracking"] == {"waiting": 0, "deferred": 0, "refused": 0, "reason": ""}
    assert list((root / "artifacts").rglob("report.html"))
    shutil.move(tmp_path / "moved.jsonl", tmp_path / "gone.jsonl")
    called(root, "best", "tiny", "--export", str(tmp_path / "model"), "--merge")
    assert list((tmp_path / "model").glob("*.safetensors"))
