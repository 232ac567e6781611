"""Both engines in one sweep, through Ray, the study and MLflow: the same table, twice."""

import sqlite3
from pathlib import Path

import pytest

from tests.support.processes import finished, json_of
from tests.support.specs import TINY_MODEL

SWEEP = """
name: both
base:
  model: {generated: TINY_MODEL}
  data:
    train: {generated: instructions, rows: 80}
    eval: {generated: instructions, split: eval, rows: 16}
    max_length: 128
  training: {pairs_per_update: 8, max_steps: 8, eval_steps: 4, learning_rate: 1e-3}
  evaluation: {prompts: 2, samples: 1, max_new_tokens: 4}
search:
  engine: [packed, trl]
  loss.kind: [simpo, dpo]
maximize: eval_accuracies/logp
keep_models: 4
""".replace("TINY_MODEL", TINY_MODEL)


@pytest.mark.slow
def test_one_sweep_compares_both_engines(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (tmp_path / "both.yaml").write_text(SWEEP, encoding="utf-8")
    finished(root, "sweep", str(tmp_path / "both.yaml"))
    trials = json_of(root, "status", "both")["trials"]
    assert [t["state"] for t in trials] == ["COMPLETE"] * 4
    by = {(t["params"]["engine"], t["params"]["loss.kind"]): t for t in trials}
    tracked = sqlite3.connect(root / "mlflow.db")
    for kind in ("simpo", "dpo"):
        packed, trl = by["packed", kind], by["trl", kind]
        assert packed["metrics"].keys() == trl["metrics"].keys()
        for name, value in packed["metrics"].items():
            if name.startswith("eval_"):
                assert trl["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        counts = [
            tracked.execute("select key, count(*) from metrics where run_uuid = ? group by key", (t["run_id"],))
            for t in (packed, trl)
        ]
        assert dict(counts[0].fetchall()) == dict(counts[1].fetchall()), "every metric at the same steps"
        engine = tracked.execute("select value from params where key = 'engine' and run_uuid = ?", (trl["run_id"],))
        assert engine.fetchall() == [("trl",)]
