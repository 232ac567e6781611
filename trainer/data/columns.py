"""Map the columns of a source to the standard fields: by configuration, by name, or by a common alternative name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from trainer.data.data_findings import RowNotice, UnreadableData
from trainer.results import clause

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "answer",
    "system",
    "tools",
    "chat_template_kwargs",
    "score_chosen",
    "score_rejected",
    "images",
    "completion",
    "label",
)
"""Standard fields of a preference row; the last two are those of a row with one response, in the place of chosen and
rejected.
"""
PAIR = ("chosen", "rejected")
SINGLE = ("completion", "label")
"""Fields of TRL's unpaired preference format, beside `prompt`: a response, and whether it is desirable."""

_ALTERNATIVE_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "problem", "input", "conversations"),
    "chosen": ("chosen_response",),
    "rejected": ("rejected_response",),
    "system": ("system_prompt", "system_message"),
    "score_chosen": ("chosen_score", "chosen_rating"),
    "score_rejected": ("rejected_score", "rejected_rating"),
    "images": ("image",),
}
"""Common names of a field in public data sets; used if the field has no column and exactly one of these exists."""

_MEANINGFUL = frozenset(
    (
        *(*FIELDS, *(name for names in _ALTERNATIVE_NAMES.values() for name in names)),
        *("history", "context", "functions", "documents", "messages", "conversations", "completion"),
        *("score", "scores", "rating", "ratings", "margin", "label", "audio", "video", "videos"),
    )
)
"""Columns whose content may be meant as model input or for row filtering; reported if unused."""

_MEANINGFUL_WORDS = frozenset(
    (
        *("system", "tool", "tools", "function", "functions", "context", "history", "document", "documents"),
        *("image", "images", "audio", "video", "videos"),
    )
)
"""Words in longer column names, such as `system_instruction` or `available_tools`, with the same meaning."""

