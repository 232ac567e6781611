"""Random dialogues through real chat templates: nothing is lost, the answers alone are scored, as TRL's own trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.data_cases import CHATML, LLAMA, MISTRAL, chat_message, encode, tokenizer, trl_template
from trainer.config.trial import DataConfig
from trainer.data.chat_messages import content_text
from trainer.data.formats import Preference, to_preference
from trainer.data.tokenization import PairTokenizer

TURNS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>")
SYSTEM, TOOLS, REASONING = "system", "tools", "reasoning"
STYLES: dict[str, tuple[Any, frozenset[str]]] = {
    "chatml": (tokenizer(CHATML), frozenset({SYSTEM})),
    "llama": (tokenizer(LLAMA, adds_bos=True), frozenset({SYSTEM})),
    "llama3": (tokenizer(trl_template("llama3"), eos="<|eot_id|>", more=TURNS), frozenset({SYSTEM})),
    "mistral": (tokenizer(MISTRAL, eos="</s>"), frozenset()),
    "gemma": (tokenizer(trl_template("gemma"), eos="<end_of_turn>", more=TURNS), frozenset()),
    "qwen2.5": (tokenizer(trl_template("qwen2_5")), frozenset({SYSTEM, TOOLS})),
    "qwen3": (tokenizer(trl_template("qwen3")), frozenset({SYSTEM, TOOLS, REASONING})),
}
"""Tokenizers of seven families, and what their templates know."""
words = st.text(alphabet="ab .\n<|:é🙂", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "A word", "parameters": {"type": "object", "properties": {}}},
}
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def dialogues(draw: Callable[[Any], Any], knows: frozenset[str]) -> dict[str, Any]:
    """A row with an explicit prompt, of every shape that the template knows."""

    def answer(text: str) -> dict[str, Any]:
        thought = {"reasoning_content": draw(words)} if REASONING in knows and draw(st.booleans()) else {}
        return chat_message("assistant", text) | thought

    prompt: list[dict[str, Any]] = (
        [chat_message("system", draw(words))] if SYSTEM in knows and draw(st.booleans()) else []
    )
    uses_tools = TOOLS in knows and draw(st.booleans())
    for _ in range(draw(st.integers(0, 2))):
        prompt += [chat_message("user", draw(words)), answer(draw(words))]
    prompt.append(chat_message("user", draw(words)))
    if uses_tools and draw(st.booleans()):
        call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": draw(words)}}}
        prompt.append(
            draw(st.sampled_from([{"role": "assistant"}, chat_message("assistant", draw(words))]))
            | {"tool_calls": [call]}
        )
        prompt.append(chat_message("tool", draw(words)) | {"name": "look_up"})
    first, second = draw(st.lists(words, min_size=2, max_size=2, unique_by=str.strip))
    chosen, rejected = [answer(first)], [answer(second)]
    if draw(st.integers(0, 3)) == 0:
        chosen += [chat_message("user", draw(words)), answer(draw(words))]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | ({"tools": [TOOL]} if uses_tools else {})


def _rendered(made: Any, row: Mapping[str, Any], side: str | None) -> str:
    progress = row["prompt"] + (row[side] if side else [])
    return made.apply_chat_template(
        progress, tools=row.get("tools"), tokenize=False, add_generation_prompt=side is None
    )


@pytest.mark.parametrize("style", STYLES)
@QUICK
@given(pick=st.data())
def test_prompt_and_answer_are_the_whole_rendering_and_the_answer_alone_is_scored(style: str, pick: Any) -> None:
    made, knows = STYLES[style]
    row = pick.draw(dialogues(knows))
    found = encode(made, row)
    kinds = {kind for kind, _ in found.notices}
    assert not kinds & {"template_refuses", "missing_eos", "duplicate_bos", "empty_prompt"}
    alone = _rendered(made, row, None)
    for ids, side in ((found.chosen, "chosen"), (found.rejected, "rejected")):
        full = _rendered(made, row, side)
        assert made.decode(found.prompt + ids) == full
        if "prompt_changes" in kinds:
            assert not all(_rendered(made, row, other).startswith(alone) for other in ("chosen", "rejected"))
        else:
            assert made.decode(found.prompt) == alone
            assert made.decode(ids) == full.removeprefix(alone)
        scored, at = made.decode(ids), 0
        for message in row[side]:  # every word of the answer is there, in its order
            assert (at := scored.find(content_text(message).strip(), at)) >= 0
        assert scored.endswith(("<|im_end|>\n", "<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>\n"))


@pytest.mark.parametrize("style", STYLES)
@QUICK
@given(pick=st.data())
def test_no_message_tool_or_thought_is_lost_without_a_notice(style: str, pick: Any) -> None:
    made, knows = STYLES[style]
    row = pick.draw(dialogues(frozenset({*knows, TOOLS, REASONING} if SYSTEM in knows else knows)))
    found = encode(made, row)
    if any(kind in {"template_refuses", "equal_rendered"} for kind, _ in found.notices):
        return
    logged = " ".join(f"{kind} {detail}" for kind, detail in found.notices)
    text, progress = made.decode(found.prompt + found.chosen), row["prompt"] + row["chosen"]
    for key in ("reasoning_content", "tool_calls"):
        for value in (message[key] for message in progress if key in message):
            inner = value.strip() if isinstance(value, str) else "look_up"
            assert inner in text or f"ignored_key The key '{key}'" in logged
    if "tools" in row:
        assert "A word" in text or "ignored_key The tools of a row" in logged
    if any(content_text(message).strip() not in text for message in progress):
        assert "content_altered" in logged


class Rows(list[dict[str, Any]]):
    """What DPOTrainer needs of a data set, without files: its own functions see the very same rows."""

    def map(self, function: Callable[..., dict[str, Any]], fn_kwargs: Any = None, **_: Any) -> Rows:
        return Rows(row | function(dict(row), **(fn_kwargs or {})) for row in self)

    def filter(self, function: Callable[[dict[str, Any]], bool], **_: Any) -> Rows:
        return Rows(row for row in self if function(row))


def _by_trl(made: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    from trl import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer: Any = SimpleNamespace(_tokenizer=made)
    return DPOTrainer._prepare_dataset(trainer, Rows([dict(row)]), made, args, "train")[0]  # pyright: ignore


@pytest.mark.parametrize("style", STYLES)
@QUICK
@given(pick=st.data())
def test_ids_are_those_of_trls_dpo_trainer(style: str, pick: Any) -> None:
    made, knows = STYLES[style]
    row = pick.draw(dialogues(knows))
    theirs, ours = _by_trl(made, row), encode(made, row)
    assert (ours.prompt, ours.chosen, ours.rejected) == (
        theirs["prompt_ids"],
        theirs["chosen_ids"],
        theirs["rejected_ids"],
    )
    # the same pair without a prompt of its own, and with one that the dialogues repeat
    full = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} | {
        key: row[key] for key in ("tools",) if key in row
    }
    if row["chosen"][0] != row["rejected"][0]:
        implied = encode(made, full)
        assert (implied.prompt, implied.chosen, implied.rejected) == (ours.prompt, ours.chosen, ours.rejected)
        repeated = encode(made, full | {"prompt": row["prompt"]})
        assert (repeated.prompt, repeated.chosen, repeated.rejected) == (ours.prompt, ours.chosen, ours.rejected)
        assert ("prompt_repeated", "") in repeated.notices


plain_words = st.text(alphabet="ab c.\n", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@QUICK
@given(plain_words, plain_words, plain_words)
def test_plain_text_is_joined_as_it_stands_as_in_trl(prompt: str, chosen: str, rejected: str) -> None:
    if chosen == rejected:
        return
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    made = tokenizer(None, eos="</s>", adds_bos=True)
    ours, theirs = encode(made, row), _by_trl(made, row)
    if ("prompt_repeated", "") not in ours.notices:
        assert (ours.prompt, ours.chosen, ours.rejected) == (
            theirs["prompt_ids"],
            theirs["chosen_ids"],
            theirs["rejected_ids"],
        )


@QUICK
@given(st.lists(plain_words, min_size=1, max_size=3), plain_words, plain_words)
def test_hh_text_is_parted_at_its_last_common_answer(asked: list[str], chosen: str, rejected: str) -> None:
    if chosen == rejected:
        return
    progress = "\n\nAssistant: so\n\nHuman: ".join(asked)
    prompt = f"\n\nHuman: {progress}\n\nAssistant:"
    found = to_preference({"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"})
    assert (found.prompt, found.chosen, found.rejected) == (prompt, f" {chosen}", f" {rejected}")


@QUICK
@given(plain_words, plain_words)
def test_implied_prompts_lose_no_character_and_cut_no_word(chosen: str, rejected: str) -> None:
    found = to_preference({"chosen": chosen, "rejected": rejected})
    if isinstance(found, Preference):
        assert isinstance(found.prompt, str)
        assert (found.prompt + str(found.chosen), found.prompt + str(found.rejected)) == (chosen, rejected)
        assert not (found.prompt[-1].isalnum() and (str(found.chosen)[0].isalnum() or str(found.rejected)[0].isalnum()))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["", " ", "a", "user", "text", "[]", "\ud800", "\udc80"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "name", "function", "tool_calls", "x"]), inner
        )
    ),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt"])
loose = st.lists(
    st.builds(
        lambda role, more: {"role": role, "content": "a"} | (more if isinstance(more, dict) else {}), roles, json_values
    ),
    max_size=3,
)
"""Lists of what may be messages."""
cells = json_values | loose | st.text("ab \n", max_size=6)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries(
        {"chosen": cells, "rejected": cells},
        optional=dict.fromkeys(("prompt", "system", "tools", "chat_template_kwargs", "images", "score_chosen"), cells),
    ),
    st.sampled_from(["all", "last"]),
    st.sampled_from([None, True, False]),
)
def test_whatever_a_row_holds_it_is_a_pair_or_named_for_what_is_wrong(row: Any, score: Any, applied: Any) -> None:
    before = repr(row)
    found = to_preference(row, score=score, apply_template=applied)
    assert repr(row) == before, "the row was changed"
    if isinstance(found, Preference):
        made = STYLES["qwen3"][0]
        rules = {"train": "unused", "score": score, "apply_template": applied}
        tokens = PairTokenizer(made, DataConfig.model_validate(rules))([found])[0]
        assert tokens.notices or (tokens.prompt and tokens.chosen and tokens.rejected)
