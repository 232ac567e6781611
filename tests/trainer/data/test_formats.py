"""Every format that preference data comes in, and every row that cannot be trained on."""

from copy import deepcopy
from typing import Any

import pytest

from tests.support.data_cases import chat, chat_message, plain
from trainer.data.chat_messages import InvalidRow
from trainer.data.formats import Preference, to_preference

ASK, GOOD, WRONG = chat_message("user", "2+2?"), chat_message("assistant", "4"), chat_message("assistant", "5")
OTHER, WANTED = chat_message("user", "3?"), Preference([ASK], [GOOD], [WRONG], None)


ONE_DIALOGUE: dict[str, dict[str, Any]] = {
    "explicit": chat("2+2?", "4", "5"),
    "implicit": {"chosen": [ASK, GOOD], "rejected": [ASK, WRONG]},
    "ultrafeedback": {"prompt": "2+2?", "chosen": [ASK, GOOD], "rejected": [ASK, WRONG]},
    "both": {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, WRONG]},
    "null prompt": {"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, WRONG]},
    "text prompt": {"prompt": "2+2?", "chosen": [GOOD], "rejected": [WRONG]},
    "text answers": {"prompt": [ASK], "chosen": "4", "rejected": "5"},
    "single messages": {"prompt": [ASK], "chosen": GOOD, "rejected": WRONG},
    "sharegpt": {"prompt": [{"from": "human", "value": "2+2?"}]}
    | {side: {"from": "gpt", "value": value} for side, value in (("chosen", "4"), ("rejected", "5"))},
    "null keys": {"prompt": [ASK], "chosen": [GOOD | {"name": None, "tool_calls": None}], "rejected": [WRONG]}
    | {"score": 3},
}


@pytest.mark.parametrize("row", ONE_DIALOGUE.values(), ids=ONE_DIALOGUE)
def test_conversational_formats_are_one(row: dict[str, Any]) -> None:
    before = deepcopy(row)
    assert to_preference(row) == WANTED
    assert row == before, "the row was changed"


def test_a_longer_dialogue_keeps_all_but_the_last_message_as_prompt() -> None:
    said = ("system", "Be brief."), ("user", "hi"), ("assistant", "hello")
    progress = [*(chat_message(role, text) for role, text in said), ASK]
    found = to_preference({"chosen": [*progress, GOOD], "rejected": [*progress, WRONG]})
    assert found == Preference(progress, [GOOD], [WRONG], None)


def test_plain_text_explicit_and_implicit() -> None:
    wanted = Preference("The sky is", " blue.", " green.", None)
    assert to_preference(plain("The sky is", " blue.", " green.")) == wanted
    assert to_preference({"chosen": "The sky is blue.", "rejected": "The sky is green."}) == wanted


def test_the_checkable_answer_travels_along() -> None:
    assert to_preference(chat("2+2?", "4", "5", answer=4)).answer == "4"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing_field"),
        (plain("a", True, "b"), "not_text"),
        (plain("a", "b", None), "not_text"),
        (plain(7, "b", "c"), "not_text"),
        (plain("a", "b", 1.5), "not_text"),
        (plain(None, "b", "c"), "not_text"),
        (plain("a", ["b"], "c"), "not_text"),
        (plain("a", "[{'role': 'assistant', 'content': 'b'}]", "c"), "not_text"),
        (chat("a", None, "b"), "not_text"),
        (chat("a", False, "b"), "not_text"),
        (chat("a", [{"type": "image"}], "b"), "images"),
        (chat("a", ["b"], "c"), "not_text"),
        (chat("a", 7, "b"), "not_text"),
        (chat("a", "b", "c", images=["x.png"]), "images"),
        ({"prompt": [{"content": "a"}], "chosen": [GOOD], "rejected": [WRONG]}, "not_text"),
        (plain("a", "\ud800", "c"), "lone_surrogate"),
        (plain("a", "\udcff", "c"), "not_utf8"),
        (chat("\udfff", "b", "c"), "lone_surrogate"),
        (plain("", "b", "c"), "empty_prompt"),
        (plain("  \n", "b", "c"), "empty_prompt"),
        (chat(" ", "b", "c"), "empty_prompt"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [WRONG]}, "empty_prompt"),
        ({"chosen": [GOOD], "rejected": [WRONG]}, "no_prompt"),
        ({"chosen": "abc", "rejected": "xyz"}, "no_prompt"),
        ({"chosen": "abcd", "rejected": "abxy"}, "no_prompt"),
        (plain("a", "", "c"), "empty_response"),
        (plain("a", "b", " \t\n"), "empty_response"),
        (chat("a", "", "c"), "empty_response"),
        ({"prompt": [ASK], "chosen": [], "rejected": [WRONG]}, "empty_response"),
        ({"chosen": "The sky is blue", "rejected": "The sky is"}, "one_begins_other"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, WRONG]}, "one_begins_other"),
        ({"chosen": "Why? It is so. Yes", "rejected": "Why? It is so. No"}, "prompt_undecided"),
        (plain("a", "b", "b"), "equal_responses"),
        (chat("a", "b", "b"), "equal_responses"),
        ({"chosen": "same", "rejected": "same"}, "equal_responses"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "equal_responses"),
        ({"chosen": [ASK, GOOD], "rejected": [OTHER, WRONG]}, "questions_differ"),
        (
            {"prompt": [chat_message("system", "s")], "chosen": [ASK, GOOD], "rejected": [OTHER, WRONG]},
            "questions_differ",
        ),
        ({"prompt": "5+5?", "chosen": [ASK, GOOD], "rejected": [ASK, WRONG]}, "prompt_not_in_dialogue"),
        ({"chosen": [ASK, GOOD, ASK], "rejected": [ASK, WRONG]}, "not_one_answer"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [WRONG]}, "not_one_answer"),
        ({"prompt": [ASK, GOOD], "chosen": [GOOD], "rejected": [WRONG]}, "not_one_answer"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], kind: str) -> None:
    assert to_preference(row).kind == kind


