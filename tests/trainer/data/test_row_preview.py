"""Rows decoded again for `orchestrate data`: random rows come back whole, and a tokenizer's own code needs the flag."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import cli
from tests.support.data_cases import CHATML, chat, good_rows, saved, tokenizer, write_rows
from tests.support.own_code import own_code_model
from trainer.config.trial import DataConfig, ModelConfig
from trainer.data import prepare
from trainer.data.row_preview import preview

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROW = st.one_of(
    st.builds(chat, TEXT, TEXT, TEXT),
    st.builds(lambda ask, same: chat(ask, same, same), TEXT, TEXT),
    st.builds(lambda ask: {"prompt": ask, "chosen": None, "rejected": "x"}, TEXT),
    st.just({"chosen": "alone"}),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return saved(tokenizer(CHATML), tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=8), limit=st.sampled_from([None, 2]))
def test_every_row_is_there_once_and_counts_are_those_of_its_notices(
    rows: list[Any], limit: int | None, tmp_path: Path, model: ModelConfig
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*rows, chat("always", "yes", "no")])
    held_trial = write_rows(tmp_path / "held.jsonl", good_rows(2, "held"))
    given = {"train": path, "eval": held_trial, "max_length": 64, "max_bad_share": 1, "max_train_rows": limit}
    config = DataConfig.model_validate(given | {"apply_template": True})
    made = preview(config, model, tmp_path / "cache")
    paths = [(row.split, row.row) for row in made.rows]
    assert len(set(paths)) == len(paths)
    if limit is None:
        assert [place for place in paths if place[0] == "train"] == [("train", n + 1) for n in range(len(rows) + 1)]
    counted = {finding.kind: 0 for finding in made.report.findings if finding.kind != "no_rows"}
    for finding in made.report.findings:
        if finding.kind != "no_rows":
            counted[finding.kind] += finding.count
    logged = [notice.kind for row in made.rows for notice in row.notices]
    assert {kind: logged.count(kind) for kind in set(logged)} == counted
    assert sum(row.kept for row in made.rows) == made.report.train_rows + made.report.eval_rows
    for row in made.rows:
        assert row.kept <= (row.lengths is not None)
        assert row.kept or row.notices, "left out without a word"
    json.dumps(made.report_json())
    if made.refused is None:
        assert prepare(config, model, tmp_path / "cache").report.model_dump() == made.report.model_dump()


def test_a_tokenizer_with_code_of_its_own_needs_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = own_code_model(tmp_path / "cache", tmp_path / "own")
    train, file = write_rows(tmp_path / "a.jsonl", good_rows(20)), tmp_path / "trial.yaml"
    file.write_text(f"model: {{name_or_path: {model}}}\ndata: {{train: {train}, max_length: 64}}\n")
    file.write_text(file.read_text() + "loss: {kind: simpo}\ntraining: {max_steps: 1, pairs_per_update: 8}\n")
    assert cli.main(["data", str(file)]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert cli.main(["data", str(file), "--trust-remote-code", "--json", "--rows", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_rows_without_a_score_are_shown_as_refused_where_the_loss_reads_scores(
    tmp_path: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat(f"ask {n}", f"yes {n}", "no") | {"score_chosen": 3, "score_rejected": 1} for n in range(12)]
    del rows[4]["score_rejected"]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    trial = {
        "model": model.model_dump(),
        "data": {"train": path, "max_length": 64},
        "training": {"pairs_per_update": 8},
    }
    for alpha, code in ((0.0, 0), (1.0, 2)):
        file = tmp_path / f"{alpha}.json"
        file.write_text(json.dumps(trial | {"loss": {"kind": "dpo", "odpo_alpha": alpha}}))
        assert cli.main(["data", str(file.rename(file.with_suffix(".yaml")))]) == code
        refused = (
            f"1 row has no finite number as score_chosen or score_rejected, which loss.odpo_alpha needs ({path}: 5)"
        )
        assert (refused in capsys.readouterr().err) is bool(code)
