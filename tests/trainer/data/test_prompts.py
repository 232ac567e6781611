"""Where the prompt ends and what is scored: explicit and repeated prompts, several turns, plain text, ends of turns."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.data_cases import (
    CHATML,
    chat,
    chat_message,
    data,
    encode,
    plain,
    preference,
    saved,
    tokenizer,
    trl_template,
    write_rows,
)
from trainer.data import BadData, prepare
from trainer.data.formats import InvalidRow, to_preference

SYSTEM, ASK = chat_message("system", "You rhyme."), chat_message("user", "A line about rain?")
ASK_WITH_BLANKS = chat_message("user", "A line  about rain? ")
GOOD, WRONG = chat_message("assistant", "Rain on the pane."), chat_message("assistant", "It is wet.")
MORE, THANKS = chat_message("user", "One more."), chat_message("assistant", "And again.")


def _parts(row: dict[str, Any], **rules: Any) -> tuple[Any, Any, Any]:
    found = preference(row, **rules)
    return found.prompt, found.chosen, found.rejected


def _kinds(row: dict[str, Any], **rules: Any) -> list[str]:
    return [kind for kind, _ in preference(row, **rules).notices]


# --- dialogues: an explicit prompt is never thrown away --------------------------------------------------------------
def test_answers_of_several_messages_are_scored_whole_as_trl_scores_them() -> None:
    row = {"prompt": [SYSTEM, ASK], "chosen": [GOOD, MORE, THANKS], "rejected": [GOOD, MORE, WRONG]}
    assert _parts(row) == ([SYSTEM, ASK], [GOOD, MORE, THANKS], [GOOD, MORE, WRONG])
    assert _kinds(row) == ["several_turns"]
    made = tokenizer(CHATML)
    found = encode(made, row)
    assert made.decode(found.chosen).startswith("Rain on the pane.<|im_end|>\n<|im_start|>user\nOne more.")


def test_the_last_answer_alone_is_scored_where_that_is_asked_for() -> None:
    row = {"prompt": [SYSTEM, ASK], "chosen": [GOOD, MORE, THANKS], "rejected": [GOOD, MORE, WRONG]}
    assert _parts(row, score="last") == ([SYSTEM, ASK, GOOD, MORE], [THANKS], [WRONG])
    made = tokenizer(CHATML)
    found = encode(made, row, score="last")
    assert made.decode(found.chosen) == "And again.<|im_end|>\n"
    assert found.notices == []


def test_last_answers_after_different_turns_are_refused_with_their_reason(tmp_path: Path) -> None:
    apart = {"prompt": [ASK], "chosen": [GOOD, MORE, THANKS], "rejected": [WRONG, MORE, WRONG]}
    assert to_preference(apart, score="last") == InvalidRow("turns_differ")
    path = write_rows(tmp_path / "a.jsonl", [*[chat(f"{i}", "b", "c") for i in range(9)], apart])
    with pytest.raises(BadData, match=r"1 row differs before their last answers.*: 10\).*data\.score: all"):
        prepare(data(path, score="last"), saved(tokenizer(), tmp_path / "t"), tmp_path / "cache")
    assert prepare(data(path), saved(tokenizer(), tmp_path / "t"), tmp_path / "cache").report.bad_rows == 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, WRONG]},
        {"prompt": [SYSTEM, ASK], "chosen": [ASK, GOOD], "rejected": [ASK, WRONG]},
        {"prompt": [SYSTEM, ASK], "chosen": [ASK, GOOD], "rejected": [WRONG]},
        {"prompt": [SYSTEM, ASK_WITH_BLANKS], "chosen": [ASK, GOOD], "rejected": [ASK, WRONG]},
        {"prompt": [ASK], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, WRONG]},
        {"prompt": "A line  about rain?", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, WRONG]},
        {"prompt": "You rhyme.\n\nA line about rain?", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, WRONG]},
    ],
    ids=["whole", "last message", "one side", "other blanks", "after a system message", "text", "text of all messages"],
)
def test_a_prompt_that_the_answers_repeat_is_kept_once_with_a_notice(row: dict[str, Any]) -> None:
    prompt, chosen, rejected = _parts(row)
    assert [m | {"content": " ".join(m["content"].split())} for m in prompt] == [SYSTEM, ASK]
    assert (chosen, rejected) == ([GOOD], [WRONG])
    assert _kinds(row) == ["prompt_repeated"]


def test_a_prompt_of_a_system_message_alone_stays_before_the_dialogues() -> None:
    row = {"prompt": [SYSTEM], "chosen": [ASK, GOOD], "rejected": [ASK, WRONG]}
    assert _parts(row) == ([SYSTEM, ASK], [GOOD], [WRONG])
    assert _kinds(row) == ["context_moved"]
    other = row | {"rejected": [chat_message("user", "Something else?"), WRONG]}
    assert to_preference(other) == InvalidRow("questions_differ")


def test_an_answer_may_say_again_what_was_said_before() -> None:
    said_before = {"prompt": [ASK, GOOD, ASK], "chosen": [GOOD, ASK, GOOD], "rejected": [WRONG]}
    assert _parts(said_before) == ([ASK, GOOD, ASK], [GOOD, ASK, GOOD], [WRONG])


def test_a_text_prompt_before_dialogues_that_begin_with_an_answer_is_what_the_user_asks() -> None:
    row = {"prompt": "A line about rain?", "chosen": [GOOD, MORE, THANKS], "rejected": [WRONG, MORE, THANKS]}
    assert _parts(row) == ([ASK], [GOOD, MORE, THANKS], [WRONG, MORE, THANKS])


def test_a_text_prompt_that_one_answer_repeats_as_a_message_is_kept_once() -> None:
    row = {"prompt": "A line about rain?", "chosen": [ASK, GOOD], "rejected": [WRONG]}
    assert _parts(row) == ([ASK], [GOOD], [WRONG])
    assert _kinds(row) == ["prompt_repeated"]


def test_a_text_prompt_that_its_dialogues_do_not_hold_is_refused() -> None:
    row = {"prompt": "A line about snow?", "chosen": [ASK, GOOD], "rejected": [ASK, WRONG]}
    assert to_preference(row) == InvalidRow("prompt_not_in_dialogue")


def test_two_answers_that_share_their_first_turn_share_it_as_context_as_in_trl() -> None:
    row = {"chosen": [ASK, GOOD, MORE, THANKS], "rejected": [ASK, GOOD, MORE, WRONG]}
    assert _parts(row) == ([ASK, GOOD, MORE], [THANKS], [WRONG])
    assert _kinds(row) == []


def test_a_prompt_that_changes_once_the_answer_follows_is_a_bad_row_and_a_template_that_always_does_is_fatal() -> None:
    """Qwen 3 drops earlier thoughts: an answer of several turns takes them from the prompt."""
    call = {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": [
        {"type": "function", "function": {"name": "rhyme", "arguments": {"word": "rain"}}}
    ]}  # fmt: skip
    row = {"prompt": [ASK, call, chat_message("tool", "pane")], "chosen": [GOOD, MORE, THANKS], "rejected": [WRONG]}
    assert "Look it up." in dict(encode(tokenizer(trl_template("qwen3")), row).notices)["prompt_changes"]
    surprise = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    assert "prompt_not_prefix" in dict(encode(tokenizer(surprise), chat("a", "b", "c")).notices)


# --- plain text ------------------------------------------------------------------------------------------------------
def test_a_text_prompt_that_both_answers_repeat_is_kept_once_with_a_notice() -> None:
    prompt = "Question: What is three plus one?\nAnswer:"
    row = plain(prompt, f"{prompt} Four.", f"{prompt} Three.")
    assert _parts(row) == (prompt, " Four.", " Three.")
    assert _kinds(row) == ["prompt_repeated"]
    assert _parts(plain(prompt + " \n", f"{prompt} Four.", f"{prompt} Three.")) == (prompt, " Four.", " Three.")
    chinese = "法国的首都是哪里？"
    row = plain(chinese, f"{chinese}巴黎。", f"{chinese}罗马。")
    assert _parts(row) == (chinese, "巴黎。", "罗马。")
    assert _kinds(row) == ["prompt_repeated"]


def test_a_text_prompt_that_one_answer_alone_begins_with_stays_there_with_a_notice() -> None:
    prompt = "Question: What is three plus one?\nAnswer:"
    row = plain(prompt, f"{prompt} Four.", " Three.")
    assert _parts(row) == (prompt, f"{prompt} Four.", " Three.")
    assert _kinds(row) == ["prompt_echoed"]


def test_short_words_that_answers_may_begin_with_by_chance_stay() -> None:
    row = plain("Hello", "Hello! How are you?", "Hello.")
    assert _parts(row) == ("Hello", "Hello! How are you?", "Hello.")
    assert _kinds(row) == ["prompt_echoed"]
    longer = plain("What is the cat", "What is the category?", "What is the cattle?")
    assert _parts(longer) == ("What is the cat", "What is the category?", "What is the cattle?")
    assert _kinds(longer) == []


def _hh(*messages: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(messages))


def test_hh_text_is_parted_at_the_last_assistant_that_both_share() -> None:
    row = {"chosen": _hh("Boil an egg?", "Yes, seven minutes."), "rejected": _hh("Boil an egg?", "Yes, no idea.")}
    assert _parts(row) == ("\n\nHuman: Boil an egg?\n\nAssistant:", " Yes, seven minutes.", " Yes, no idea.")
    assert _kinds(row) == []
    longer = {side: _hh("Hi", "Hello", "Egg?", text) for side, text in (("chosen", "Boil it."), ("rejected", "Bo"))}
    assert _parts(longer) == (_hh("Hi", "Hello", "Egg?") + "\n\nAssistant:", " Boil it.", " Bo")
    begins = {"chosen": _hh("Egg?", "Boil it."), "rejected": _hh("Egg?", "Boil")}
    assert _parts(begins) == ("\n\nHuman: Egg?\n\nAssistant:", " Boil it.", " Boil")
    assert to_preference({"chosen": _hh("Egg?", "Boil."), "rejected": "\n\nHuman: Egg?\n\nAssistant:"}) == InvalidRow(
        "empty_response"
    )


def test_hh_text_that_parts_before_the_last_turn_is_told() -> None:
    row = {"chosen": _hh("Egg?", "Boil it.", "Long?", "Seven."), "rejected": _hh("Egg?", "Fry it.", "Long?", "One.")}
    assert _parts(row)[0] == "\n\nHuman: Egg?\n\nAssistant:"
    assert _kinds(row) == ["several_turns"]
    assert to_preference(row, score="last") == InvalidRow("turns_differ")


def test_hh_text_becomes_messages_where_the_template_is_applied() -> None:
    row = {"chosen": _hh("Hi", "Hello", "Egg?", "Boil it."), "rejected": _hh("Hi", "Hello", "Egg?", "Fry it.")}
    progress = [chat_message("user", "Hi"), chat_message("assistant", "Hello"), chat_message("user", "Egg?")]
    expected = (progress, [chat_message("assistant", "Boil it.")], [chat_message("assistant", "Fry it.")])
    assert _parts(row, apply_template=True) == expected
    assert to_preference(row, apply_template=True).notices == (("text_turns", ""),)
    apart = plain(_hh("Hi", "Hello", "Egg?") + "\n\nAssistant:", " Boil it.", " Fry it.")
    assert _parts(apart, apply_template=True) == expected
    assert _parts(plain(_hh("Hi", "Hello", "Egg?"), "Boil it.", "Fry it."), apply_template=True) == expected
    assert _parts(row | {"prompt": _hh("Hi", "Hello", "Egg?")}, apply_template=True) == expected
    assert to_preference(row | {"rejected": _hh("Hi", "Hello", "Egg?", "")}, apply_template=True) == InvalidRow(
        "empty_response"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "kinds"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is", ["implied_prompt"]),
        ("Name a river? Rhine", "Name a river? Ruhr", "Name a river?", ["implied_prompt"]),
        ("Q: 2+2?\nA: It is 4", "Q: 2+2?\nA: It is 5", "Q: 2+2?\nA:", []),
        ("### Instruction:\nAdd.\n\n### Response:\nSo 4", "### Instruction:\nAdd.\n\n### Response:\nSo 5",
         "### Instruction:\nAdd.\n\n### Response:\n", []),
        ("[INST] Add. [/INST] So 4", "[INST] Add. [/INST] So 5", "[INST] Add. [/INST]", []),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nAh 1", "<|im_start|>user\nHi<|im_end|>\n"
         "<|im_start|>assistant\nAh 2", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", []),
        ("天空是蓝色", "天空是绿色", "天空是", ["implied_prompt"]),
    ],
)  # fmt: skip
def test_implied_prompts_end_at_a_mark_or_after_a_whole_word(
    chosen: str, rejected: str, prompt: str, kinds: list[str]
) -> None:
    found = preference({"chosen": chosen, "rejected": rejected})
    assert (found.prompt, found.prompt + str(found.chosen)) == (prompt, chosen)
    assert (found.prompt + str(found.rejected), [kind for kind, _ in found.notices]) == (rejected, kinds)


def test_plain_rows_without_a_sure_prompt_are_named_for_what_they_are(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"chosen": f"The number {i} is even", "rejected": f"The number {i} is odd"} for i in range(20)
    ]
    rows += [
        {"chosen": "Ask me.", "rejected": "Tell me."},
        {"chosen": "It is so", "rejected": "It is"},
        {"chosen": "Is it? Sure. It is A.", "rejected": "Is it? Sure. It is B."},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadData) as caught:
        prepare(data(path), saved(tokenizer(None), tmp_path / "t"), tmp_path / "cache")
    assert {f.kind: [row for _, row in f.rows] for f in caught.value.findings if f.severity == "bad_row"} == {
        "no_prompt": [21],
        "one_begins_other": [22],
        "prompt_undecided": [23],
    }
    assert "1 row has no prompt, and one answer is a prefix of the other" in str(caught.value)


# --- ends ------------------------------------------------------------------------------------------------------------
ASKED = "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("after", ["", "\n", " \n\n"])
@pytest.mark.parametrize(
    "made",
    [tokenizer(CHATML), tokenizer(CHATML, eos="</s>"), tokenizer(None), tokenizer(None, eos="</s>")],
    ids=["eos", "other eos", "eos, no template", "other eos, no template"],
)
def test_text_that_ends_its_turn_gets_no_second_end(made: Any, after: str) -> None:
    found = encode(made, plain(ASKED, f"Rhine<|im_end|>{after}", f"Ruhr<|im_end|>{after}"))
    assert made.decode(found.prompt) == ASKED
    assert made.decode(found.chosen) == f"Rhine<|im_end|>{after}"
    kinds = [kind for kind, _ in found.notices]
    assert kinds == ["already_rendered", *(["other_end"] if made.eos_token == "</s>" else [])]


def test_text_that_ends_with_an_end_of_turn_that_is_no_special_token() -> None:
    """An added token ends the answer; a mark of several tokens does not stop generation, so eos_token follows it."""
    template = CHATML.replace("<|im_end|>", "[END]")
    made = tokenizer(template, eos="</s>")
    made.add_tokens(["[END]"])  # pyright: ignore[reportUnknownMemberType]
    found = encode(made, plain("Say:", " so[END]\n", " no</s>"), apply_template=False)
    assert (made.decode(found.chosen), made.decode(found.rejected)) == (" so[END]\n", " no</s>")
    assert [kind for kind, _ in found.notices] == ["other_end", "special_in_text"]
    made = tokenizer(template, eos="</s>")
    found = encode(made, plain("Say:", " so[END]\n", " no"), apply_template=False)
    assert (made.decode(found.chosen), made.decode(found.rejected)) == (" so[END]\n</s>", " no</s>")
    assert found.notices == []


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "</s> "])
def test_a_message_that_ends_with_the_end_of_turn_gets_no_second_one(end: str) -> None:
    made = tokenizer(CHATML, eos="</s>")
    found = encode(made, chat("A river?", f"Rhine{end}", f"Ruhr{end}"))
    assert made.decode(found.chosen) == "Rhine<|im_end|>\n"
    assert made.decode(found.rejected) == "Ruhr<|im_end|>\n"
    assert "already_ended" in [kind for kind, _ in found.notices]


def test_an_end_within_an_answer_is_left_alone() -> None:
    made = tokenizer(CHATML)
    found = encode(made, chat("A river?", "Rhine<|im_end|> or Ruhr", "Ruhr"))
    assert made.decode(found.chosen) == "Rhine<|im_end|> or Ruhr<|im_end|>\n"
    assert [kind for kind, _ in found.notices] == ["special_in_text"]
