"""Findings about preference data: their kinds, severities and counts with row numbers; `BadData`."""

from __future__ import annotations

import re
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from pydantic import Field

from trainer.config.base import FrozenModel
from trainer.results import TrialError

MAX_ROWS_SHOWN = 20
"""Row numbers stored per finding and source; `count` includes all rows."""


class Severity(StrEnum):
    """fatal: no row can be used; bad_row: this row cannot be trained on; notice: information only."""

    FATAL = "fatal"
    BAD_ROW = "bad_row"
    NOTICE = "notice"


FindingKind = Literal[
    "duplicate_bos",
    "prompt_not_prefix",
    "missing_eos",
    "template_refuses",
    "unreadable",
    "missing_field",
    "not_text",
    "not_utf8",
    "lone_surrogate",
    "empty_prompt",
    "empty_response",
    "equal_responses",
    "not_one_answer",
    "shared_prompt",
    "no_rows",
    "prompt_cut",
    "response_cut",
    "equal_after_cut",
    "boundary_merged",
    "other_end",
    "special_in_text",
    "duplicate_row",
    "contradiction",
    "template_undecided",
    "needs_template",
    "no_prompt",
    "one_begins_other",
    "prompt_undecided",
    "prompt_not_in_dialogue",
    "questions_differ",
    "turns_differ",
    "system_conflict",
    "bad_tools",
    "bad_template_kwargs",
    "images",
    "equal_rendered",
    "prompt_changes",
    "prompt_repeated",
    "prompt_echoed",
    "text_turns",
    "context_moved",
    "several_turns",
    "implied_prompt",
    "already_ended",
    "already_rendered",
    "rendered_twice",
    "ignored_key",
    "content_altered",
    "unused_column",
    "recognised_column",
    "system_cut",
    "turns_cut",
    "score_contradicts",
    "score_tie",
    "missing_score",
    "kept_to_confirm",
    "bad_label",
]
RowNotice = tuple[FindingKind, str]
"""A kind of finding and a detail of this case."""

_COUNTED_BY_DETAIL: frozenset[FindingKind] = frozenset({"ignored_key", "unused_column", "recognised_column"})
"""Kinds that are counted separately for each detail (the name of a column or key)."""

