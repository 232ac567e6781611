"""Columns: mapped, recognized, left over, of another kind of data; and plain text that meets a chat template."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.data_cases import CHATML, chat, chat_message, data, plain, saved, tokenizer, write_rows
from trainer.config.trial import FileSource, ModelConfig
from trainer.data import BadData, Prepared, UnreadableData, prepare
from trainer.data.sources import RawRow, read_source

ORCA = [
    {"system": f"Answer in {n} words.", "question": f"Name {n} rivers.", "chosen": "Rhine", "rejected": f"{n} rivers"}
    for n in range(20)
]


@pytest.fixture
def chatml(tmp_path: Path) -> ModelConfig:
    return saved(tokenizer(CHATML), tmp_path / "chatml")


@pytest.fixture
def bare(tmp_path: Path) -> ModelConfig:
    return saved(tokenizer(None), tmp_path / "bare")


def _read(path: str, **columns: str | None) -> list[RawRow]:
    return read_source(FileSource(path=path, columns=columns))


def _prepare(tmp_path: Path, model: ModelConfig, rows: list[Any], columns: Any = None, **more: Any) -> Prepared:
    source = {"path": write_rows(tmp_path / "a.jsonl", rows), "columns": columns or {}}
    return prepare(data(source, **more), model, tmp_path / "cache")


def _prompt(found: Prepared, row: int) -> str:
    part, at = next((p, list(p.rows).index(row)) for p in (found.train, found.eval) if row in p.rows)
    return tokenizer(CHATML).decode(part.pair(at).prompt)


def _told(found: Prepared, kind: str) -> list[tuple[str, int]]:
    return [(f.detail, f.count) for f in found.report.findings if f.kind == kind]


# --- the system column -----------------------------------------------------------------------------------------------
def test_a_system_column_is_the_system_message_where_the_template_is_applied(
    tmp_path: Path, chatml: ModelConfig
) -> None:
    found = _prepare(tmp_path, chatml, [*ORCA, ORCA[0] | {"system": "", "question": "Why?"}], apply_template=True)
    assert _prompt(found, 3) == (
        "<|im_start|>system\nAnswer in 2 words.<|im_end|>\n<|im_start|>user\nName 2 rivers.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert _prompt(found, 21) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert _told(found, "recognised_column") == [("'question' is taken for prompt", 21)]


@pytest.mark.parametrize("applied", [False, None])
def test_a_system_text_has_no_place_in_plain_text(tmp_path: Path, bare: ModelConfig, applied: bool | None) -> None:
    with pytest.raises(BadData, match=r"20 rows are plain text with a system text.*columns: \{system: null\}"):
        _prepare(tmp_path, bare, ORCA, apply_template=applied)
    found = _prepare(tmp_path, bare, ORCA, {"system": None}, apply_template=applied)
    assert _prompt(found, 3) == "Name 2 rivers."
    assert not _told(found, "unused_column"), "it was left out on purpose"


def test_a_system_column_beside_dialogues_is_their_first_message_unless_they_have_it(
    tmp_path: Path, chatml: ModelConfig
) -> None:
    rows = [chat(f"ask {i}", "b", "c", system_prompt="Be kind.") for i in range(9)]
    rows[4]["prompt"].insert(0, chat_message("system", "Be kind."))
    found = _prepare(tmp_path, chatml, rows)
    for row in (1, 5):
        assert _prompt(found, row).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nask")
        assert _prompt(found, row).count("Be kind.") == 1
    rows[4]["prompt"][0] = chat_message("system", "Be short.")
    with pytest.raises(BadData, match=r"1 row has a system text that is not the system message.*: 5\)"):
        _prepare(tmp_path, chatml, rows)


def test_a_system_column_and_a_template_ask_one_question(tmp_path: Path, chatml: ModelConfig) -> None:
    rows = [*ORCA, ORCA[0] | {"system": ""}]
    with pytest.raises(BadData, match="21 rows are plain text, and the tokenizer has a chat template") as caught:
        _prepare(tmp_path, chatml, rows)
    assert "needs_template" not in {f.kind for f in caught.value.findings}
    with pytest.raises(BadData, match="20 rows are plain text with a system text or tools"):
        _prepare(tmp_path, chatml, rows, apply_template=False)


def test_tools_have_no_place_in_plain_text(tmp_path: Path, bare: ModelConfig) -> None:
    rows = [plain(f"{i}", "b", "c", tools=[{"name": "add"}]) for i in range(9)]
    with pytest.raises(BadData, match=r"9 rows are plain text with a system text or tools.* Tools"):
        _prepare(tmp_path, bare, rows)


# --- plain text and a chat template ----------------------------------------------------------------------------------
PLAIN = [plain(f"River {i}?", "Rhine", "Hill") for i in range(20)]


def test_plain_text_for_a_tokenizer_with_a_template_asks_what_to_do(tmp_path: Path, chatml: ModelConfig) -> None:
    with pytest.raises(BadData) as caught:
        _prepare(tmp_path, chatml, PLAIN)
    message = str(caught.value)
    assert "20 rows are plain text, and the tokenizer has a chat template" in message
    assert "data.apply_template: true (the prompt becomes a user's message" in message
    assert "This cannot be skipped; decide it and start again." in message
    applied = _prepare(tmp_path, chatml, PLAIN, apply_template=True)
    assert _prompt(applied, 1) == "<|im_start|>user\nRiver 0?<|im_end|>\n<|im_start|>assistant\n"
    stands = _prepare(tmp_path, chatml, PLAIN, apply_template=False)
    assert _prompt(stands, 1) == "River 0?"
    assert applied.fingerprint != stands.fingerprint


def test_nobody_is_asked_where_there_is_nothing_to_decide(
    tmp_path: Path, chatml: ModelConfig, bare: ModelConfig
) -> None:
    assert _prompt(_prepare(tmp_path, bare, PLAIN), 1) == "River 0?"
    rendered = [plain(f"<|im_start|>user\n{i}<|im_end|>\n<|im_start|>assistant\n", "b", "c") for i in range(20)]
    found = _prepare(tmp_path, chatml, rendered)
    assert _prompt(found, 1) == rendered[0]["prompt"]
    assert _told(found, "already_rendered") == [("", 20)]
    written = tokenizer("{% for m in messages %}{{ m.role.upper() + ': ' + m.content + '\n' }}{% endfor %}"
                        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}", eos="</s>")  # fmt: skip
    by_text = [plain(f"USER: {i}\nASSISTANT: ", "b", "c") for i in range(20)]
    assert _told(_prepare(tmp_path, saved(written, tmp_path / "w"), by_text), "already_rendered") == [("", 20)]


CHATML_PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "form",
    [
        CHATML_PROMPT,
        "<s>[INST] {} [/INST]",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "A chat between a user and an assistant. USER: {} ASSISTANT:",
        "### Instruction:\n{}\n\n### Response:\n",
    ],
)
def test_text_that_a_template_rendered_is_not_rendered_again(form: str, tmp_path: Path, chatml: ModelConfig) -> None:
    """By this tokenizer's template or another: refused, and below max_bad_share left out and counted."""
    rendered = [plain(form.format(f"River {i}?"), "Rhine", "Hill") for i in range(20)]
    with pytest.raises(BadData, match="20 rows hold a prompt that a chat template has rendered already") as caught:
        _prepare(tmp_path, chatml, rendered, apply_template=True)
    assert "set data.apply_template: false" in str(caught.value)
    found = _prepare(tmp_path, chatml, [*rendered[:2], *PLAIN], apply_template=True, max_bad_share=0.1)
    ((detail, count),) = _told(found, "rendered_twice")
    assert detail.startswith("The first has ")
    assert count == found.report.bad_rows == 2


