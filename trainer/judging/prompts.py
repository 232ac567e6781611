"""The fixed held-out prompts: as tokens for the model that answers, as text and messages for whoever judges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import DataConfig, ModelConfig
from trainer.data import load_tokenizer, prepare
from trainer.data.format import Dialogue
from trainer.data.select import select
from trainer.evaluation.answers import chosen_prompts
from trainer.storage.durable import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    data: DataConfig, model: ModelConfig, cache: Path, count: int
) -> tuple[list[Prompt], PreTrainedTokenizerBase]:
    """The first `count` distinct held-out prompts, fewer where there are fewer, and the tokenizer of their tokens."""
    tokenizer = load_tokenizer(model, data, cache)
    pairs = prepare(data, model, cache, tokenizer).eval
    asked = {(row.drawn.source, row.drawn.raw.number): row.preference.prompt for row in select(data).eval}
    out: dict[str, Prompt] = {}
    for i in chosen_prompts(pairs, count):
        prompt = asked[int(pairs.sources[i]), int(pairs.rows[i])]
        key = digest_of(prompt)[:32]
        messages = None if isinstance(prompt, str) else prompt
        ids = tuple(int(token) for token in pairs.pair(i).prompt)
        out.setdefault(key, Prompt(key, as_text(prompt), messages, ids, pairs.answers[i]))
    return list(out.values()), tokenizer


def as_text(prompt: str | Dialogue) -> str:
    """The prompt for people: a single user's message is its content; of a longer dialogue it is said who speaks."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{_NAMES.get(m['role'], m['role'])}: {m['content']}" for m in prompt)
