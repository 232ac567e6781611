"""Columns of a source to our names: mapped, recognized by a usual name, left over, or of another kind of data."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from trainer.data.validation import Notice, UnreadableData

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
)
"""What a row may carry under our names."""

_USUAL: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "problem", "input", "conversations"),
    "chosen": ("chosen_response",),
    "rejected": ("rejected_response",),
    "system": ("system_prompt", "system_message"),
    "score_chosen": ("chosen_score", "chosen_rating"),
    "score_rejected": ("rejected_score", "rejected_rating"),
    "images": ("image",),
}
"""Names of the same thing in public data sets: taken where ours is missing and exactly one of them is there."""

_MEANINGFUL = frozenset(
    (
        *(*FIELDS, *(name for names in _USUAL.values() for name in names)),
        *("history", "context", "functions", "documents", "messages", "conversations", "completion"),
        *("score", "scores", "rating", "ratings", "margin", "label", "audio", "video", "videos"),
    )
)
"""Columns that hold something which a model may be meant to read, or which may be meant to choose rows."""

_TELLING = frozenset(
    (
        *("system", "tool", "tools", "function", "functions", "context", "history", "document", "documents"),
        *("image", "images", "audio", "video", "videos"),
    )
)
"""Words of names that are longer, such as `system_instruction` or `available_tools`, that tell the same."""

_OTHER_FORMS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"completion", "label"}),
        "holds unpaired rows (one completion with a label, as for KTO), and pairs are wanted: join a completion with "
        "label true and one with label false of the same prompt into a row with prompt, chosen and rejected",
    ),
    (
        frozenset({"human_ref_A", "human_ref_B"}),
        "holds two answers and labels, as SHP does: write chosen: human_ref_A and rejected: human_ref_B where labels "
        "is 1, the other way round where it is 0, and prompt: history",
    ),
    (
        frozenset({"response_0", "response_1"}),
        "holds two answers and the number of the better one, as PKU-SafeRLHF does: write chosen and rejected by "
        "better_response_id (or safer_response_id)",
    ),
    (
        frozenset({"response1", "response2"}),
        "holds two answers and a preference, as HelpSteer3 does: write chosen: response1 and rejected: response2 where "
        "overall_preference is below 0, the other way round where it is above, and prompt: context",
    ),
    (
        frozenset({"response_1", "response_2"}),
        "holds two answers and a preference, as HelpSteer2 does: write chosen: response_1 and rejected: response_2 "
        "where preference_strength is below 0, the other way round where it is above",
    ),
    (
        frozenset({"response_a", "response_b"}),
        "holds two answers and a winner: write chosen and rejected by the winner, without ties",
    ),
    (
        frozenset({"conversation_a", "conversation_b"}),
        "holds two dialogues and a winner: write chosen and rejected by the winner, without ties",
    ),
    (
        frozenset({"prompt", "answers"}),
        "holds several ranked answers a row, as Nectar does: write the answer of the best rank as chosen and one of a "
        "lower rank as rejected",
    ),
    (
        frozenset({"completions"}),
        "holds several scored completions a row, as UltraFeedback's first form does: write the completion of the "
        "highest score as chosen and another one as rejected",
    ),
    (
        frozenset({"responses"}),
        "holds several responses a row: write the best as chosen and another one as rejected",
    ),
    (
        frozenset({"prompt", "completion"}),
        "holds prompts with one completion, as for SFT, and pairs are wanted: chosen and rejected for each prompt",
    ),
    (frozenset({"messages"}), "holds dialogues without a second answer, as for SFT, and pairs are wanted"),
)
"""Columns of forms that are not preference pairs, the most telling first, and what to do with them."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a source is which of our fields.

    `taken` maps ours to theirs; `recognised` are those of them found by a usual name; `unused` are columns that look
    as if they meant something to the model and are not taken.
    """

    taken: Mapping[str, str]
    recognised: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The cells of a row under our names."""
        return {ours: row[theirs] for ours, theirs in self.taken.items() if theirs in row}

    def notices(self, row: Mapping[str, Any]) -> tuple[Notice, ...]:
        """What the names tell about a row: recognized columns, and unused ones that hold something."""
        found: list[Notice] = [
            ("recognised_column", f"{self.taken[ours]!r} is taken for {ours}")
            for ours in self.recognised
            if not _blank(row.get(self.taken[ours]))
        ]
        current = [name for name in self.unused if not _blank(row.get(name))]
        if not current:
            return tuple(found)
        used = [row.get(self.taken[ours]) for ours in ("prompt", "chosen", "rejected") if ours in self.taken]
        used += [
            message.get("content") for part in used if isinstance(part, list) for message in part if _is_object(message)
        ]
        # a copy of what is used is no loss
        found.extend(("unused_column", f"The column {name!r}") for name in current if row[name] not in used)
        return tuple(found)