# --- rows with one response and a label ------------------------------------------------------------------------------
@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True ", "1"], ids=repr)
def test_a_row_with_one_response_is_a_pair_without_the_other(label: Any) -> None:
    row = {"prompt": [ASK], "completion": [GOOD], "label": label, "answer": 4}
    before = deepcopy(row)
    found = to_preference(row)
    assert found == Preference([ASK], [GOOD], [], "4")
    assert found.is_single
    assert found.with_both() == Preference([ASK], [GOOD], [GOOD], "4")
    assert to_preference(row | {"label": {True: False, "true": "FALSE"}.get(label, "0")}) == Preference(
        [ASK], [], [GOOD], "4"
    )
    assert row == before, "the row was changed"


@pytest.mark.parametrize("form", ["text", "text prompt", "repeated prompt", "text as dialogue", "turns as dialogue"])
def test_the_rules_for_pairs_hold_for_one_response(form: str) -> None:
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "text": ("The sky is", " blue.", {}),
        "text prompt": ("2+2?", [GOOD], {}),
        "repeated prompt": ([ASK], [ASK, GOOD], {}),
        "text as dialogue": ("2+2?", "4", {"apply_template": True}),
        "turns as dialogue": ("\n\nHuman: 2+2?\n\nAssistant:", " 4", {"apply_template": True}),
    }
    prompt, response, options = cases[form]
    other = [*response[:-1], WRONG] if isinstance(response, list) else " 5"
    pair = to_preference({"prompt": prompt, "chosen": response, "rejected": other}, **options)
    found = to_preference({"prompt": prompt, "completion": response, "label": True}, **options)
    assert isinstance(pair, Preference)
    assert isinstance(found, Preference)
    assert (found.prompt, found.chosen, found.notices) == (pair.prompt, pair.chosen, pair.notices)
    assert not found.rejected


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "completion": "b", "label": None}, "bad_label"),
        ({"prompt": "a", "completion": "b", "label": 2}, "bad_label"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "bad_label"),
        ({"prompt": "a", "completion": "b"}, "missing_field"),
        ({"prompt": "a", "completion": " ", "label": False}, "empty_response"),
        ({"prompt": [ASK], "completion": [], "label": False}, "empty_response"),
        ({"prompt": "", "completion": "b", "label": True}, "empty_prompt"),
        ({"prompt": [ASK], "completion": [GOOD, OTHER], "label": True}, "not_one_answer"),
        ({"prompt": [ASK], "completion": 3, "label": True}, "not_text"),
    ],
)  # fmt: skip
def test_a_labelled_row_that_cannot_be_used_has_its_reason(row: dict[str, Any], kind: str) -> None:
    found = to_preference(row)
    assert isinstance(found, InvalidRow)
    assert found.kind == kind
