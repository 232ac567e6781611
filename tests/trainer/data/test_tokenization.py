"""Token ids: the template's own rendering, TRL's ids, cutting, and what is noticed on the way."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.data_cases import CHATML, LLAMA, chat, chat_message, data, encode, plain, preference, tokenizer
from trainer.data.tokenization import EncodedPair, PairTokenizer


def _tokens(made: Any, row: dict[str, Any], max_length: int = 10_000, budget: int | None = None) -> EncodedPair:
    return encode(made, row, apply_template=False, max_length=max_length, max_prompt_length=budget)


TALK = [
    chat_message("system", "Be brief."),
    chat_message("user", "hi"),
    chat_message("assistant", "hello"),
    chat_message("user", "2+2?"),
]
ROWS = [
    chat("2+2?", "4", "5"),
    {
        "prompt": TALK,
        "chosen": [chat_message("assistant", "4")],
        "rejected": [chat_message("assistant", "not 4 but 5 — ünïcode 🙂")],
    },
    {"chosen": [*TALK, chat_message("assistant", "4")], "rejected": [*TALK, chat_message("assistant", "5")]},
    chat("a", "\nstarts with a line break", " starts with a blank"),
]
PLAIN = [
    plain("The sky is", " blue.", " green."),
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    plain("Q: 2+2?\nA:", "4</s>", "5"),
]
MERGES = ("b l", "bl u", "Ċ s", "Ġ s")


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize("row", ROWS)
def test_prompt_and_response_are_the_templates_own_rendering(template: str, row: dict[str, Any]) -> None:
    made, pair = tokenizer(template), preference(row)
    found = _tokens(made, row)
    for ids, response in ((found.chosen, pair.chosen), (found.rejected, pair.rejected)):
        untruncated = made.apply_chat_template([*pair.prompt, *response], tokenize=True, return_dict=False)
        assert found.prompt + ids == untruncated
        assert made.eos_token_id in ids
    assert found.prompt == made.apply_chat_template(
        pair.prompt, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert found.notices == []


@pytest.mark.parametrize(
    ("made", "rows"),
    [
        (tokenizer(CHATML, merges=MERGES), ROWS),
        (tokenizer(LLAMA, adds_bos=True, merges=MERGES), ROWS),
        (tokenizer(None, eos="</s>", merges=MERGES), PLAIN),
        (tokenizer(None, eos="</s>", adds_bos=True, merges=MERGES), PLAIN),
    ],
    ids=["chatml", "llama", "plain", "plain with BOS"],
)
def test_ids_are_those_of_trls_dpo_trainer(made: Any, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset
    from trl import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    for row in rows:
        theirs = DPOTrainer._prepare_dataset(
            SimpleNamespace(_tokenizer=made), Dataset.from_list([row]), made, args, "train"
        )[0]
        ours = _tokens(made, row)
        assert (ours.prompt, ours.chosen) == (theirs["prompt_ids"], theirs["chosen_ids"])
        assert ours.rejected == theirs["rejected_ids"]


def test_bos_is_there_once() -> None:
    for made in (tokenizer(LLAMA, adds_bos=True), tokenizer(None, adds_bos=True)):
        found = _tokens(made, ROWS[0] if made.chat_template else PLAIN[0])
        assert (found.prompt.count(made.bos_token_id), found.prompt[0]) == (1, made.bos_token_id)
        assert made.bos_token_id not in found.chosen + found.rejected


SURPRISE = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
ENDLESS = CHATML.replace("'<|im_end|>\n'", "('\n' if m['role'] == 'assistant' else '<|im_end|>\n')")
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("made", "row", "kind"),
    [
        (tokenizer("{{ bos_token }}" + LLAMA), ROWS[0], "duplicate_bos"),
        (tokenizer(None, eos="</s>", adds_bos=True), plain("<s>a", "b", "c"), "duplicate_bos"),
        (tokenizer(SURPRISE), ROWS[0], "prompt_not_prefix"),
        (tokenizer(ENDLESS), ROWS[0], "missing_eos"),
        (tokenizer(STRICT), ROWS[1], "template_refuses"),
        (tokenizer(CHATML, eos="</s>"), ROWS[0], "other_end"),
        (tokenizer(CHATML, merges=("Ċ Ċ",)), chat("a", "\nb", "\nc"), "boundary_merged"),
        (tokenizer(CHATML), chat("say <|im_end|> now", "b", "c"), "special_in_text"),
    ],
)
def test_faults_are_noticed(made: Any, row: dict[str, Any], kind: str) -> None:
    kinds = [k for k, _ in _tokens(made, row).notices]
    assert kind in kinds
    assert set(kinds) <= {kind, "special_in_text"}


def test_the_first_case_is_told_in_words() -> None:
    assert ("prompt_not_prefix", "The prompt alone continues with '<think>'") in _tokens(
        tokenizer(SURPRISE), ROWS[0]
    ).notices
    assert ("template_refuses", "no system role") in _tokens(tokenizer(STRICT), ROWS[1]).notices


def test_ends_are_counted_for_generation_to_stop_at() -> None:
    made = tokenizer(CHATML, eos="</s>")
    tokenise = PairTokenizer(made, data("unused", apply_template=False, max_length=100))
    tokenise([preference(ROWS[0])])
    assert dict(tokenise.end_token_ids) == {made.convert_tokens_to_ids("<|im_end|>"): 2}


def test_a_long_prompt_loses_its_oldest_tokens_and_keeps_bos() -> None:
    made = tokenizer(LLAMA)
    untruncated = _tokens(made, chat("0123456789" * 5, "yes", "no"))
    cut = _tokens(made, chat("0123456789" * 5, "yes", "no"), max_length=100, budget=20)
    assert cut.prompt == untruncated.prompt[:1] + untruncated.prompt[-19:]
    assert (cut.chosen, cut.rejected) == (untruncated.chosen, untruncated.rejected)
    assert cut.notices == [("prompt_cut", "")]


def test_a_long_response_is_cut_to_what_remains() -> None:
    made = tokenizer(LLAMA)
    untruncated = _tokens(made, chat("a", "y" * 50, "no"))
    cut = _tokens(made, chat("a", "y" * 50, "no"), max_length=len(untruncated.prompt) + 10, budget=30)
    assert (cut.chosen, cut.rejected) == (untruncated.chosen[:10], untruncated.rejected)
    assert cut.notices == [("response_cut", "")]


def test_responses_that_only_differ_beyond_the_cut_are_told() -> None:
    found = _tokens(tokenizer(LLAMA), chat("a", "y" * 90 + "a", "y" * 90 + "b"), max_length=80)
    assert [kind for kind, _ in found.notices] == ["response_cut", "equal_after_cut"]


def test_without_max_prompt_length_only_rows_that_do_not_fit_are_cut() -> None:
    """A prompt of more than max_length - 256 tokens keeps its head as long as the row fits."""
    made = tokenizer(LLAMA)
    untruncated = _tokens(made, chat("x" * 760, "yes", "no"))
    assert 768 < len(untruncated.prompt) + len(untruncated.chosen) < 1024
    fits = _tokens(made, chat("x" * 780, "yes", "no"), max_length=1024)
    assert fits.notices == []
    assert len(fits.prompt) > 780
    cut = _tokens(made, chat("x" * 780, "yes", "no"), max_length=1024, budget=768)
    assert (len(cut.prompt), cut.notices) == (768, [("prompt_cut", "")])


def test_a_row_that_does_not_fit_loses_of_its_prompt_only_what_is_needed() -> None:
    made, row = tokenizer(LLAMA), chat("x" * 780, "y" * 250, "no")
    untruncated, cut = _tokens(made, row), _tokens(made, row, max_length=1024)
    assert (cut.chosen, cut.rejected) == (untruncated.chosen, untruncated.rejected)
    assert (len(cut.prompt) + len(cut.chosen), cut.notices) == (1024, [("prompt_cut", "")])
    longer = _tokens(made, chat("x" * 900, "y" * 400, "no"), max_length=1024)
    assert (len(longer.prompt), len(longer.chosen)) == (768, 256)
    assert [kind for kind, _ in longer.notices] == ["prompt_cut", "response_cut"]


@pytest.mark.parametrize(
    ("length", "kinds"),
    [
        (600, []),
        (300, ["system_cut"]),
        (200, ["system_cut", "turns_cut"]),
        (70, ["system_cut", "turns_cut", "prompt_cut"]),
    ],
)
def test_what_was_cut_of_a_prompt_is_counted_by_kind(length: int, kinds: list[str]) -> None:
    progress = [
        chat_message("system", "s" * 100),
        chat_message("user", "a" * 60),
        chat_message("assistant", "b" * 60),
        chat_message("user", "c" * 60),
    ]
    row = {
        "prompt": progress,
        "chosen": [chat_message("assistant", "yes")],
        "rejected": [chat_message("assistant", "no")],
    }
    assert [kind for kind, _ in _tokens(tokenizer(CHATML), row, max_length=length).notices] == kinds


def test_tools_that_are_cut_are_counted_with_the_system_message() -> None:
    tool = {"type": "function", "function": {"name": "tide_times", "parameters": {"type": "object"}}}
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    found = _tokens(tokenizer(template), chat("a" * 50, "yes", "no", tools=[tool]), max_length=100)
    assert found.notices == [("system_cut", "")]


text = st.text(alphabet="ab \n<|s>üé🙂", min_size=1, max_size=60).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text, text, text, st.integers(8, 60), st.data())
def test_cut_pairs_fit_and_are_never_empty(ask: str, good: str, bad: str, length: int, pick: Any) -> None:
    if good == bad:
        return
    budget, made = pick.draw(st.integers(1, length - 1)), tokenizer(LLAMA)
    untruncated, cut = _tokens(made, chat(ask, good, bad)), _tokens(made, chat(ask, good, bad), length, budget)
    assert 1 <= len(cut.prompt) <= budget
    for full, part in ((untruncated.chosen, cut.chosen), (untruncated.rejected, cut.rejected)):
        assert part
        assert len(cut.prompt) + len(part) <= length
        assert part == full[: len(part)]
        if len(part) < len(full):
            assert len(cut.prompt) + len(part) == length
    assert np.array_equal(cut.prompt[-1:], untruncated.prompt[-1:])
