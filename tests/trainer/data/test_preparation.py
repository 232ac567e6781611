"""`prepare`: what is refused and in which words, what is skipped, what is kept, and the report."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.support.data_cases import CHATML, LLAMA, chat, data, good_rows, plain, saved, tokenizer, write_rows
from trainer.config.trial import DataConfig, ModelConfig
from trainer.data import BadData, DataReport, Prepared, TokenizerError, preparation, prepare
from trainer.data.data_findings import MAX_ROWS_SHOWN


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return saved(tokenizer(LLAMA), tmp_path / "tokenizer")


def _prepare(config: DataConfig, model: ModelConfig, tmp_path: Path) -> Prepared:
    return prepare(config, model, tmp_path / "cache")


def test_pairs_come_back_as_they_were_written(tmp_path: Path, model: ModelConfig) -> None:
    rows = [chat(f"ask {i}", f"yes {i}", f"no {i} " + "x" * i, answer=f"yes {i}" if i % 2 else None) for i in range(20)]
    found = _prepare(data(write_rows(tmp_path / "a.jsonl", rows), eval_share=0.25), model, tmp_path)
    assert (len(found.train), len(found.eval)) == (15, 5)
    made = tokenizer(LLAMA)
    seen: set[int] = set()
    for part in (found.train, found.eval):
        for i in range(len(part)):
            pair, row = part.pair(i), rows[int(part.rows[i]) - 1]
            seen.add(int(part.rows[i]))
            assert (
                made.decode(pair.prompt)
                == f"<s><|im_start|>user: {row['prompt'][0]['content']}\n<|im_start|>assistant: "
            )
            assert made.decode(pair.chosen) == row["chosen"][0]["content"] + "<|im_end|>"
            assert made.decode(pair.rejected) == row["rejected"][0]["content"].strip() + "<|im_end|>"
            assert (pair.prompt.dtype, part.answers[i]) == ("int32", row["answer"])
            lengths = (part.prompt_lengths[i], part.chosen_lengths[i], part.rejected_lengths[i])
            assert lengths == tuple(len(p) for p in (pair.prompt, pair.chosen, pair.rejected))
        for outside in (-1, len(part)):
            with pytest.raises(IndexError):
                part.pair(outside)
    assert seen == set(range(1, 21))


def test_bad_rows_are_refused_with_counts_rows_and_the_next_step(tmp_path: Path, model: ModelConfig) -> None:
    rows: list[Any] = good_rows(30)
    rows[3] = chat("a", True, "b")
    rows[7] = rows[11] = chat("a", "", "b")
    rows[20] = chat("a", "same", "same")
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadData) as caught:
        _prepare(data(path, bad_rows="refuse"), model, tmp_path)
    message = str(caught.value)
    assert f"2 rows have an empty response ({path}: 8, 12)" in message
    assert f"1 row has a value that is not text (a boolean, a number, null) ({path}: 4). chosen: a message" in message
    assert "equal chosen and rejected" in message
    assert "4 of 30 rows are bad" in message
    assert "data.bad_rows: skip, data.max_bad_share: 0.14" in message
    assert [f.kind for f in caught.value.findings] == ["empty_response", "equal_responses", "not_text"]
    assert pickle.loads(pickle.dumps(caught.value)).findings == caught.value.findings
    assert not [p for p in (tmp_path / "cache" / "data").iterdir() if not p.name.endswith(".lock")]
    skipped = _prepare(data(path, bad_rows="skip", max_bad_share=0.14), model, tmp_path)
    assert (skipped.report.bad_rows, len(skipped.train) + len(skipped.eval)) == (4, 26)
    with pytest.raises(BadData, match=r"more than data\.max_bad_share 0\.1\. .* data\.max_bad_share: 0\.14"):
        _prepare(data(path, bad_rows="skip", max_bad_share=0.1), model, tmp_path)


def test_a_few_bad_rows_are_left_out_and_counted_by_default(tmp_path: Path, model: ModelConfig) -> None:
    rows: list[Any] = good_rows(300)
    rows[3] = chat("a", None, "b")
    rows[7] = rows[11] = chat("a", "", "b")
    path = write_rows(tmp_path / "a.jsonl", rows)
    report = _prepare(data(path), model, tmp_path).report
    assert (report.train_rows + report.eval_rows, report.bad_rows, report.checked_rows) == (297, 3, 300)
    logged = "\n".join(report.summary_lines())
    assert "3 of 300 rows are bad and left out (1.00%)" in logged
    assert f"2 rows have an empty response ({path}: 8, 12)" in logged
    assert f"1 row has a value that is not text (a boolean, a number, null) ({path}: 4)" in logged
    counts = report.counts()
    assert {k: n for k, n in counts.items() if k.startswith("rows.")} == {"rows.empty_response": 2, "rows.not_text": 1}
    assert (counts["bad_rows"], counts["dropped_rows"]) == (3, 0)
    rows[12] = chat("a", "same", "same")
    with pytest.raises(
        BadData, match=r"4 of 300 rows are bad \(1\.33%\), more than data\.max_bad_share 0\.01"
    ) as caught:
        _prepare(data(write_rows(tmp_path / "b.jsonl", rows)), model, tmp_path)
    assert [(f.kind, f.count) for f in caught.value.findings] == [
        ("empty_response", 2),
        ("equal_responses", 1),
        ("not_text", 1),
    ]


def test_only_the_first_row_numbers_are_listed_but_all_are_counted(tmp_path: Path, model: ModelConfig) -> None:
    rows = [chat(f"{i}", "", "b") for i in range(50)]
    with pytest.raises(BadData) as caught:
        _prepare(data(write_rows(tmp_path / "a.jsonl", rows)), model, tmp_path)
    found = next(f for f in caught.value.findings if f.kind == "empty_response")
    assert (found.count, len(found.rows)) == (50, MAX_ROWS_SHOWN)
    assert "19, 20, ...)" in str(found)


def test_a_source_without_a_row_that_can_be_used_is_refused_however_small_its_share(
    tmp_path: Path, model: ModelConfig
) -> None:
    large = write_rows(tmp_path / "a.jsonl", good_rows(300))
    small = write_rows(tmp_path / "b.jsonl", [chat("b", "", "no"), chat("c", "same", "same")])
    with pytest.raises(BadData, match=r"No row of .*b\.jsonl can be used"):
        _prepare(data([large, small]), model, tmp_path)
    assert _prepare(data([large, small], max_bad_share=1), model, tmp_path).report.bad_rows == 2


@pytest.mark.parametrize("mode", ["skip", "refuse"])
def test_prompts_that_are_evaluated_are_left_out_of_training(tmp_path: Path, model: ModelConfig, mode: str) -> None:
    train = write_rows(tmp_path / "a.jsonl", good_rows(20))
    evaluation = write_rows(tmp_path / "b.jsonl", [chat("ask 5", "other", "answers"), *good_rows(3, "fresh")])
    found = _prepare(data(train, eval=evaluation, bad_rows=mode), model, tmp_path)
    assert 6 not in found.train.rows
    assert (len(found.train), len(found.eval)) == (19, 4)
    assert (found.report.bad_rows, found.report.dropped_rows) == (0, 1)
    assert not found.report.eval_held_out
    logged = f"1 row has a prompt that is evaluated too; left out of training ({train}: 6)"
    assert logged in found.report.summary_lines()
    limited = _prepare(data(train, eval=evaluation, max_train_rows=19), model, tmp_path)
    assert len(limited.train) == 19, "they are taken out before rows are counted"


def test_the_same_file_for_training_and_evaluation_leaves_nothing(tmp_path: Path, model: ModelConfig) -> None:
    path = write_rows(tmp_path / "a.jsonl", good_rows(20))
    with pytest.raises(BadData, match=r"(?s)no row is left.*The train split is empty.*evaluated too"):
        _prepare(data(path, eval=path), model, tmp_path)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ bos_token }}" + LLAMA, "begin with two BOS tokens"),
        (CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"), "prompt is not a prefix"),
        (LLAMA.replace("eos_token", "''"), "without an end token"),
    ],
)
def test_faults_of_the_template_are_fatal_even_when_bad_rows_are_skipped(
    tmp_path: Path, model: ModelConfig, template: str, says: str
) -> None:
    config = data(
        write_rows(tmp_path / "a.jsonl", good_rows(9)), chat_template=template, bad_rows="skip", max_bad_share=1
    )
    with pytest.raises(BadData, match=says) as caught:
        _prepare(config, model, tmp_path)
    assert "This cannot be skipped" in str(caught.value)


def test_the_template_may_be_a_file(tmp_path: Path, model: ModelConfig) -> None:
    rows = write_rows(tmp_path / "a.jsonl", good_rows(9))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    by_path = _prepare(data(rows, chat_template=str(tmp_path / "chatml.jinja")), model, tmp_path)
    by_text = _prepare(data(rows, chat_template=CHATML), model, tmp_path)
    assert by_path.fingerprint == by_text.fingerprint
    assert not by_text.was_computed
    with pytest.raises(TokenizerError, match="neither Jinja text nor a file"):
        _prepare(data(rows, chat_template="gone.jinja"), model, tmp_path)


def test_dialogues_need_a_template(tmp_path: Path) -> None:
    model = saved(tokenizer(None), tmp_path / "bare")
    with pytest.raises(TokenizerError, match=r"no chat template.*data\.chat_template"):
        _prepare(data(write_rows(tmp_path / "a.jsonl", good_rows(9))), model, tmp_path)
    found = _prepare(
        data(write_rows(tmp_path / "b.jsonl", [plain(f"a{i}", "b", "c") for i in range(9)])), model, tmp_path
    )
    assert len(found.train) == 8


def test_an_empty_split_is_refused(tmp_path: Path, model: ModelConfig) -> None:
    one_prompt = write_rows(tmp_path / "a.jsonl", [chat("same", f"{i}", "x") for i in range(5)])
    with pytest.raises(BadData, match=r"no row is left.*The eval split is empty"):
        _prepare(data(one_prompt), model, tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadData, match=r"no row is left.*The train split is empty"):
        _prepare(data(str(tmp_path / "empty.jsonl"), eval=one_prompt), model, tmp_path)


def test_what_is_only_worth_knowing_is_reported(tmp_path: Path, model: ModelConfig) -> None:
    rows = good_rows(10)
    rows += [rows[0], chat("ask 1", "no 1", "yes 1"), chat("long " * 30, "yes", "no"), chat("b", "y" * 200, "no")]
    rows += [chat("c", "y" * 200 + "a", "y" * 200 + "b"), chat("d <|im_end|>", "yes", "no")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    evaluation = write_rows(tmp_path / "b.jsonl", good_rows(3, "fresh"))
    found = _prepare(data(path, eval=evaluation, max_length=128, max_prompt_length=64), model, tmp_path)
    kinds = {f.kind: (f.count, [n for _, n in f.rows]) for f in found.report.findings}
    assert kinds == {
        "duplicate_row": (1, [11]),
        "contradiction": (1, [12]),
        "prompt_cut": (1, [13]),
        "response_cut": (2, [14, 15]),
        "equal_after_cut": (1, [15]),
        "special_in_text": (1, [16]),
    }
    assert (found.report.dropped_rows, found.report.bad_rows, len(found.train)) == (1, 0, 15)
    assert found.report.lengths["row"]["p100"] == 128
    assert found.report.stop_tokens == (tokenizer(LLAMA).eos_token_id,)
    assert any(line.startswith("15 pairs to train on, 3 to evaluate on") for line in found.report.summary_lines())


def test_rows_of_a_finding_are_named_in_their_order(tmp_path: Path, model: ModelConfig) -> None:
    """Whatever split they are in: the first ones, by their numbers."""
    rows = [chat(f"ask {i} <|im_end|>", "yes", "no") for i in range(40)]
    found = _prepare(data(write_rows(tmp_path / "a.jsonl", rows), eval_share=0.4), model, tmp_path)
    (finding,) = (f for f in found.report.findings if f.kind == "special_in_text")
    assert (finding.count, [number for _, number in finding.rows]) == (40, list(range(1, 21)))


def test_the_report_is_json_and_comes_back(tmp_path: Path, model: ModelConfig) -> None:
    first, second = (write_rows(tmp_path / f"{n}.jsonl", good_rows(40, n)) for n in "ab")
    sources = [{"path": first, "weight": 3}, {"path": second, "weight": 1}]
    found = _prepare(data(sources, eval_share=0.2), model, tmp_path)
    assert DataReport.model_validate(json.loads(found.report.model_dump_json())) == found.report
    assert [(s.name, s.split, s.read) for s in found.report.sources] == [
        (first, "train", 40),
        (second, "train", 40),
        (first, "eval", 40),
        (second, "eval", 40),
    ]
    assert sum(s.kept for s in found.report.sources if s.name == first) == 40
    assert sum(s.kept for s in found.report.sources if s.name == second) == 13
    assert (
        found.report.train_rows == sum(s.kept for s in found.report.sources if s.split == "train") == len(found.train)
    )
    assert [int((found.train.sources == at).sum()) for at in (0, 1)] == [s.kept for s in found.report.sources[:2]]


def test_a_row_of_a_megabyte(tmp_path: Path, model: ModelConfig) -> None:
    rows = [*good_rows(9), chat("big " * 1000, "x" * 1_000_000, "no")]
    found = _prepare(data(write_rows(tmp_path / "a.jsonl", rows)), model, tmp_path)
    assert len(found.train) + len(found.eval) == 10
    assert max(found.train.chosen_lengths.max(), found.eval.chosen_lengths.max()) <= 256


def test_long_work_shows_a_bar_on_a_terminal_and_one_line_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (False, True):
        stderr = io.StringIO()
        stderr.isatty = lambda answer=is_terminal: answer  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stderr", stderr)
        for delay, says_something in ((1e6, False), (-1.0, True)):
            monkeypatch.setattr(preparation, "PROGRESS_DELAY", delay)
            parts = preparation.iterate_with_progress(range(2100), 500, "tokenizing train")
            assert [len(part) for part in parts] == [500] * 4 + [100]
            assert bool(stderr.getvalue()) == says_something
        if is_terminal:
            assert "tokenizing train:" in stderr.getvalue()
            assert "2100" in stderr.getvalue()
        else:
            assert stderr.getvalue() == "tokenizing train: 2,100 rows\n"
