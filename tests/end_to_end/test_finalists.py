"""A sweep with finalists through the command: planned, run, extended, exported, and refused where rows were seen."""

import json
import sqlite3
from pathlib import Path

import pytest

from tests.support.processes import finished, json_of
from tests.support.specs import TINY_MODEL
from trainer.config.trial import GeneratedSource
from trainer.storage.atomic_files import digest_of
from trainer.synthetic import generate_rows

SWEEP = """
name: fin
base:
  model: {generated: TINY_MODEL}
  data:
    train: {generated: instructions, rows: 80}
    eval: {generated: instructions, split: eval, rows: 24}
    max_length: 128
  training: {pairs_per_update: 8, max_steps: 4, eval_steps: 2, learning_rate: 1e-3}
  evaluation: {prompts: 1, samples: 1, max_new_tokens: 2}
search:
  loss.beta: [2.0, 10.0]
maximize: eval_margins/logp
require: off
finalists: {top: 2, seeds: 2}
""".replace("TINY_MODEL", TINY_MODEL)


@pytest.mark.slow
def test_the_best_of_a_small_sweep_is_confirmed_and_shipped(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "fin.yaml"
    file.write_text(f"{SWEEP}judge: {{top: 2, prompts: 6, max_new_tokens: 2}}\n", encoding="utf-8")
    plan = json_of(root, "plan", str(file))
    assert (plan["trials"], plan["finalists"], plan["eval_pairs"]) == (2, 4, 12)
    assert any("4 trials on top of budget.trials" in notice for notice in plan["notices"])
    err = finished(root, "sweep", str(file))[1]
    assert "finalists: " in err
    found = json_of(root, "status", "fin")
    assert found["state"] == "finished"
    assert found["why"].endswith("; 2 finalists")
    assert [t["state"] for t in found["trials"]] == ["COMPLETE"] * 6
    assert sorted(t["finalist_of"] for t in found["trials"][2:]) == [0, 0, 1, 1]
    finalists = found["finalists"]
    assert finalists["pairs"] == 12, "half of the held-out prompts"
    best = json_of(root, "best", "fin")
    assert best["number"] in finalists["trials"]
    (mean,) = [value["mean"] for value in finalists["values"] if value["of"] == finalists["recommended"]]
    assert best["value"] == pytest.approx(mean["value"])
    with sqlite3.connect(root / "mlflow.db") as store:
        tags = store.execute("select r.name, t.key, t.value from runs r join tags t using (run_uuid)").fetchall()
    assert {(name, value) for name, key, value in tags if key == "stage"} == {
        (f"trial {n}", "finalists") for n in (2, 3, 4, 5)
    }
    assert ("fin", "confirmed.of", str(finalists["recommended"])) in tags
    rows: dict[str, set[int]] = {}
    from safetensors.numpy import load_file

    for trial in found["trials"]:
        (pairs,) = (root / "fin" / "trials").glob(f"{trial['number']:04d}*/1/eval_pairs.safetensors")
        side = "search" if trial.get("finalist_of") is None else "confirm"
        rows.setdefault(side, set()).update(load_file(pairs)["row"].tolist())
    assert not rows["search"] & rows["confirm"]
    assert len(rows["search"]) == len(rows["confirm"]) == 12
    page = (root / "fin" / "report.html").read_text(encoding="utf-8")
    assert "Finalists" in page
    assert "Judgements" in page
    check_judged(root, {trial["number"]: trial["finalist_of"] for trial in found["trials"][2:]}, rows["confirm"], tags)
    more = finished(root, "resume", "fin", "--set", "finalists.seeds=3")[1]
    assert "changed finalists.seeds: 2 -> 3" in more
    assert len(json_of(root, "status", "fin")["trials"]) == 8
    finished(root, "best", "fin", "--export", str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())


def check_judged(
    root: Path, finalist_of: dict[int, int], confirming: set[int], tags: list[tuple[str, str, str]]
) -> None:
    """One seed of each finalist is judged, on prompts that the search has not seen; the command repeats no answer."""
    judged = json.loads((root / "fin" / "judge" / "judge.json").read_text(encoding="utf-8"))
    trials = {int(number) for number in judged}
    assert sorted(finalist_of[number] for number in trials) == [0, 1]
    assert {name for name, key, _ in tags if key == "judge"} == {"fin", *(f"trial {number}" for number in trials)}
    asked = {each["prompt"] for by in judged.values() for found in by.values() for each in found["outcomes"]}
    source = GeneratedSource.model_validate({"generated": "instructions", "split": "eval", "rows": 24})
    keys = {n: digest_of(row["prompt"])[:32] for n, row in enumerate(generate_rows(source), 1)}
    assert len(asked) == 6
    assert asked <= {keys[n] for n in confirming}
    answers = {file: file.stat().st_mtime_ns for file in (root / "cache" / "answers").iterdir()}
    out = finished(root, "judge", "fin", "--json")[0]
    assert json.loads(out)["trials"].keys() == judged.keys()
    assert {file: file.stat().st_mtime_ns for file in (root / "cache" / "answers").iterdir()} == answers


@pytest.mark.slow
def test_finalists_are_refused_after_a_search_that_has_seen_every_row(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "fin.yaml"
    file.write_text(
        SWEEP.replace("finalists: {top: 2, seeds: 2}\n", "").replace("[2.0, 10.0]", "[2.0]"), encoding="utf-8"
    )
    finished(root, "sweep", str(file))
    before = json_of(root, "status", "fin")
    err = finished(root, "resume", "fin", "--set", "finalists.top=2", code=2)[1]
    assert "were evaluated on all held-out rows" in err
    assert "--name OTHER --set finalists.top=3" in err
    assert json_of(root, "status", "fin") == before
