"""`orchestrate resume NAME --set budget.trials=N` in a terminal: a larger budget, told as a diff, kept in history."""

from pathlib import Path

import pytest

from tests.support.processes import finished, json_of
from tests.support.specs import TINY_MODEL

SWEEP = """
name: more
base:
  model: {generated: TINY_MODEL}
  data:
    train: {generated: instructions, rows: 80}
    eval: {generated: instructions, split: eval, rows: 8}
    max_length: 128
  training: {pairs_per_update: 8, max_steps: 4, eval_steps: 2, learning_rate: 1e-3}
  evaluation: {prompts: 1, samples: 1, max_new_tokens: 2}
search:
  loss.beta: {uniform: [1.0, 10.0]}
sampler: {kind: random, seed: 3}
maximize: eval_accuracies/logp
budget: {trials: 2}
""".replace("TINY_MODEL", TINY_MODEL)


@pytest.mark.slow
def test_a_finished_sweep_is_extended(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (tmp_path / "more.yaml").write_text(SWEEP, encoding="utf-8")
    finished(root, "sweep", str(tmp_path / "more.yaml"))
    before = json_of(root, "status", "more")
    assert (before["state"], before["why"], len(before["trials"])) == ("finished", "2 of 2 trials issued", 2)
    assert (
        "base.loss.label_smoothing"
        in finished(root, "resume", "more", "--set", "base.loss.label_smoothing=0.1", code=2)[1]
    )
    assert json_of(root, "status", "more") == before
    larger = ("resume", "more", "--set", "budget.trials=3")
    assert "changed budget.trials: 2 -> 3\n" in finished(root, *larger)[1]
    after = json_of(root, "status", "more")
    assert (after["state"], after["why"]) == ("finished", "3 of 3 trials issued")
    assert after["trials"][:2] == before["trials"], "what was there is as it was, run ids included"
    assert [t["state"] for t in after["trials"]] == ["COMPLETE"] * 3
    events = json_of(root, "history", "more")["events"]
    assert [e["text"] for e in events if e["kind"] == "spec"] == ["budget.trials: 2 -> 3"]
    assert [e["trial"] for e in events if e["kind"] == "issued"] == [0, 1, 2]
    assert "trials: 3" in (tmp_path / "runs" / "more" / "sweep.yaml").read_text()
    assert "changed" not in finished(root, *larger)[1]
