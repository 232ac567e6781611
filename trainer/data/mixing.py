"""Choose rows: weighted mixtures of sources, the train/eval split by prompt, row limits.

Every choice is a deterministic function of the rows; file order is preserved within a source.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from typing import TypeVar

from trainer.data.chat_messages import ChatMessage, Dialogue, content_text
from trainer.data.sources import RawRow

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row chosen by the mixture. `source` is the position of its source in the split's list."""

    source: int
    row: RawRow


def sample_indices(size: int, count: int, salt: int) -> list[int]:
    """Return `count` of the indices 0..size-1, ascending, chosen by a hash: deterministic, without pattern."""
    if count >= size:
        return list(range(size))
    ranked = sorted(range(size), key=lambda i: sha256(f"{salt}/{i}".encode()).digest())
    return sorted(ranked[:count])


def rows_per_source(counts: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Return the number of rows to take from each source. Without weights: all. With weights w, source i gives
    floor(N * w_i / sum(w)) rows, where N is the largest number for which no source has to repeat a row.
    """
    fractions = [Fraction(w).limit_denominator(10**9) for w in weights if w is not None]
    if len(fractions) != len(weights):
        return list(counts)
    total = sum(fractions)
    largest = min(Fraction(n) * total / w for n, w in zip(counts, fractions, strict=True))
    return [int(largest * w / total) for w in fractions]


def mix_sources(sources: Sequence[Sequence[RawRow]], weights: Sequence[float | None]) -> list[SampledRow]:
    """Return rows of several sources, evenly interleaved: every part has them roughly in proportion."""
    counts = rows_per_source([len(rows) for rows in sources], weights)
    positioned = [
        ((position + 0.5) / count, source, rows[index])
        for source, (rows, count) in enumerate(zip(sources, counts, strict=True))
        for position, index in enumerate(sample_indices(len(rows), count, source))
    ]
    positioned.sort(key=lambda item: (item[0], item[1]))
    return [SampledRow(source, raw) for _, source, raw in positioned]


def limit_rows(rows: Sequence[T], limit: int | None) -> list[T]:
    """Return at most `limit` rows, spread over all of them."""
    if limit is None:
        return list(rows)
    return [rows[i] for i in sample_indices(len(rows), limit, len(rows))]


def prompt_key(prompt: str | Dialogue) -> str:
    """Return a key that is equal for equal prompts: their text with white space normalized. In text dialogues the part
    after the last "Assistant:" is ignored, because it is a common prefix of the two answers.
    """
    if isinstance(prompt, str):
        head, marker, _ = prompt.rpartition("\n\nAssistant:")
        return " ".join((head + marker or prompt).split())
    return json.dumps([_message_key(message) for message in prompt], sort_keys=True)


def _message_key(message: ChatMessage) -> list[object]:
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [message["role"], " ".join(content_text(message).split()), *([more] if more else [])]


def held_out_prompts(keys: Sequence[str], fraction: float) -> set[str]:
    """Return the prompts to evaluate on: of all distinct ones the fraction with the lowest hash, at least one, never
    all.

    The choice depends on each prompt's text only: rows of one prompt stay in one split, and adding rows moves few
    others.
    """
    distinct = sorted(set(keys), key=lambda key: sha256(key.encode("utf-8", "surrogatepass")).digest())
    if len(distinct) < 2:
        return set()
    keep = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    return set(distinct[:keep])
