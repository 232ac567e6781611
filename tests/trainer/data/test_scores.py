"""Scores of rows, for objectives that read them: read beside the tokenized pairs, refused where one is missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.data_cases import plain, write_rows
from trainer.config.trial import DataConfig, ModelConfig
from trainer.data import BadData, UnreadableData, prepare, score_gaps

MODEL = ModelConfig.model_validate(
    {"generated": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}}
)


def data(source: Any, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": source, "apply_template": False, "max_length": 64, **more})


def rows(count: int) -> list[dict[str, Any]]:
    return [
        plain(f"River {i}?", f"Rhine {i}", f"Hill {i}", score_chosen=2.0 + i, score_rejected=2) for i in range(count)
    ]


def test_every_pair_has_the_gap_of_its_own_row(tmp_path: Path) -> None:
    """Whatever the mixture, the split and the rows left out make of the order."""
    good, other = rows(30), rows(12)
    good[4]["chosen"] = good[4]["rejected"]  # left out
    for number, row in enumerate(other):
        row["prompt"], row["good"], row["score_chosen"] = f"Town {number}?", row["score_chosen"], 99
    sources = [
        {"path": write_rows(tmp_path / "a.jsonl", good), "weight": 2},
        {"path": write_rows(tmp_path / "b.jsonl", other), "weight": 1, "columns": {"score_chosen": "good"}},
    ]
    config = data(sources, eval_share=0.3, max_bad_share=1.0)
    found = prepare(config, MODEL, tmp_path / "cache")
    gaps = score_gaps(config, found, tmp_path / "cache")
    assert found.report.bad_rows == 1
    for pairs, split in ((found.train, gaps.train), (found.eval, gaps.eval)):
        assert len(pairs) > 3
        assert split.dtype == np.float64
        assert split.tolist() == [row - 1 for row in pairs.rows.tolist()]
    assert {0, 1} == set(found.train.sources.tolist())


def test_tokenized_data_of_before_stays_valid_and_scores_are_cached_beside_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(20))
    before = prepare(data(path), MODEL, tmp_path / "cache")
    files = {p: p.read_bytes() for p in (tmp_path / "cache/data" / before.fingerprint).iterdir()}
    first = score_gaps(data(path), before, tmp_path / "cache")
    assert not prepare(data(path), MODEL, tmp_path / "cache").was_computed
    assert {p: p.read_bytes() for p in files} == files
    Path(path).unlink()
    again = score_gaps(data(path), before, tmp_path / "cache")
    assert again.train.tolist() == first.train.tolist()
    assert len(first.train) + len(first.eval) == 20


@pytest.mark.parametrize("value", [None, "high", True, float("nan"), [5], "absent"])
def test_rows_without_a_score_are_refused_with_count_file_and_line(tmp_path: Path, value: Any) -> None:
    given = rows(20)
    for line in (3, 9, 17):
        given[line - 1]["score_rejected"] = value
    if value == "absent":
        for line in (3, 9, 17):
            del given[line - 1]["score_rejected"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    config = data(str(path))
    found = prepare(config, MODEL, tmp_path / "cache")
    with pytest.raises(BadData, match=rf"3 rows have no finite number.*{path}: 3, 9, 17\)") as caught:
        score_gaps(config, found, tmp_path / "cache")
    assert "score_rejected is" in str(caught.value)
    assert "loss.odpo_alpha" in caught.value.next_step
    assert not (tmp_path / "cache/data" / f"{found.fingerprint}-scores").exists()


def test_a_source_without_the_column_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    given = [{"messages": [], **row} for row in rows(9)]
    for row in given:
        row["skore_chosen"] = row.pop("score_chosen")
    config = data(write_rows(tmp_path / "a.jsonl", given))
    found = prepare(config, MODEL, tmp_path / "cache")
    with pytest.raises(UnreadableData, match=r"odpo_alpha.*no column 'score_chosen'.*did you mean 'skore_chosen'"):
        score_gaps(config, found, tmp_path / "cache")


def test_text_of_csv_files_is_read_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [f"River {i}?,Rhine {i},Hill {i},{i}.5,{i}" for i in range(12)]
    path.write_text("\n".join(["prompt,chosen,rejected,score_chosen,score_rejected", *lines]))
    config = data(str(path))
    gaps = score_gaps(config, prepare(config, MODEL, tmp_path / "cache"), tmp_path / "cache")
    assert set(gaps.train.tolist()) == {0.5}


def test_equal_and_reversed_scores_are_counted(tmp_path: Path) -> None:
    given = rows(30)
    for row in given[1:]:
        row["score_chosen"] = 2 + (row["score_chosen"] - 2) % 3 - 1
    config = data(write_rows(tmp_path / "a.jsonl", given))
    gaps = score_gaps(config, prepare(config, MODEL, tmp_path / "cache"), tmp_path / "cache")
    equal, lower = int((gaps.train == 0).sum()), int((gaps.train < 0).sum())
    assert min(equal, lower) > 3
    counts = f"of {len(gaps.train)} training pairs {equal} have equal scores and {lower} a lower one for chosen"
    assert gaps.notice("log") == f"odpo_alpha: {counts}: their loss and gradient are 0"
    assert gaps.notice("identity") == f"odpo_alpha: {counts}: their offset is not above 0"
    generated = data({"generated": "instructions", "rows": 40})
    made = score_gaps(generated, prepare(generated, MODEL, tmp_path / "cache"), tmp_path / "cache")
    assert made.notice("log") == ""
