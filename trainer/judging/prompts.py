"""The fixed prompts: as tokens for the model that answers, as text and messages for whoever judges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import DataConfig, ModelConfig, Source
from trainer.data import load_tokenizer, prepare
from trainer.data.check import UnreadableData
from trainer.data.format import Dialogue
from trainer.data.read import source_name
from trainer.data.select import select
from trainer.data.tokenise import Tokeniser
from trainer.evaluation.answers import chosen_prompts
from trainer.judging.given import given_prompts
from trainer.storage.durable import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Found = tuple[str | Dialogue, tuple[int, ...], str | None]
"""A prompt, its tokens, the right answer where that is known."""

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt. `key` is the same in every model; `messages` is None where the data is plain text; `expected` is the
    right answer where the row carries one.
    """

    key: str
    text: str
    messages: Dialogue | None
    ids: tuple[int, ...]
    expected: str | None


def fixed_prompts(
    data: DataConfig,
    model: ModelConfig,
    cache: Path,
    count: int,
    source: Source | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[list[Prompt], PreTrainedTokenizerBase]:
    """The first `count` distinct prompts, fewer where there are fewer, and the tokenizer of their tokens.

    They are held-out ones, or those of `source`, rendered and cut as the held-out ones are. UnreadableData where the
    source holds something else.
    """
    tokenizer = load_tokenizer(model, data, cache, trust_remote_code=trust_remote_code)
    every = _held_out(data, model, cache, count, tokenizer) if source is None else _given(source, data, tokenizer)
    out: dict[str, Prompt] = {}
    for prompt, ids, expected in every:
        if len(out) == count:
            break
        key = digest_of(prompt)[:32]
        messages = None if isinstance(prompt, str) else prompt
        out.setdefault(key, Prompt(key, as_text(prompt), messages, ids, expected))
    return list(out.values()), tokenizer


def _held_out(
    data: DataConfig, model: ModelConfig, cache: Path, count: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[_Found]:
    pairs = prepare(data, model, cache, tokenizer).eval
    asked = {(row.drawn.source, row.drawn.raw.number): row.preference.prompt for row in select(data).eval}
    for i in chosen_prompts(pairs, count):
        prompt = asked[int(pairs.sources[i]), int(pairs.rows[i])]
        yield prompt, tuple(int(token) for token in pairs.pair(i).prompt), pairs.answers[i]


def _given(source: Source, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Found]:
    rows = given_prompts(source, data)
    tokens = Tokeniser(tokenizer, data.max_length, data.prompt_budget)(rows)
    refused = [f"prompt {i}: {each.notices[0][1]}" for i, each in enumerate(tokens, start=1) if not each.prompt]
    if refused:
        raise UnreadableData(f"{source_name(source)}: the chat template refuses {len(refused)} prompts, {refused[0]}")
    for row, each in zip(rows, tokens, strict=True):
        yield row.prompt, tuple(each.prompt), row.answer


def as_text(prompt: str | Dialogue) -> str:
    """The prompt for people: a single user's message is its content; of a longer dialogue it is said who speaks."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{_NAMES.get(m['role'], m['role'])}: {m['content']}" for m in prompt)
