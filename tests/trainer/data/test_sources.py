"""Sources to rows: files of every kind and state, column names, data sets by name, mixing and splitting."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset_builder
from hypothesis import given
from hypothesis import strategies as st

from tests.support.data_cases import chat, data, good_rows, plain, write_rows
from trainer.config.trial import FileSource, HubSource
from trainer.data.data_findings import UnreadableData
from trainer.data.mixing import held_out_prompts, limit_rows, mix_sources, prompt_key, rows_per_source, sample_indices
from trainer.data.row_selection import select_rows
from trainer.data.sources import RawRow, read_source, source_digest

ROWS = [plain("a?", "yes", "no"), plain("b?", "ja", "nein", answer="ja")]


def _read(path: Path, **columns: str) -> list[RawRow]:
    return read_source(FileSource(path=str(path), columns=columns))


# --- files -----------------------------------------------------------------------------------------------------------
def _as_csv(path: Path) -> None:
    path.write_text('prompt,chosen,rejected,answer\r\na?,yes,no,\r\n"b?",ja,nein,ja\r\n', encoding="utf-8")


def _as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"answer": None} | row for row in ROWS]), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", lambda p: write_rows(p, ROWS)),
        ("rows.json", lambda p: p.write_text(json.dumps(ROWS))),
        ("rows.JSON", lambda p: p.write_text(json.dumps({"data": ROWS, "version": 1}))),
        ("rows.csv", _as_csv),
        ("rows.parquet", _as_parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    found = _read(tmp_path / name)
    assert [r.number for r in found] == [1, 2]
    assert [{k: v for k, v in (r.fields or {}).items() if v} for r in found] == ROWS


def test_line_numbers_count_blank_lines_and_carriage_returns_do_not_matter(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\r\n{lines[1]}".encode())
    found = _read(tmp_path / "a.jsonl")
    assert ([r.number for r in found], [r.fields for r in found]) == ([1, 3], ROWS)


def test_broken_lines_are_rows_of_their_own(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    bad_utf8 = good.replace(b"yes", b"y\xffs")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, good[:-5], b"[1]", b"null", bad_utf8, b"[" * 100_000, good]))
    selection = select_rows(data({"path": str(tmp_path / "a.jsonl")}, eval=[str(_other(tmp_path))]))
    found = {f.kind: (f.count, [row for _, row in f.rows]) for f in selection.findings.as_tuple()}
    assert found == {"unreadable": (4, [2, 3, 4, 6]), "not_utf8": (1, [5]), "duplicate_row": (1, [7])}


def _other(folder: Path) -> Path:
    write_rows(folder / "other.jsonl", good_rows(2, "other"))
    return folder / "other.jsonl"


def test_csv_with_a_broken_record_and_foreign_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,chosen,rejected\na,b,c\na,b,c,d\na,\xfc,c\n"x\ny",b,c\n')
    found = _read(tmp_path / "a.csv")
    assert [r.fields is None for r in found] == [False, True, False, False]
    assert found[2].fields == plain("a", "\udcfc", "c")
    assert found[3].fields == plain("x\ny", "b", "c")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"x", "unknown file type"),
        ("a.json", b'{"a": 1}', "no list of rows"),
        ("a.json", b"{", "name it .jsonl"),
        ("a.parquet", b"PAR0", "not a Parquet file"),
    ],
)
def test_files_that_cannot_be_opened(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableData, match=says):
        _read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableData, match=r"data file not found: .*gone\.jsonl"):
        _read(tmp_path / "gone.jsonl")


# --- columns ---------------------------------------------------------------------------------------------------------
def test_columns_are_renamed(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"question": "a?", "good": "yes", "bad": "no", "prompt": "not this"}])
    found = _read(tmp_path / "a.jsonl", prompt="question", chosen="good", rejected="bad")
    assert found[0].fields == plain("a?", "yes", "no")


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "a?", "preferred": "yes", "rejected": "no"}])
    with pytest.raises(UnreadableData, match=r"no column 'chosen'.* it has preferred, prompt, rejected"):
        _read(tmp_path / "a.jsonl")
    with pytest.raises(UnreadableData, match="did you mean 'preferred'"):
        _read(tmp_path / "a.jsonl", chosen="prefered")
    with pytest.raises(UnreadableData, match="unknown field choosen"):
        _read(tmp_path / "a.jsonl", choosen="preferred")


# --- data sets by name -----------------------------------------------------------------------------------------------
def test_a_folder_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"q": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(5)])
    write_rows(folder / "test.jsonl", [{"q": "x?", "chosen": "yes", "rejected": "no"}])
    source = HubSource(dataset=str(folder), split="train", columns={"prompt": "q"})
    found = read_source(source)
    assert [r.number for r in found] == [1, 2, 3, 4, 5]
    assert found[4].fields == plain("4?", "yes", "no")
    digest = source_digest(source)
    assert digest == source_digest(source)
    assert digest != source_digest(HubSource(dataset=str(folder), split="train[:3]"))
    assert digest != source_digest(HubSource(dataset=str(folder), split="test"))
    with pytest.raises(UnreadableData, match=r"cannot be loaded.*Check dataset, subset, split"):
        read_source(HubSource(dataset=str(folder), split="nope"))


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/prefs' on the Hub")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    with pytest.raises(UnreadableData, match=r"someone/prefs:train.*Couldn't reach.*download it"):
        read_source(HubSource(dataset="someone/prefs", split="train"))


def test_a_data_set_of_the_hub_cannot_name_files_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `datasets` library reads absolute paths in the description of a data set, wherever that comes from."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    secret, folder = tmp_path / "secret.jsonl", tmp_path / "set"
    write_rows(secret, [{"prompt": "x?", "chosen": "yes", "rejected": "no"}])
    folder.mkdir()
    files = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {secret}\n"
    (folder / "README.md").write_text(f"---\n{files}---\n")
    described = load_dataset_builder(str(folder))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: described)
    with pytest.raises(UnreadableData, match=r"someone/prefs:train of the hub names a file of this machine, .*secret"):
        read_source(HubSource(dataset="someone/prefs", split="train"))


# --- mixing and splitting --------------------------------------------------------------------------------------------
def _raw(count: int) -> list[RawRow]:
    return [RawRow(i + 1, {}) for i in range(count)]


def test_weights_decide_the_shares_and_no_weights_take_all() -> None:
    assert rows_per_source([100, 50], [None, None]) == [100, 50]
    assert rows_per_source([100, 50], [1.0, 1.0]) == [50, 50]
    assert rows_per_source([100, 50], [3.0, 1.0]) == [100, 33]
    assert rows_per_source([100, 50, 7], [0.7, 0.2, 0.1]) == [49, 14, 7]


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0.01, 100)), min_size=1, max_size=4))
def test_shares_never_repeat_a_row_and_keep_the_proportions(sources: list[tuple[int, float]]) -> None:
    counts, weights = [n for n, _ in sources], [w for _, w in sources]
    found = rows_per_source(counts, weights)
    assert all(0 <= k <= n for k, n in zip(found, counts, strict=True))
    most = min(n / w for n, w in sources)
    assert all(abs(k - most * w) <= 1.001 for k, w in zip(found, weights, strict=True))


def test_a_mix_is_interleaved_and_the_same_every_time() -> None:
    mixed = mix_sources([_raw(90), _raw(30)], [2.0, 1.0])
    assert mixed == mix_sources([_raw(90), _raw(30)], [2.0, 1.0])
    assert Counter(d.source for d in mixed) == {0: 60, 1: 30}
    for start in range(0, 90, 15):
        assert Counter(d.source for d in mixed[start : start + 15]) == {0: 10, 1: 5}
    for at in (0, 1):
        numbers = [d.row.number for d in mixed if d.source == at]
        assert numbers == sorted(set(numbers))


def test_what_is_drawn_is_spread_over_all_rows() -> None:
    assert sample_indices(10, 10, 0) == list(range(10))
    found = sample_indices(1000, 100, 0)
    assert (len(set(found)), found) == (100, sorted(found))
    assert 350 < sum(found) / 100 < 650
    assert limit_rows("abc", None) == ["a", "b", "c"]
    assert limit_rows("abc", 5) == ["a", "b", "c"]


@given(st.lists(st.text(max_size=3), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_held_out_prompts_are_a_share_of_the_distinct_ones(keys: list[str], share: float) -> None:
    found, distinct = held_out_prompts(keys, share), len(set(keys))
    assert found == held_out_prompts(keys[::-1], share)
    if distinct > 1:
        assert 1 <= len(found) < distinct
        assert abs(len(found) - share * distinct) <= 1


def test_no_prompt_is_in_both_splits(tmp_path: Path) -> None:
    rows = [chat(f"ask {i % 20}", f"yes {i}", f"no {i}") for i in range(100)]
    rows += [plain(f"p{i % 7}", f"yes {i}", f"no {i}") for i in range(40)]
    selection = select_rows(data(write_rows(tmp_path / "a.jsonl", rows), eval_share=0.3))
    train, evaluation = ({row.key for row in part} for part in (selection.train, selection.eval))
    assert (len(train), len(evaluation)) == (19, 8)
    assert not train & evaluation
    assert len(selection.train) + len(selection.eval) == 140


def test_what_finalists_are_confirmed_on_is_kept_from_the_search(tmp_path: Path) -> None:
    """Both parts are the held-out rows, each prompt is in one of them, and training is the same with and without."""
    rows = write_rows(tmp_path / "a.jsonl", [chat(f"ask {i % 40}", f"yes {i}", f"no {i}") for i in range(120)])
    more = {"eval_share": 0.5, "max_eval_rows": 45}
    whole = select_rows(data(rows, **more))
    search, confirm = (
        select_rows(data(rows, confirm_share=0.4, eval_on=part, **more)) for part in ("search", "confirm")
    )
    numbers = [{row.sampled.row.number for row in part.eval} for part in (whole, search, confirm)]
    assert numbers[1] | numbers[2] == numbers[0]
    assert not {row.key for row in search.eval} & {row.key for row in confirm.eval}
    prompts = [len({row.key for row in part.eval}) for part in (whole, confirm)]
    assert prompts[1] == round(0.4 * prompts[0])
    assert [row.address("train") for row in search.train] == [row.address("train") for row in whole.train]
    assert [row.address("train") for row in confirm.train] == [row.address("train") for row in whole.train]
    (kept,) = [found for found in search.findings.as_tuple() if found.kind == "kept_to_confirm"]
    assert kept.count == len(confirm.eval)
    one = write_rows(tmp_path / "b.jsonl", [chat("ask", f"yes {i}", f"no {i}") for i in range(4)])
    alone = data(rows, eval=str(one), confirm_share=0.4)
    assert select_rows(alone).eval == [], "one prompt cannot be on both sides"


def test_implicit_prompts_of_plain_dialogues_are_parted_at_the_answer() -> None:
    assert prompt_key("\n\nHuman: hi\n\nAssistant: I") == prompt_key("\n\nHuman: hi\n\nAssistant:")
    assert prompt_key("a  b\n") == prompt_key("a b")
    assert prompt_key("a b") != prompt_key("a c")


def test_row_limits_hold_for_each_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", good_rows(100))
    selection = select_rows(data(path, max_train_rows=30, max_eval_rows=4))
    assert (len(selection.train), len(selection.eval)) == (30, 4)
    assert selection.checked_rows == 100