def test_a_question_about_a_special_token_is_a_question(tmp_path: Path, chatml: ModelConfig) -> None:
    rows = [plain(f"What does <|im_start|> mean in line {i}?", "A turn.", "Nothing.") for i in range(20)]
    found = _prepare(tmp_path, chatml, rows, apply_template=True)
    assert [f.kind for f in found.report.findings] == ["special_in_text"]


def test_a_template_cannot_be_applied_where_there_is_none(tmp_path: Path, bare: ModelConfig) -> None:
    with pytest.raises(Exception, match=r"data\.apply_template is true.* has no chat template.*data\.chat_template"):
        _prepare(tmp_path, bare, PLAIN, apply_template=True)


# --- names -----------------------------------------------------------------------------------------------------------
def test_all_columns_can_be_mapped(tmp_path: Path) -> None:
    row = {"q": "a?", "good": "yes", "bad": "no", "rules": "Be kind.", "t": [], "g": 5, "b": 3, "pics": [], "sure": "y"}
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "rules", "tools": "t", "images": "pics"}
    columns |= {"score_chosen": "g", "score_rejected": "b", "answer": "sure"}
    found = _read(write_rows(tmp_path / "a.jsonl", [row]), **columns)[0]
    assert found.fields == {ours: row[theirs] for ours, theirs in columns.items()}
    assert found.notices == ()


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ({"question": "a?"}, {"prompt": "question"}),
        ({"instruction": "a?", "input": ""}, {"prompt": "instruction"}),
        ({"system_prompt": "Be kind.", "query": "a?"}, {"system": "system_prompt", "prompt": "query"}),
        ({"prompt": "a?", "chosen_score": 3.0}, {"score_chosen": "chosen_score"}),
    ],
)
def test_usual_names_are_recognised_and_told(tmp_path: Path, columns: dict[str, Any], taken: dict[str, str]) -> None:
    row = columns | {"chosen": "yes", "rejected": "no"}
    found = _read(write_rows(tmp_path / "a.jsonl", [row]))[0]
    assert {ours: found.fields[ours] for ours in taken} == {ours: row[theirs] for ours, theirs in taken.items()}
    assert set(found.notices) == {("recognised_column", f"{t!r} is taken for {o}") for o, t in taken.items()}


