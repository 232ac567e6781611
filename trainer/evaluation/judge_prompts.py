"""Fixed prompts on which a judge compares completions: as tokens for the model, as text and messages for the judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.trial import DataConfig, ModelConfig, Source
from trainer.data import load_tokenizer, prepare
from trainer.data.chat_messages import ChatMessage, Dialogue, Tools, content_text
from trainer.data.data_findings import UnreadableData
from trainer.data.formats import Preference
from trainer.data.pair_dataset import select_prompts
from trainer.data.row_selection import select_rows
from trainer.data.sources import source_name
from trainer.data.tokenization import PairTokenizer
from trainer.evaluation.prompt_files import load_judge_prompts
from trainer.storage.atomic_files import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FoundPrompt = tuple[Preference, tuple[int, ...], str | None]
"""A row's preference, the tokens of its prompt, and the expected answer if there is one."""

_TWICE = "rendered_twice"
_ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A prompt. `key` is the same for every model; `messages` is None for plain text; `expected` is the expected
    answer, if the row has one.
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
) -> tuple[list[JudgePrompt], PreTrainedTokenizerBase]:
    """Return the first `count` distinct prompts (fewer if there are fewer) and the tokenizer of their tokens.

    They are held-out prompts, or those of `source`, rendered and truncated like held-out ones. Raises UnreadableData if
    the source has rows without a prompt.
    """
    tokenizer = load_tokenizer(model, data, cache, trust_remote_code=trust_remote_code)
    found = (
        _held_out_prompts(data, model, cache, count, tokenizer)
        if source is None
        else _prompts_from_source(source, data, tokenizer)
    )
    out: dict[str, JudgePrompt] = {}
    for row, ids, expected in found:
        if len(out) == count:
            break
        prompt, tools = row.prompt, row.tools
        key = digest_of([prompt, tools] if tools else prompt)[:32]
        messages = None if isinstance(prompt, str) else prompt
        out.setdefault(key, JudgePrompt(key, prompt_text(prompt, tools), messages, ids, expected))
    return list(out.values()), tokenizer


def _held_out_prompts(
    data: DataConfig, model: ModelConfig, cache: Path, count: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[_FoundPrompt]:
    pairs = prepare(data, model, cache, tokenizer).eval
    preferences = {(row.sampled.source, row.sampled.row.number): row.preference for row in select_rows(data).eval}
    for index in select_prompts(pairs, count):
        row = preferences[int(pairs.sources[index]), int(pairs.rows[index])]
        yield row, tuple(int(token) for token in pairs.pair(index).prompt), pairs.answers[index]


def _prompts_from_source(
    source: Source, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[_FoundPrompt]:
    rows = load_judge_prompts(source, data)
    tokens = PairTokenizer(tokenizer, data)(rows)
    refused = [f"prompt {i}: {each.notices[-1][1]}" for i, each in enumerate(tokens, start=1) if not each.prompt]
    if refused:
        raise UnreadableData(f"{source_name(source)}: the chat template refuses {len(refused)} prompts, {refused[0]}")
    twice = [(i, detail) for i, each in enumerate(tokens, 1) for kind, detail in each.notices if kind == _TWICE]
    if twice:
        raise UnreadableData(
            f"{source_name(source)}: a chat template has rendered {len(twice)} prompts already, and they would be "
            f"rendered again (prompt {twice[0][0]}: {twice[0][1]}): give the questions as they were asked"
        )
    for row, each in zip(rows, tokens, strict=True):
        yield row, tuple(each.prompt), row.answer


def prompt_text(prompt: str | Dialogue, tools: Tools | None = None) -> str:
    """Return the prompt as text: a single user message is its content; in longer dialogues each message follows its
    role. Tools, tool calls and other keys of a message are added in brackets, as JSON.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user" and not tools:
        return content_text(prompt[0])
    listed = [_in_brackets("tools", tools)] if tools else []
    return "\n\n".join([*listed, *(f"{_ROLE_NAMES.get(m['role'], m['role'])}: {_message_text(m)}" for m in prompt)])


def _message_text(message: ChatMessage) -> str:
    more = [_in_brackets(key, value) for key, value in message.items() if key not in ("role", "content")]
    return " ".join([*([text] if (text := content_text(message)) else []), *more])


def _in_brackets(name: str, value: object) -> str:
    return f"[{name}: {json.dumps(value, ensure_ascii=False)}]"
