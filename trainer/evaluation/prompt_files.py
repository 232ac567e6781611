"""Prompt files such as AlpacaEval's instructions: rows with a `prompt` and optionally an `answer`."""

from __future__ import annotations

from trainer.config.trial import DataConfig, Source
from trainer.data.chat_messages import InvalidRow
from trainer.data.formats import Preference, to_preference
from trainer.data.row_selection import select_rows
from trainer.data.sources import RawRow, read_source, source_name
from trainer.data.validation import UnreadableData

_MAX_SHOWN = 5
_PLACEHOLDER_RESPONSES = {"chosen": "yes", "rejected": "no"}
"""Stand in for what such rows lack: a prompt ends for the template where a response begins."""


def load_judge_prompts(source: Source, data: DataConfig) -> list[Preference]:
    """Every row's prompt, beside responses that mean nothing. Where the held-out rows of `data` are dialogues, a prompt
    that is text is what a user says; where they are plain text, it stays text. Loads neither tokenizer nor model.

    UnreadableData for a source that cannot be opened, has no rows, or holds what is no prompt, the first few named.
    """
    rows = read_source(source, required=("prompt",))
    name = source_name(source)
    if not rows:
        raise UnreadableData(f"{name} holds no rows: there is nothing to ask")
    first = next(iter(select_rows(data).eval), None)
    inputs = first is not None and not isinstance(first.preference.prompt, str)
    found = [_parse_prompt(row, inputs) for row in rows]
    wrong = [f"row {row.number}: {reason}" for row, reason in zip(rows, found, strict=True) if isinstance(reason, str)]
    if wrong:
        more = f" and {len(wrong) - _MAX_SHOWN} more" if len(wrong) > _MAX_SHOWN else ""
        raise UnreadableData(
            f"{name} holds {len(wrong)} rows that are no prompts: {'; '.join(wrong[:_MAX_SHOWN])}{more}"
        )
    return [each for each in found if not isinstance(each, str)]


def _parse_prompt(row: RawRow, inputs: bool) -> Preference | str:
    """One prompt, or what is wrong with it."""
    if row.fields is None:
        return row.error
    prompt = row.fields.get("prompt")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return "no prompt"
    if not isinstance(prompt, str) and not inputs:
        return "messages, but the sweep's own rows are plain text"
    found = to_preference(row.fields | _PLACEHOLDER_RESPONSES, apply_template=inputs)
    if isinstance(found, InvalidRow):
        return f"{found.kind}: {found.detail}" if found.detail else found.kind
    lost = next((detail for kind, detail in found.notices if kind == "needs_template"), None)
    return found if lost is None else f"{lost} beside plain text, for which it has no place"
