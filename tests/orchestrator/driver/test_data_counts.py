"""Rows left out are counted by kind: when a sweep starts, in MLflow, in the report, and by the trainer alone."""

import json
import logging
from pathlib import Path

import pytest

from dashboards.analysis.load_frame import load_frame
from dashboards.diagnosis.diagnose import analyze
from dashboards.report.html_page import report_page
from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.data_stage import check_data, load_data_report
from orchestrator.driver.parent_run import start_parent_run
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from tests.support.preparation import PreparedHere
from tests.support.recorders import ListSink, SilentView
from trainer.__main__ import main
from trainer.data.data_findings import DataFinding

SWEEP_FILE = """
name: s
base:
  model: {generated: {}}
  data: {train: rows.jsonl, eval: held.jsonl, max_length: 128, apply_template: true}
  loss: {kind: simpo}
  training: {max_steps: 1, pairs_per_update: 4}
  evaluation: {prompts: 0}
search: {loss.beta: [2.0, 3.0]}
maximize: eval_accuracies/logp
"""
ROWS = [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(400)]


def written(path: Path, file: str = SWEEP_FILE) -> SweepSpec:
    rows = [*ROWS]
    rows[6] |= {"rejected": ""}
    rows[8] |= {"chosen": "same", "rejected": "same"}
    rows[9] |= {"rejected": ""}
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_trial = [ROWS[20], *({"prompt": f"held {n}", "chosen": "yes", "rejected": "no"} for n in range(6))]
    (path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_trial))
    return load_spec_text(file, path)


def started(path: Path, spec: SweepSpec) -> tuple[SweepFolder, list[str]]:
    folder, view = SweepFolder(path / "runs", "s"), SilentView()
    folder.path.mkdir(parents=True)
    folder.spec.write_text(dump_spec(spec))
    check_data(spec, folder, view, PreparedHere(folder.cache))  # pyright: ignore[reportArgumentType]
    return folder, view.said


def test_each_finding_is_said_once_with_the_values_of_the_settings_that_it_cites(tmp_path: Path) -> None:
    rows = [row | {"chosen": f"{row['chosen']} " + "so " * 200} for row in ROWS[:3]]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *ROWS[3:80]]))
    text = SWEEP_FILE.replace("rows.jsonl", "long.jsonl").replace("eval: held.jsonl, ", "")
    sft = "sft: {training: {max_steps: 1, pairs_per_update: 4}, data: {train: long.jsonl, apply_template: true, "
    for length, times in ((128, 1), (96, 2)):
        spec = load_spec_text(f"{text}{sft}max_length: {length}}}}}\n", tmp_path)
        (tmp_path / str(length)).mkdir()
        _, messages = started(tmp_path / str(length), spec)
        said = [message for message in messages if "response cut at" in message]
        assert len(said) == times, "the SFT stage's data only where another value changes what is said"
        assert "3 rows have a response cut at data.max_length 128; it loses its end token" in said[0]
        assert all("data.max_length 96;" in message for message in said[1:])


def test_a_report_of_an_earlier_version_names_the_setting_alone() -> None:
    stored = {"kind": "response_cut", "severity": "notice", "count": 2, "rows": [("a", 1), ("a", 2)], "detail": ""}
    assert str(DataFinding.model_validate(stored)) == (
        "2 rows have a response cut at data.max_length; it loses its end token (a: 1, 2)"
    )


def test_a_sweep_says_at_its_start_what_it_leaves_out(tmp_path: Path) -> None:
    spec = written(tmp_path)
    _, messages = started(tmp_path, spec)
    rows = spec.base.data.train[0].path  # pyright: ignore[reportAttributeAccessIssue]
    assert "data: 396 pairs to train on, 7 to evaluate on" in messages
    assert "data: 3 of 407 rows are bad and left out (0.74%)" in messages
    assert f"data: 2 rows have an empty response ({rows}: 7, 10)" in messages
    assert f"data: 1 row has equal chosen and rejected responses ({rows}: 9)" in messages
    assert f"data: 1 row has a prompt that is evaluated too; left out of training ({rows}: 21)" in messages


def test_the_trainer_alone_says_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = written(tmp_path)
    _, messages = started(tmp_path, spec)
    file = tmp_path / "trial.yaml"
    file.write_text(json.dumps(spec.base.model_dump(mode="json", exclude_none=True)))
    caplog.set_level(logging.INFO, logger="trainer")
    assert main([str(file), "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "runs" / "cache")]) == 0
    logged = [record.getMessage() for record in caplog.records if record.getMessage().startswith("data: ")]
    assert logged == [line for line in messages if line.startswith("data: ")]
    assert len(logged) > 4


def test_counts_by_kind_are_tags_of_the_sweeps_run_and_the_same_again_on_resume(tmp_path: Path) -> None:
    spec = written(tmp_path)
    folder, _ = started(tmp_path, spec)
    report = load_data_report(folder)
    first, again = ListSink(), ListSink()
    with Study.create(folder, spec) as study:
        for sink in (first, again):
            start_parent_run(study, sink, DashboardReporter(), report.fingerprint)
    tags = first.tags(SWEEP_RUN)
    assert {name: value for name, value in tags.items() if name.startswith("data.") and name != "data.fingerprint"} == {
        "data.train_rows": "396",
        "data.eval_rows": "7",
        "data.bad_rows": "3",
        "data.dropped_rows": "1",
        "data.rows.empty_response": "2",
        "data.rows.equal_responses": "1",
        "data.rows.shared_prompt": "1",
    }
    assert {k: v for k, v in again.tags(SWEEP_RUN).items() if k.startswith("data.")} == {
        k: v for k, v in tags.items() if k.startswith("data.")
    }


def test_the_report_counts_them_too(tmp_path: Path) -> None:
    spec = written(tmp_path)
    folder, _ = started(tmp_path, spec)
    with Study.create(folder, spec) as study:
        made = report_page(analyze(load_frame(study, state="running")))
    assert "3 bad, 1 for other reasons" in made
    for words in ("2 rows have an empty response", "1 row has a prompt that is evaluated too"):
        assert words in made


def test_other_data_of_the_search_and_of_the_sft_stage_is_told_where_it_differs(tmp_path: Path) -> None:
    rows = [{"prompt": f"other {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(300)]
    rows[4]["rejected"] = ""
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = SWEEP_FILE.replace("{loss.beta: [2.0, 3.0]}", "{data.max_train_rows: [8, 300]}")
    spec = written(
        tmp_path,
        file + "sft: {training: {max_steps: 1}, data: {train: sft.jsonl, max_length: 64, apply_template: true}}\n",
    )
    (tmp_path / "rows.jsonl").open("a").write(json.dumps(ROWS[30]) + "\n")
    _, messages = started(tmp_path, spec)
    assert any(line.startswith("data of the sft stage: 1 row has an empty response (") for line in messages)
    repeated = [line for line in messages if "repeats an earlier row" in line]
    assert len([line for line in messages if "2 rows have an empty response" in line]) == 1, "said once"
    assert repeated == [line for line in messages if line.startswith("data: 1 row repeats an earlier row (")]
