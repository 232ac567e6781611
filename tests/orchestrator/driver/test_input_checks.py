"""What `plan` and `doctor` find in a sweep's inputs, `sweep` and `resume` find before Ray starts, in the same words."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver import run_sweep
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from tests.support.http_server import refusing
from tests.support.processes import call
from trainer.data.mixing import held_out_prompts, prompt_key

SWEEP = """
name: few
base:
  model: {generated: {}}
  data: {train: rows.jsonl, max_length: 64, apply_template: true}
  training: {max_steps: 4, pairs_per_update: PAIRS}
search: {loss.beta: [2.0, 10.0]}
maximize: eval_margins/logp
require: off
"""
TOO_FEW = "training pairs are fewer than one update of pairs_per_update"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may not start."""

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(run_sweep, "local_cluster", start)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_rows(path: Path, counts: dict[str, int]) -> None:
    rows = [
        {"prompt": f"question {prompt}", "chosen": f"yes {n}", "rejected": f"no {n}"}
        for prompt, count in counts.items()
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check_refused(folder: Path, text: str, sentence: str, *, by_plan: bool = True) -> None:
    """`plan`, `doctor` and `sweep` say the sentence with exit code 2, and the sweep's name stays free."""
    file, runs = folder / "few.yaml", folder / "runs"
    file.write_text(text, encoding="utf-8")
    for command in (*(["plan"] if by_plan else []), "doctor", "sweep", "sweep"):
        code, out, err = call(runs, command, str(file), *(["--json"] if command == "doctor" else []))
        assert code == 2, (command, out, err)
        assert " ".join(sentence.split()) in " ".join((out + err).split()), (command, out, err)
    assert not (runs / "few").exists()


@pytest.mark.parametrize(
    ("pairs", "more", "sentence"),
    [
        ("64", "", f"the 18 {TOO_FEW} 64"),
        ("8", "enqueue: [{training.pairs_per_update: 64}]\n", f"the 18 {TOO_FEW} 64"),
        ("8", "sft: {training: {max_steps: 2, pairs_per_update: 32}}\n", f"the sft stage: the 18 {TOO_FEW} 32"),
        ("8", "judge: {prompts_from: asked.jsonl}\n", "judge.prompts_from: "),
        ("8", "judge: {prompts_from: open.jsonl}\n", "judge: none of the 1 prompts has an `answer` for the checker"),
    ],
)
def test_too_few_pairs_or_no_prompts_are_found_before_ray_by_all_commands(
    pairs: str, more: str, sentence: str, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", {str(n): 1 for n in range(20)})
    (tmp_path / "asked.jsonl").write_text('{"colour": "red"}\n', encoding="utf-8")
    (tmp_path / "open.jsonl").write_text('{"prompt": "why"}\n', encoding="utf-8")
    check_refused(tmp_path, SWEEP.replace("PAIRS", pairs) + more, sentence)


def test_a_searched_size_is_checked_at_its_ends(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", {str(n): 1 for n in range(20)})
    text = SWEEP.replace("PAIRS", "8")
    check_refused(tmp_path, text.replace("search: {", "search: {data.max_train_rows: [4, 16], "), f"the 4 {TOO_FEW} 8")
    check_refused(tmp_path, text.replace("search: {", "search: {training.pairs_per_update: [8, 32], "), f"{TOO_FEW} 32")


def test_rows_of_few_prompts_are_split_as_for_training_before_a_sweep_is_refused(tmp_path: Path) -> None:
    """70 rows with a tenth held out leave about 63; of two prompts one is held out, with 4 rows or with 66."""
    keys = {name: prompt_key([{"role": "user", "content": f"question {name}"}]) for name in ("a", "b")}
    (out,) = held_out_prompts(list(keys.values()), 0.1)
    held, trained = ("a", "b") if keys["a"] == out else ("b", "a")
    text = SWEEP.replace("PAIRS", "64").replace("max_length", "eval_share: 0.1, max_length")
    write_rows(tmp_path / "rows.jsonl", {held: 66, trained: 4})
    check_refused(tmp_path, text, f"the 4 {TOO_FEW} 64")
    write_rows(tmp_path / "rows.jsonl", {held: 4, trained: 66})
    assert call(tmp_path / "runs", "plan", str(tmp_path / "few.yaml"))[0] == 0
    assert "Ray was started" in call(tmp_path / "runs", "sweep", str(tmp_path / "few.yaml"))[2], "not refused"


def test_an_sft_stage_with_a_searched_model_is_refused_at_its_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", {str(n): 1 for n in range(20)})
    text = SWEEP.replace("PAIRS", "8").replace("{generated: {}}", "{name_or_path: a}")
    text = text.replace("search: {", "search: {model.name_or_path: [a, b], ")
    text += "sft: {training: {max_steps: 2, pairs_per_update: 8}}\n"
    check_refused(tmp_path, text, "few.yaml:7: search.model.name_or_path: the sft stage trains one initial model")


def test_a_model_that_may_not_be_downloaded_is_missed_before_ray(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", {str(n): 1 for n in range(20)})
    text = SWEEP.replace("PAIRS", "8").replace("{generated: {}}", "{name_or_path: nobody/nothing-7b}")
    check_refused(tmp_path, text, "HF_HUB_OFFLINE is set", by_plan=False)


def test_a_database_that_does_not_answer_is_missed_before_ray_and_the_name_stays_free(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", {str(n): 1 for n in range(20)})
    with refusing() as port:
        text = SWEEP.replace("PAIRS", "8") + f"storage: postgresql+psycopg://127.0.0.1:{port}/sweeps\n"
        (tmp_path / "few.yaml").write_text(text, encoding="utf-8")
        for _ in range(2):
            code, _, err = call(tmp_path / "runs", "sweep", str(tmp_path / "few.yaml"))
            assert code == 5
            assert f"the study in postgresql+psycopg://127.0.0.1:{port}/sweeps refused" in err
    assert not (tmp_path / "runs" / "few").exists()


def test_resume_checks_what_its_changes_need_before_ray(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", {str(n): 1 for n in range(20)})
    text = SWEEP.replace("PAIRS", "8").replace(
        "search: {loss.beta", "search: {training.pairs_per_update: [8], loss.beta"
    )
    spec, folder = load_spec_text(text, tmp_path), SweepFolder(tmp_path / "runs", "few")
    with Study.create(folder, spec) as study:
        study.ask()
    folder.spec.write_text(dump_spec(spec), encoding="utf-8")
    before = folder.spec.read_bytes()
    code, _, err = call(tmp_path / "runs", "resume", "few", "--set", "search.training.pairs_per_update=[8, 32]")
    assert (code, f"the 18 {TOO_FEW} 32" in err) == (2, True), err
    assert folder.spec.read_bytes() == before