_F, _B, _N = Severity.FATAL, Severity.BAD_ROW, Severity.NOTICE
_LENGTHS = "{data.max_length} or {data.max_prompt_length}"
_CITED = re.compile(r"\{([\w.]+)\}")
_KIND_DETAILS: dict[FindingKind, tuple[Severity, str, str]] = {
    # A name in braces is a setting, which is shown with its value.
    "duplicate_bos": (_F, "begin with two BOS tokens", "remove the BOS text from the prompts, or from the template"),
    "prompt_not_prefix": (
        _F,
        "are rendered so that the prompt is not a prefix of prompt and response",
        "give a data.chat_template whose generation prompt equals its text before an assistant's message",
    ),
    "missing_eos": (
        _F,
        "have a response without an end token, so the model never learns to stop",
        "let the chat template write eos_token after an assistant's message (data.chat_template)",
    ),
    "template_undecided": (
        _F,
        "are plain text, and the tokenizer has a chat template",
        "set data.apply_template: true (the prompt becomes a user's message and the answers an assistant's) or false "
        "(prompt and answer are trained on unchanged, with the end token after the answer)",
    ),
    "needs_template": (
        _F,
        "are plain text with a system text or tools, which only a chat template can render",
        "set data.apply_template: true, or leave the column out: columns: {system: null} or {tools: null}",
    ),
    "template_refuses": (_B, "are refused by the chat template", "see the roles that the template allows"),
    "unreadable": (_B, "are not a record of this file format", "correct or remove them"),
    "missing_field": (_B, "lack chosen or rejected, or completion or label", "map the names with `columns`"),
    "not_text": (_B, "have a value that is not text (a boolean, a number, null)", "correct or remove them"),
    "not_utf8": (_B, "are not valid UTF-8", "convert the file to UTF-8"),
    "lone_surrogate": (_B, "contain half of a surrogate pair, which is not a character", "correct or remove them"),
    "bad_label": (_B, "have a label that is neither true nor false", "correct or remove them"),
    "empty_prompt": (_B, "have no prompt", "correct or remove them"),
    "empty_response": (_B, "have an empty response", "correct or remove them"),
    "equal_responses": (_B, "have equal chosen and rejected responses", "correct or remove them"),
    "not_one_answer": (
        _B,
        "have an answer that does not begin and end with an assistant's message, or a prompt that ends with one",
        "correct or remove them",
    ),
    "no_prompt": (
        _B,
        "have no prompt: there is no column for it, and the answers have no common prefix",
        "name the column of the prompt: columns: {prompt: NAME}",
    ),
    "one_begins_other": (
        _B,
        "have no prompt, and one answer is a prefix of the other, so that the start of the answers is unknown",
        "give the prompt in a column of its own",
    ),
    "prompt_undecided": (
        _B,
        "have no prompt, and both answers begin with the same sentences, so that the start of the answers is unknown",
        "give the prompt in a column of its own",
    ),
    "prompt_not_in_dialogue": (
        _B,
        "have a prompt that the dialogues in chosen and rejected do not contain",
        "correct them, or take the prompt from the dialogues alone: columns: {prompt: null}",
    ),
    "questions_differ": (
        _B,
        "have different questions in chosen and rejected before the first answer that differs",
        "correct or remove them: a pair is two answers to one prompt",
    ),
    "turns_differ": (
        _B,
        "differ before their last answers, so that data.score: last finds no common context",
        "set data.score: all to score the whole completions, or remove them",
    ),
    "system_conflict": (
        _B,
        "have a system text that is not the system message of their dialogue",
        "correct them, or leave the column out: columns: {system: null}",
    ),
    "bad_tools": (
        _B,
        "have tool definitions that cannot be used",
        "correct them, or leave them out: columns: {tools: null}",
    ),
    "bad_template_kwargs": (_B, "have chat_template_kwargs that cannot be used", "correct or remove them"),
    "images": (
        _B,
        "contain images, audio or video, and only text is trained on",
        "remove them, or leave a column of them out: columns: {images: null}",
    ),
    "equal_rendered": (
        _B,
        "have answers that the chat template renders alike",
        "use a template that renders the difference (data.chat_template), or remove them",
    ),
    "rendered_twice": (
        _B,
        "hold a prompt that a chat template has rendered already, which data.apply_template: true would render again",
        "set data.apply_template: false, which trains on the text as it stands, or remove the marks of the template",
    ),
    "prompt_changes": (
        _B,
        "have a prompt that the chat template renders differently when the answer follows",
        "use a template that renders the prompt alone alike (data.chat_template), set data.score: last if the answers "
        "have several turns, or remove them",
    ),
    "shared_prompt": (_N, "have a prompt that is evaluated too; left out of training", ""),
    "no_rows": (_F, "no row is left", "give more rows, or another data.eval"),
    "prompt_cut": (_N, f"lose the beginning of the question: they do not fit {_LENGTHS}", ""),
    "system_cut": (_N, f"lose the system message or tool definitions, or a part: they do not fit {_LENGTHS}", ""),
    "turns_cut": (_N, f"lose earlier turns of the prompt, or a part: they do not fit {_LENGTHS}", ""),
    "response_cut": (_N, "have a response cut at {data.max_length}; it loses its end token", ""),
    "equal_after_cut": (_N, "are equal once cut at {data.max_length}: left out", "raise data.max_length"),
    "boundary_merged": (_N, "have a token that joins prompt and response; it is scored with the response", ""),
    "other_end": (_N, "end with a special token other than {eos_token}; generation must stop there too", ""),
    "special_in_text": (_N, "contain the text of a special token", ""),
    "duplicate_row": (_N, "repeat an earlier row", ""),
    "contradiction": (_N, "prefer what another row of the same prompt rejects, or have the other label", ""),
    "prompt_repeated": (_N, "repeat the prompt, or its end, in the answers; the repetition is removed", ""),
    "prompt_echoed": (
        _N,
        "have answers that begin with the words of the prompt, which is short or begins one of them alone; they stay "
        "in the answers",
        "",
    ),
    "text_turns": (
        _N,
        "are text with turns (Human:, Assistant:), which become messages without markers and white space around",
        "",
    ),
    "context_moved": (_N, "begin both answers with the same messages of other roles; they join the prompt", ""),
    "several_turns": (
        _N,
        "have answers of several messages; all of their tokens are scored, those of other roles too",
        "data.score: last scores the last answer alone",
    ),
    "implied_prompt": (
        _N,
        "have no prompt; the common first words of both answers are used as the prompt",
        "give the prompt in a column of its own if this is wrong",
    ),
    "already_ended": (_N, "have answers whose text has the end of a turn; it is not repeated", ""),
    "already_rendered": (_N, "contain the markers of a chat template already; the text is trained on unchanged", ""),
    "ignored_key": (_N, "have content that the chat template does not render", ""),
    "content_altered": (_N, "have a message that the chat template changes", ""),
    "unused_column": (_N, "have content in a column that is not used", "map it with `columns`, or to null"),
    "recognised_column": (_N, "have a column that is recognized by its name", ""),
    "score_contradicts": (_N, "have a lower score for chosen than for rejected", "remove them, or exchange the two"),
    "score_tie": (_N, "have equal scores for chosen and rejected", ""),
    "missing_score": (
        _F,
        "have no finite number as score_chosen or score_rejected, which loss.odpo_alpha needs",
        "name the columns (columns: {score_chosen: NAME, score_rejected: NAME}), or correct or remove the rows",
    ),
    "kept_to_confirm": (_N, "are kept for finalists (data.confirm_share); the search does not evaluate on them", ""),
}
_SINGULAR = {"are": "is", "have": "has"}


