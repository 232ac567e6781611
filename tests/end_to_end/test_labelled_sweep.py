"""A sweep on rows with one response and a label, through the command: from `plan --probe` to the shipped model."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import called, finished, json_of
from tests.support.specs import TINY_MODEL
from trainer.config.trial import GeneratedSource
from trainer.synthetic.instructions import generate_rows

SWEEP = """
name: labels
base:
  model: {generated: TINY_MODEL}
  data: {train: train.jsonl, eval: held.jsonl, max_length: 128}
  loss: {kind: kto}
  training: {pairs_per_update: 8, max_steps: 4, eval_steps: 2, learning_rate: 1e-3}
  evaluation: {prompts: 4, samples: 1, max_new_tokens: 4}
search:
  loss.beta: [0.1, 0.3]
maximize: eval_margins/logp
require: off
finalists: {top: 1, seeds: 2}
judge: {prompts: 4, max_new_tokens: 4}
""".replace("TINY_MODEL", TINY_MODEL)


def labelled(split: str, rows: int) -> str:
    """One of three is desirable."""
    lines: list[str] = []
    for number, row in enumerate(generate_rows(GeneratedSource(generated="instructions", split=split, rows=rows))):
        side = "rejected" if number % 3 else "chosen"
        kept: dict[str, Any] = {"prompt": row["prompt"], "completion": row[side], "answer": row["answer"]}
        lines.append(json.dumps(kept | {"label": side == "chosen"}) + "\n")
    return "".join(lines)


@pytest.mark.slow
def test_labelled_rows_from_plan_to_export(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "labels.yaml"
    file.write_text(SWEEP, encoding="utf-8")
    (tmp_path / "train.jsonl").write_text(labelled("train", 48), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text(labelled("eval", 36), encoding="utf-8")
    plan = json_of(root, "plan", str(file), "--probe")
    assert plan["trials"] == 2
    assert plan["probe"]["measured"]["train_pairs"] == 48
    advice = json_of(root, "advise", str(file))
    assert (advice["pairs"]["gaps"], advice["pairs"]["labels"]) == (None, {"desirable": 16, "undesirable": 32})
    assert any(line["yaml"] == "base.loss.desirable_weight: 2" for line in advice["advice"])
    assert "16 desirable and 32 undesirable responses" in called(root, "advise", str(file))[0]
    err = finished(root, "sweep", str(file))[1]
    assert "one response a row, with a label: train 16 desirable and 32 undesirable" in err
    found = json_of(root, "status", "labels")
    assert [trial["state"] for trial in found["trials"]] == ["COMPLETE"] * 4
    assert 6 <= found["finalists"]["pairs"] <= 30, "intervals count rows"
    metrics = found["trials"][0]["metrics"]
    assert {"eval_kl", "eval_margins/logp", "eval_log_ratio_per_token/rejected"} <= metrics.keys()
    assert not {name for name in metrics if "accuracies" in name}
    page = (root / "labels" / "report.html").read_text(encoding="utf-8")
    assert "Finalists" in page
    assert "Length bias" not in page
    finished(root, "best", "labels", "--export", str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").is_file()
    pairs = file.read_text(encoding="utf-8").replace("name: labels", "name: pairs")
    pairs = pairs.replace("{train: train.jsonl, eval: held.jsonl, max_length: 128}", (
        "{train: {generated: instructions, rows: 48}, eval: {generated: instructions, split: eval, rows: 12}, "
        "max_length: 128}"
    )).replace("finalists: {top: 1, seeds: 2}\njudge: {prompts: 4, max_new_tokens: 4}\n", "")  # fmt: skip
    (tmp_path / "pairs.yaml").write_text(pairs, encoding="utf-8")
    finished(root, "sweep", str(tmp_path / "pairs.yaml"))
    shown = " ".join(" ".join(called(root, "compare", "labels", "pairs")).split())
    assert "labels: not ranked here, as eval_accuracies/logp is not measured on rows with one response" in shown
    rehearsed = finished(root, "sweep", str(file), "--rehearse")[1]
    assert "labels-rehearsal" in rehearsed