@dataclass(slots=True)
class _Found:
    taken: dict[str, str] = field(default_factory=dict[str, str])
    recognised: list[str] = field(default_factory=list[str])


def find_columns(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str | None], name: str, needed: Collection[str]
) -> Columns:
    """Match the columns of a source with our names.

    Args:
        rows: The rows as read.
        columns: `columns` of the source: ours to theirs; null leaves one out.
        name: Of the source, for messages.
        needed: Fields that must be there.

    Raises:
        UnreadableData: A name in `columns` is none of ours, a column that is needed or mapped is missing, several
            columns could be the prompt, or the rows are not preference pairs.
    """
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise UnreadableData(f"columns of {name}: {', '.join(unknown)} is none of ours ({', '.join(FIELDS)})")
    present = dict.fromkeys(key for row in rows for key in row)
    out = _Found()
    claimed = {theirs for theirs in columns.values() if theirs is not None}
    for ours in FIELDS:
        if ours in columns:
            theirs = columns[ours]
            if theirs is None:
                continue
            if present and theirs not in present:
                raise UnreadableData(_missing(ours, theirs, name, list(present)))
            out.taken[ours] = theirs
        elif ours in present and ours not in claimed:
            out.taken[ours] = ours
        elif ours != "prompt" or not _hold_prompts(rows, columns, needed):
            usual = [n for n in _USUAL.get(ours, ()) if n in present and n not in claimed and _filled(rows, n)]
            if len(usual) == 1:
                out.taken[ours] = usual[0]
                out.recognised.append(ours)
            elif usual and ours == "prompt":
                raise UnreadableData(
                    f"{name} has no column 'prompt', and several could be it: {', '.join(usual)}. "
                    f"Say which with `columns: {{prompt: {usual[0]}}}`; join them where the prompt is in both."
                )
    for ours in needed:
        if present and ours not in out.taken:
            raise UnreadableData(_other_form(present, name) or _missing(ours, ours, name, list(present)))
    left_out = {ours for ours, theirs in columns.items() if theirs is None}
    left_out |= {usual for ours in left_out for usual in _USUAL.get(ours, ())}
    unused = [n for n in present if _is_meaningful(n) and n not in out.taken.values() and n not in left_out]
    return Columns(out.taken, tuple(out.recognised), tuple(unused))


def _missing(ours: str, theirs: str, name: str, present: list[str]) -> str:
    near = get_close_matches(theirs, sorted(present), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"{name} has no column {theirs!r} for {ours}; it has {', '.join(sorted(present))}{hint} "
        f"Map it with `columns: {{{ours}: NAME}}`."
    )


def _other_form(present: Collection[str], name: str) -> str | None:
    """What a source is that has no pairs, and what to do with it."""
    message = next((text for names, text in _OTHER_FORMS if names <= set(present)), None)
    return None if message is None else f"{name} {message}. It has {', '.join(sorted(present))}."


def _hold_prompts(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str | None], needed: Collection[str]
) -> bool:
    """Whether the answers are whole dialogues, so that no column of prompts is needed."""
    chosen = columns.get("chosen") or "chosen"
    values = (row.get(chosen) for row in rows)
    first = next((value for value in values if value), None) if "chosen" in needed else None
    return isinstance(first, list) and len(first) > 1


def _is_meaningful(name: str) -> bool:
    return name in _MEANINGFUL or not _TELLING.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _filled(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(not _blank(row.get(name)) for row in rows)


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value)