def severity_of(kind: FindingKind) -> Severity:
    """Return the severity of a kind of finding."""
    return _KIND_DETAILS[kind][0]


def describe_finding(kind: FindingKind, detail: str = "", settings: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the text of a finding about one row, such as "has an empty response", followed by the detail.

    `settings`: values of the settings that the text may cite.
    """
    verb, _, rest = _meaning(kind, settings).partition(" ")
    text = f"{_SINGULAR.get(verb, verb + 's')} {rest}"
    return f"{text}. {detail}".rstrip(" .") if detail else text


def _meaning(kind: FindingKind, settings: Mapping[str, str]) -> str:
    def cited(found: re.Match[str]) -> str:
        return f"{found[1]} {settings[found[1]]}" if found[1] in settings else found[1]

    return _CITED.sub(cited, _KIND_DETAILS[kind][1])


def cited_settings(kind: FindingKind, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that this kind's text cites, with their values."""
    return {name: settings[name] for name in _CITED.findall(_KIND_DETAILS[kind][1]) if name in settings}


class DataFinding(FrozenModel):
    """One kind of finding: how many rows have it, and the first of them as (source, row number from 1)."""

    kind: FindingKind
    severity: Severity
    count: int
    rows: tuple[tuple[str, int], ...]
    detail: str = ""
    """Detail of the first case, where the kind is not specific enough."""
    settings: dict[str, str] = Field(default_factory=dict)
    """Settings that the text cites, with their values; empty in reports of older versions."""

    @property
    def advice(self) -> str:
        """What to do about the finding; "" if nothing is needed."""
        return _KIND_DETAILS[self.kind][2]

    def __str__(self) -> str:
        meaning = _meaning(self.kind, self.settings)
        one = f"1 row {describe_finding(self.kind, settings=self.settings)}"
        text = one if self.count == 1 else f"{self.count:,} rows {meaning}" if self.count else meaning
        by_source: dict[str, list[str]] = {}
        for source, row in self.rows:
            by_source.setdefault(source, []).append(str(row))
        locations = [f"{source}: {', '.join(rows)}" for source, rows in by_source.items()]
        if locations:
            text += f" ({'; '.join(locations)}{', ...' if self.count > len(self.rows) else ''})"
        return f"{text}. {self.detail}".rstrip(" .") if self.detail else text


class BadData(TrialError):
    """Data that must not be trained on. `findings` has all findings, notices included; `next_step` is the advice."""

    def __init__(self, findings: Sequence[DataFinding], next_step: str) -> None:
        self.findings = tuple(findings)
        self.next_step = next_step
        empty = any(f.kind == "no_rows" for f in self.findings)  # then the notices explain why
        shown = [f for f in self.findings if empty or f.severity is not Severity.NOTICE]
        lines = [f"  {f}{f' - {f.advice}' if f.advice else ''}" for f in shown]
        super().__init__("\n".join(["the preference data cannot be used:", *lines, next_step]))

    def __reduce__(self) -> tuple[type[BadData], tuple[tuple[DataFinding, ...], str]]:
        return (BadData, (self.findings, self.next_step))


class UnreadableData(TrialError):
    """A source cannot be opened, or lacks the columns that are needed; the message says what to do."""


class FindingCollector:
    """Counts findings row by row."""

    def __init__(self) -> None:
        self._counts: dict[RowNotice, int] = {}
        self._rows: dict[RowNotice, list[tuple[int, int]]] = {}
        self._details: dict[RowNotice, tuple[tuple[int, int], str]] = {}
        self._sources: dict[str, int] = {}
        """Every source and its index in the order of reading."""

    def add(self, kind: FindingKind, source: str, row: int, detail: str = "") -> None:
        """Count one row for a kind, in any order of rows. Columns and keys count per name.

        The first rows are stored, and the detail of the first that has one.
        """
        key = (kind, detail if kind in _COUNTED_BY_DETAIL else "")
        self._counts[key] = self._counts.get(key, 0) + 1
        place = self._sources.setdefault(source, len(self._sources)), row
        rows = self._rows.setdefault(key, [])
        if len(rows) < MAX_ROWS_SHOWN or place < rows[-1]:
            insort(rows, place)
            del rows[MAX_ROWS_SHOWN:]
        if detail and (key not in self._details or place < self._details[key][0]):
            self._details[key] = place, detail

    def add_dataset_finding(self, kind: FindingKind, detail: str) -> None:
        """Add a finding about the data as a whole."""
        self._counts.setdefault((kind, ""), 0)
        self._details.setdefault((kind, ""), ((0, 0), detail))

    def as_tuple(self) -> tuple[DataFinding, ...]:
        """Return all findings, most severe first, then by count."""
        names = list(self._sources)
        found = [
            DataFinding(
                kind=key[0],
                severity=severity_of(key[0]),
                count=count,
                rows=tuple((names[source], row) for source, row in self._rows.get(key, ())),
                detail=self._details.get(key, ((0, 0), ""))[1],
            )
            for key, count in self._counts.items()
        ]
        order = list(Severity)
        return tuple(sorted(found, key=lambda f: (order.index(f.severity), -f.count, f.kind, f.detail)))


def raise_if_refused(
    findings: Iterable[DataFinding], bad_rows: int, rows: int, mode: Literal["refuse", "skip"], max_bad_share: float
) -> None:
    """Raise BadData for any fatal finding, for bad rows in mode "refuse", and for too many of them in mode "skip".

    Args:
        findings: All findings.
        bad_rows: Number of distinct bad rows.
        rows: Number of rows checked.
        mode: `data.bad_rows`.
        max_bad_share: `data.max_bad_share`, 0 to 1.
    """
    found = tuple(findings)
    if fatal := {f.kind for f in found if f.severity is Severity.FATAL}:
        needs_decision = fatal <= {"template_undecided", "needs_template"}
        raise BadData(found, f"This cannot be skipped; {'decide' if needs_decision else 'correct'} it and start again.")
    if not bad_rows:
        return
    if mode == "refuse":
        raise BadData(
            found,
            f"{_bad_rows_text(bad_rows, rows)}. Correct them, or train without them: "
            f"data.bad_rows: skip, data.max_bad_share: {_suggested_share(bad_rows, rows):g}.",
        )
    if bad_rows > max_bad_share * rows:
        raise BadData(
            found,
            f"{_bad_rows_text(bad_rows, rows)} ({bad_rows / rows:.2%}), more than data.max_bad_share "
            f"{max_bad_share:g}. Correct them, or train without them: "
            f"data.max_bad_share: {_suggested_share(bad_rows, rows):g}.",
        )


def _bad_rows_text(bad: int, rows: int) -> str:
    return f"{bad:,} of {rows:,} rows {'is' if bad == 1 else 'are'} bad"


def _suggested_share(bad: int, rows: int) -> float:
    """Return a data.max_bad_share, rounded up to two digits, that accepts this many bad rows."""
    return min(1.0, max(0.01, float(f"{bad / rows * 1.05:.2g}")))