_OTHER_FORMATS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"prompt", "response", "label"}),
        "has one response per row and a label, as for KTO: name the response's column, columns: {completion: response}",
    ),
    (
        frozenset({"human_ref_A", "human_ref_B"}),
        "has two answers and labels, as SHP does: write chosen: human_ref_A and rejected: human_ref_B where labels "
        "is 1, the other way round where it is 0, and prompt: history",
    ),
    (
        frozenset({"response_0", "response_1"}),
        "has two answers and the number of the better one, as PKU-SafeRLHF does: write chosen and rejected by "
        "better_response_id (or safer_response_id)",
    ),
    (
        frozenset({"response1", "response2"}),
        "has two answers and a preference, as HelpSteer3 does: write chosen: response1 and rejected: response2 where "
        "overall_preference is below 0, the other way round where it is above, and prompt: context",
    ),
    (
        frozenset({"response_1", "response_2"}),
        "has two answers and a preference, as HelpSteer2 does: write chosen: response_1 and rejected: response_2 "
        "where preference_strength is below 0, the other way round where it is above",
    ),
    (
        frozenset({"response_a", "response_b"}),
        "has two answers and a winner: write chosen and rejected by the winner, without ties",
    ),
    (
        frozenset({"conversation_a", "conversation_b"}),
        "has two dialogues and a winner: write chosen and rejected by the winner, without ties",
    ),
    (
        frozenset({"prompt", "answers"}),
        "has several ranked answers per row, as Nectar does: write the answer of the best rank as chosen and one of a "
        "lower rank as rejected",
    ),
    (
        frozenset({"completions"}),
        "has several scored completions per row, as UltraFeedback's first form does: write the completion of the "
        "highest score as chosen and another one as rejected",
    ),
    (
        frozenset({"responses"}),
        "has several responses per row: write the best as chosen and another one as rejected",
    ),
    (
        frozenset({"prompt", "completion"}),
        "has prompts with one completion, as for SFT, not pairs: give chosen and rejected for each prompt",
    ),
    (frozenset({"messages"}), "has dialogues without a second answer, as for SFT, not pairs"),
)
"""Columns of other data formats, the most specific first, and how to convert each to preference pairs."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a source holds which standard field.

    `column_of` maps fields to columns; `recognized` are the fields found under a common alternative name; `unused` are
    columns that may be meant as model input and are not read.
    """

    column_of: Mapping[str, str]
    recognized: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the cells of a row by standard field name."""
        return {name: row[column] for name, column in self.column_of.items() if column in row}

    def notices(self, row: Mapping[str, Any]) -> tuple[RowNotice, ...]:
        """Return findings about the columns of a row: recognized ones, and unused ones that are not empty."""
        found: list[RowNotice] = [
            ("recognised_column", f"{self.column_of[field_name]!r} is taken for {field_name}")
            for field_name in self.recognized
            if not _is_blank(row.get(self.column_of[field_name]))
        ]
        current = [name for name in self.unused if not _is_blank(row.get(name))]
        if not current:
            return tuple(found)
        used = [
            row.get(self.column_of[field_name])
            for field_name in ("prompt", *PAIR, *SINGLE)
            if field_name in self.column_of
        ]
        used += [
            message.get("content") for part in used if isinstance(part, list) for message in part if _is_object(message)
        ]
        # a column that repeats a used cell loses nothing
        found.extend(("unused_column", f"The column {name!r}") for name in current if row[name] not in used)
        return tuple(found)


@dataclass(slots=True)
class _ColumnMatches:
    column_of: dict[str, str] = field(default_factory=dict[str, str])
    recognized: list[str] = field(default_factory=list[str])


def find_columns(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str | None],
    name: str,
    needed: Collection[str] | None = None,
) -> Columns:
    """Match the columns of a source with the standard fields.

    Args:
        rows: The rows as read.
        columns: `columns` of the source: field name to column name; null ignores a field.
        name: Name of the source, for messages.
        needed: Fields that must exist; by default chosen and rejected, or prompt, completion and label of a source that
            has completion and label instead.

    Raises:
        UnreadableData: A key of `columns` is not a standard field, a needed or mapped column is missing, several
            columns could be the prompt, or the rows are not preference pairs.
    """
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise UnreadableData(f"columns of {name}: unknown field {', '.join(unknown)}; fields are {', '.join(FIELDS)}")
    present = dict.fromkeys(key for row in rows for key in row)
    if needed is None:
        needed = ("prompt", *SINGLE) if _has_labels(present, columns) else PAIR
    out = _ColumnMatches()
    claimed = {column for column in columns.values() if column is not None}
    other_form = PAIR if "label" in needed else SINGLE
    for field_name in FIELDS:
        if field_name in other_form:
            continue
        if field_name in columns:
            column = columns[field_name]
            if column is None:
                continue
            if present and column not in present:
                raise UnreadableData(_missing_column_message(field_name, column, name, list(present)))
            out.column_of[field_name] = column
        elif field_name in present and field_name not in claimed:
            out.column_of[field_name] = field_name
        elif field_name != "prompt" or not _answers_are_dialogues(rows, columns, needed):
            alternatives = [
                name
                for name in _ALTERNATIVE_NAMES.get(field_name, ())
                if name in present and name not in claimed and _has_values(rows, name)
            ]
            if len(alternatives) == 1:
                out.column_of[field_name] = alternatives[0]
                out.recognized.append(field_name)
            elif alternatives and field_name == "prompt":
                raise UnreadableData(
                    f"{name} has no column 'prompt', and several columns could be the prompt: "
                    f"{', '.join(alternatives)}. "
                    f"Choose one with `columns: {{prompt: {alternatives[0]}}}`; join them if the prompt is in both."
                )
    for field_name in needed:
        if present and field_name not in out.column_of:
            other = _other_format_message(present, name) if not field_name.startswith("score_") else None
            raise UnreadableData(other or _missing_column_message(field_name, field_name, name, list(present)))
    left_out = {field_name for field_name, column in columns.items() if column is None}
    left_out |= {each for field_name in left_out for each in _ALTERNATIVE_NAMES.get(field_name, ())}
    unused = [
        name for name in present if _is_meaningful(name) and name not in out.column_of.values() and name not in left_out
    ]
    return Columns(out.column_of, tuple(out.recognized), tuple(unused))


def _has_labels(present: Collection[str], columns: Mapping[str, str | None]) -> bool:
    """Return whether a source has rows with one response and a label: both columns, by name or as `columns` says, and
    not those of pairs.
    """

    def has(field_name: str) -> bool:
        return columns.get(field_name) is not None if field_name in columns else field_name in present

    return all(map(has, SINGLE)) and not any(map(has, PAIR))


def _missing_column_message(field_name: str, column: str, name: str, present: list[str]) -> str:
    near = get_close_matches(column, sorted(present), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"{name} has no column {column!r} for {field_name}; it has {', '.join(sorted(present))}{hint or '.'} "
        f"Map it with `columns: {{{field_name}: NAME}}`."
    )


def _other_format_message(present: Collection[str], name: str) -> str | None:
    """Return how to convert a source of another known data format; None if the format is not known."""
    message = next((text for names, text in _OTHER_FORMATS if names <= set(present)), None)
    return None if message is None else f"{name} {clause(message)}. It has {', '.join(sorted(present))}."


def _answers_are_dialogues(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str | None], needed: Collection[str]
) -> bool:
    """Return whether the answers are whole dialogues, so that no prompt column is needed."""
    chosen = columns.get("chosen") or "chosen"
    values = (row.get(chosen) for row in rows)
    first = next((value for value in values if value), None) if "chosen" in needed else None
    return isinstance(first, list) and len(first) > 1


def _is_meaningful(name: str) -> bool:
    return name in _MEANINGFUL or not _MEANINGFUL_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _has_values(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(not _is_blank(row.get(name)) for row in rows)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value)
