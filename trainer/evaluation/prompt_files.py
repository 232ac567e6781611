"""Read prompt files such as AlpacaEval's instructions: rows with a `prompt` and optionally an `answer`."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.trial import DataConfig, Source
from trainer.data.chat_messages import InvalidRow
from trainer.data.data_findings import UnreadableData
from trainer.data.formats import Preference, to_preference
from trainer.data.row_selection import select_rows
from trainer.data.sources import RawRow, read_source, source_name

_MAX_SHOWN = 5
_PLACEHOLDER_RESPONSES = {"chosen": "yes", "rejected": "no"}
"""Responses for rows that have none: rendering the end of a prompt needs a response after it."""


def load_judge_prompts(source: Source, data: DataConfig) -> list[Preference]:
    """Return every row's prompt, with placeholder responses. If the held-out rows of `data` are dialogues, a text
    prompt becomes a user message, else it stays text. Loads neither tokenizer nor model.

    Raises UnreadableData if the source cannot be opened, has no rows, or has rows without a usable prompt.
    """
    rows = read_prompt_rows(source)
    first = next(iter(select_rows(data).eval), None)
    as_dialogue = first is not None and not isinstance(first.preference.prompt, str)
    return parse_prompts(source, rows, as_dialogue=as_dialogue)


def read_prompt_rows(source: Source) -> list[RawRow]:
    """Return the rows of a source of prompts. Raises UnreadableData if it cannot be opened or has none."""
    rows = read_source(source, required=("prompt",))
    if not rows:
        raise UnreadableData(f"{source_name(source)} has no rows; give a file with prompts")
    return rows


def parse_prompts(source: Source, rows: Sequence[RawRow], *, as_dialogue: bool) -> list[Preference]:
    """Return the prompts of these rows. Raises UnreadableData for rows without a usable prompt."""
    found = [_parse_prompt(row, as_dialogue) for row in rows]
    wrong = [f"row {row.number}: {reason}" for row, reason in zip(rows, found, strict=True) if isinstance(reason, str)]
    if wrong:
        more = f" and {len(wrong) - _MAX_SHOWN} more" if len(wrong) > _MAX_SHOWN else ""
        shown = "; ".join(wrong[:_MAX_SHOWN]) + more
        raise UnreadableData(f"{source_name(source)} has {len(wrong)} rows without a usable prompt: {shown}")
    return [each for each in found if not isinstance(each, str)]


def _parse_prompt(row: RawRow, as_dialogue: bool) -> Preference | str:
    """Return the prompt of one row, or why it cannot be used."""
    if row.fields is None:
        return row.error
    prompt = row.fields.get("prompt")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return "no prompt"
    if not isinstance(prompt, str) and not as_dialogue:
        return "messages, but the sweep's rows are plain text"
    found = to_preference(row.fields | _PLACEHOLDER_RESPONSES, apply_template=as_dialogue)
    if isinstance(found, InvalidRow):
        return f"{found.kind}: {found.detail}" if found.detail else found.kind
    unrenderable = next((detail for kind, detail in found.notices if kind == "needs_template"), None)
    return found if unrenderable is None else f"{unrenderable} with plain text, which only a chat template can render"