def test_several_columns_that_could_be_the_prompt_are_asked_about(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Regen", "chosen": "rain", "rejected": "snow"}
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(
        UnreadableData, match=r"several columns could be the prompt: instruction, input\. Choose one with `columns:"
    ):
        _read(path)
    assert _read(path, prompt="instruction")[0].notices == (("unused_column", "The column 'input'"),)


def test_columns_that_look_meaningful_and_are_not_used_are_counted(tmp_path: Path, bare: ModelConfig) -> None:
    rows = [plain(f"River {i}?", "Rhine", "Hill", id=i, source="web") for i in range(20)]
    rows[2] |= {"history": ["Hello"], "score": 3.5}
    rows[6] |= {"history": ["Hello again"], "question": "River 6?", "messages": "Rhine"}
    found = _prepare(tmp_path, bare, rows)
    assert sorted(_told(found, "unused_column")) == [("The column 'history'", 2), ("The column 'score'", 1)]
    assert any(
        "have content in a column that is not used" in line and ": 3, 7)" in line
        for line in found.report.summary_lines()
    )


def test_longer_names_that_tell_the_same_are_counted_too(tmp_path: Path) -> None:
    row = plain("A river?", "Rhine", "Hill", system_instruction="Be brief.", Available_Tools=["map"], ecosystem="Alps")
    found = _read(write_rows(tmp_path / "a.jsonl", [row]))[0]
    assert found.notices == tuple(
        ("unused_column", f"The column {name!r}") for name in ("system_instruction", "Available_Tools")
    )


def test_conversations_before_two_answers_are_the_prompt_as_in_llama_factory(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "A river?"}]
    answers = {side: {"from": "gpt", "value": text} for side, text in (("chosen", "Rhine"), ("rejected", "Hill"))}
    found = _read(write_rows(tmp_path / "a.jsonl", [{"conversations": turns, **answers}]))[0]
    assert found.fields == {"prompt": turns, **answers}
    assert found.notices == (("recognised_column", "'conversations' is taken for prompt"),)


def test_dialogues_need_no_prompt_column_and_take_none_by_its_name(tmp_path: Path, chatml: ModelConfig) -> None:
    ask = chat_message("user", "A river?")
    rows = [{"question": f"Survey {i}", "chosen": [ask, chat_message("assistant", f"Rhine {i}")],
             "rejected": [ask, chat_message("assistant", "Hill")]} for i in range(9)]  # fmt: skip
    rows.append({"question": "A river?", "chosen": [chat_message("user", "One?"), chat_message("assistant", "a")],
                 "rejected": [chat_message("user", "One?"), chat_message("assistant", "b")]})  # fmt: skip
    found = _prepare(tmp_path, chatml, rows)
    assert _prompt(found, 2) == "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\n"
    assert _told(found, "unused_column") == [("The column 'question'", 10)]


def test_scores_that_contradict_the_order_are_told(tmp_path: Path, bare: ModelConfig) -> None:
    rows = [plain(f"River {i}?", "Rhine", "Hill", score_chosen=5.0, score_rejected=3) for i in range(20)]
    rows[3]["score_rejected"], rows[8]["score_rejected"], rows[9]["score_chosen"] = 7, 5, None
    found = _prepare(tmp_path, bare, rows)
    assert _told(found, "score_contradicts") == [("5 for chosen, 7 for rejected", 1)]
    assert _told(found, "score_tie") == [("", 1)]
    assert not _told(found, "unused_column")


# --- other kinds of data ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "response": "b", "label": True}, "as for KTO.*columns: {completion: response}"),
        ({"prompt": "a", "answers": [{"answer": "b", "rank": 1.0}], "turns": 1}, "as Nectar does.*best rank"),
        ({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1}, "PKU.*better_response_id"),
        ({"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1}, "SHP.*prompt: history"),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": -2}, "HelpSteer2.*strength"),
        ({"context": [], "response1": "b", "response2": "c", "overall_preference": 1}, "HelpSteer3.*overall_"),
        ({"instruction": "a", "completions": [{"response": "b", "overall_score": 3}]}, "several scored completions"),
        ({"prompt": "a", "completion": "b"}, "one completion, as for SFT"),
        ({"messages": [chat_message("user", "a"), chat_message("assistant", "b")]}, "without a second answer"),
    ],
)  # fmt: skip
def test_data_that_are_no_pairs_are_answered_in_a_sentence_that_is_right(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(UnreadableData, match=says):
        _read(write_rows(tmp_path / "a.jsonl", [row]))


def test_rows_with_images_are_refused_for_what_they_are(tmp_path: Path, chatml: ModelConfig) -> None:
    rows = [chat(f"ask {i}", "b", "c", images=[{"bytes": None, "path": "a.png"}] if i == 3 else []) for i in range(9)]
    rows[5]["prompt"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    with pytest.raises(BadData, match=r"2 rows contain images, audio or video, and only text is trained on .*: 4, 6\)"):
        _prepare(tmp_path, chatml, rows)


def test_a_parquet_file_with_a_null_prompt_keeps_its_dialogues(tmp_path: Path) -> None:
    rows = [{"prompt": None, "chosen": [chat_message("user", "a"), chat_message("assistant", "b")],
             "rejected": [chat_message("user", "a"), chat_message("assistant", "c")]}] * 2  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.fields for row in _read(str(tmp_path / "a.parquet"))] == rows
