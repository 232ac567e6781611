"""Problems of preference data: `DataFinding`, severities, `BadData`; each kind is counted with row numbers."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Literal

from trainer.config.base import FrozenModel
from trainer.results import TrialError

MAX_ROWS_SHOWN = 20
"""Row numbers kept per finding and source; the count is always whole."""


class Severity(StrEnum):
    """fatal: no row can help it; bad_row: the row cannot be trained on; notice: worth knowing."""

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
]
Notice = tuple[FindingKind, str]
"""A kind of finding, and the case in words."""

_COUNTED_BY_DETAIL: frozenset[FindingKind] = frozenset({"ignored_key", "unused_column", "recognised_column"})
"""Kinds whose detail names what they are about: each detail is a finding of its own."""

_F, _B, _N = Severity.FATAL, Severity.BAD_ROW, Severity.NOTICE
_KIND_DETAILS: dict[FindingKind, tuple[Severity, str, str]] = {
    "duplicate_bos": (_F, "begin with two BOS tokens", "remove the BOS text from the prompts, or from the template"),
    "prompt_not_prefix": (
        _F,
        "are rendered so that the prompt is not the beginning of prompt and response",
        "give data.chat_template whose generation prompt is what it writes before an assistant's message",
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
        "(prompt and answer are trained on as they stand, with the end token after the answer)",
    ),
    "needs_template": (
        _F,
        "are plain text with a system text or tools, for which only a chat template has a place",
        "set data.apply_template: true, or leave the column out: columns: {system: null} or {tools: null}",
    ),
    "template_refuses": (_B, "are refused by the chat template", "see the roles that the template allows"),
    "unreadable": (_B, "are not a record of this file format", "correct or remove them"),
    "missing_field": (_B, "lack chosen or rejected", "map the names with `columns`"),
    "not_text": (_B, "hold a value that is no text (a boolean, a number, null)", "correct or remove them"),
    "not_utf8": (_B, "are not valid UTF-8", "convert the file to UTF-8"),
    "lone_surrogate": (_B, "hold half of a surrogate pair, which is no character", "correct or remove them"),
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
        "have no prompt: no column holds one, and the answers have no beginning in common",
        "name the column of the prompt: columns: {prompt: NAME}",
    ),
    "one_begins_other": (
        _B,
        "have no prompt, and one answer is the beginning of the other, so that nothing says where the answers begin",
        "give the prompt in a column of its own",
    ),
    "prompt_undecided": (
        _B,
        "have no prompt, and both answers begin with the same sentences, of which nothing says where the answer begins",
        "give the prompt in a column of its own",
    ),
    "prompt_not_in_dialogue": (
        _B,
        "have a prompt that the dialogues in chosen and rejected do not contain",
        "correct them, or take the prompt from the dialogues alone: columns: {prompt: null}",
    ),
    "questions_differ": (
        _B,
        "have other questions in chosen than in rejected before the first answer that differs",
        "correct or remove them: a pair is two answers to one prompt",
    ),
    "turns_differ": (
        _B,
        "differ before their last answers, so that data.score: last has no common context for them",
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
        "hold images, audio or video, and only text is trained on",
        "remove them, or leave a column of them out: columns: {images: null}",
    ),
    "equal_rendered": (
        _B,
        "have answers that the chat template renders alike",
        "use a template that renders where they differ (data.chat_template), or remove them",
    ),
    "rendered_twice": (
        _B,
        "hold a prompt that a chat template has rendered already, which data.apply_template: true would render again",
        "set data.apply_template: false, which trains on the text as it stands, or remove the marks of the template",
    ),
    "prompt_changes": (
        _B,
        "have a prompt that the chat template renders otherwise once the answer follows",
        "use a template that renders the prompt alike (data.chat_template), set data.score: last where the answers "
        "hold several turns, or remove them",
    ),
    "shared_prompt": (_N, "have a prompt that is evaluated too; left out of training", ""),
    "no_rows": (_F, "no row is left", "give more rows, or another data.eval"),
    "prompt_cut": (_N, "lose the beginning of the question: they do not fit data.max_length or max_prompt_length", ""),
    "system_cut": (_N, "lose the system message or tool definitions, or a part: they do not fit", ""),
    "turns_cut": (_N, "lose earlier turns of the prompt, or a part: they do not fit", ""),
    "response_cut": (_N, "have a response cut at data.max_length; it loses its end token", ""),
    "equal_after_cut": (_N, "are equal once cut at data.max_length: left out", "raise data.max_length"),
    "boundary_merged": (_N, "have a token that joins prompt and response; it is scored with the response", ""),
    "other_end": (_N, "end with another special token than eos_token; generation must stop there too", ""),
    "special_in_text": (_N, "hold the text of a special token", ""),
    "duplicate_row": (_N, "repeat an earlier row", ""),
    "contradiction": (_N, "prefer what another row of the same prompt rejects", ""),
    "prompt_repeated": (_N, "repeat the prompt, or its end, in the answers; it is kept once", ""),
    "prompt_echoed": (
        _N,
        "have answers that begin with the words of the prompt, which is short or begins one of them alone; they stay "
        "in the answers",
        "",
    ),
    "text_turns": (
        _N,
        "are text of turns (Human:, Assistant:), which become messages without these marks and the blanks around them",
        "",
    ),
    "context_moved": (_N, "begin both answers with the same messages of others; these belong to the prompt", ""),
    "several_turns": (
        _N,
        "have answers of several messages; all of their tokens are scored, those of other roles too",
        "data.score: last scores the last answer alone",
    ),
    "implied_prompt": (
        _N,
        "have no prompt; the words with which both answers begin are taken for it",
        "give the prompt in a column of its own if that is not meant",
    ),
    "already_ended": (_N, "have answers whose text ends with the end of a turn; it is kept once", ""),
    "already_rendered": (_N, "hold the marks of a chat template already; the text is trained on as it stands", ""),
    "ignored_key": (_N, "hold what the chat template does not render", ""),
    "content_altered": (_N, "have a message that the chat template does not render as it stands", ""),
    "unused_column": (_N, "hold something in a column that is not used", "map it with `columns`, or to null"),
    "recognised_column": (_N, "have a column that is recognised by its name", ""),
    "score_contradicts": (_N, "have a lower score for chosen than for rejected", "remove them, or exchange the two"),
    "score_tie": (_N, "have equal scores for chosen and rejected", ""),
}
_SINGULAR = {"are": "is", "have": "has"}


def severity(kind: FindingKind) -> Severity:
    """How grave a kind is."""
    return _KIND_DETAILS[kind][0]


def in_words(kind: FindingKind, detail: str = "") -> str:
    """What a kind says of one row: "has an empty response", with the case's own words behind it."""
    verb, _, rest = _KIND_DETAILS[kind][1].partition(" ")
    text = f"{_SINGULAR.get(verb, verb + 's')} {rest}"
    return f"{text}. {detail}".rstrip(" .") if detail else text


class DataFinding(FrozenModel):
    """One kind of trouble: how many rows have it and the first of them, as (source, row number from 1)."""

    kind: FindingKind
    severity: Severity
    count: int
    rows: tuple[tuple[str, int], ...]
    detail: str = ""
    """The first case in words, where the kind alone does not say enough."""

    @property
    def advice(self) -> str:
        """What to do about it; empty for a notice that needs nothing done."""
        return _KIND_DETAILS[self.kind][2]

    def __str__(self) -> str:
        meaning = _KIND_DETAILS[self.kind][1]
        one = f"1 row {in_words(self.kind)}"
        text = one if self.count == 1 else f"{self.count:,} rows {meaning}" if self.count else meaning
        by_source: dict[str, list[str]] = {}
        for source, row in self.rows:
            by_source.setdefault(source, []).append(str(row))
        paths = [f"{source}: {', '.join(rows)}" for source, rows in by_source.items()]
        if paths:
            text += f" ({'; '.join(paths)}{', ...' if self.count > len(self.rows) else ''})"
        return f"{text}. {self.detail}".rstrip(" .") if self.detail else text


class BadData(TrialError):
    """Data that must not be trained on. `findings` are all that was found, the notices included."""

    def __init__(self, findings: Sequence[DataFinding], next_step: str) -> None:
        self.findings = tuple(findings)
        self.next_step = next_step
        empty = any(f.kind == "no_rows" for f in self.findings)  # then the notices say where the rows went
        grave = [f for f in self.findings if empty or f.severity is not Severity.NOTICE]
        lines = [f"  {f}{f' - {f.advice}' if f.advice else ''}" for f in grave]
        super().__init__("\n".join(["the preference data cannot be used:", *lines, next_step]))

    def __reduce__(self) -> tuple[type[BadData], tuple[tuple[DataFinding, ...], str]]:
        return (BadData, (self.findings, self.next_step))


class UnreadableData(TrialError):
    """A source that cannot be opened at all, or does not have the columns asked for; the message says what to do."""


class FindingCollector:
    """Collects what is found, row by row."""

    def __init__(self) -> None:
        self._counts: dict[Notice, int] = {}
        self._rows: dict[Notice, list[tuple[int, int]]] = {}
        self._details: dict[Notice, tuple[tuple[int, int], str]] = {}
        self._sources: dict[str, int] = {}
        """Every source by its place in the order in which they were met."""

    def add(self, kind: FindingKind, source: str, row: int, detail: str = "") -> None:
        """Count one row of one kind, in any order of rows.

        The first rows are kept, and the detail of the first that has one; a column or key is counted by its name.
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
        """A finding about the data as a whole, no row in particular."""
        self._counts.setdefault((kind, ""), 0)
        self._details.setdefault((kind, ""), ((0, 0), detail))

    def as_tuple(self) -> tuple[DataFinding, ...]:
        """All findings, gravest first, then by count."""
        names = list(self._sources)
        found = [
            DataFinding(
                kind=key[0],
                severity=severity(key[0]),
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
    """Raise BadData where the rules say so: a fatal finding always; bad rows when refused, or more than the share.

    `bad_rows` counts distinct bad rows among `rows` looked at.
    """
    found = tuple(findings)
    if fatal := {f.kind for f in found if f.severity is Severity.FATAL}:
        requested = fatal <= {"template_undecided", "needs_template"}
        raise BadData(found, f"No setting skips this; {'decide' if requested else 'correct'} it and start again.")
    if not bad_rows:
        return
    if mode == "refuse":
        raise BadData(
            found,
            f"{_of(bad_rows, rows)}. Correct them, or train without them: "
            f"data.bad_rows: skip, data.max_bad_share: {_share(bad_rows, rows):g}.",
        )
    if bad_rows > max_bad_share * rows:
        raise BadData(
            found,
            f"{_of(bad_rows, rows)} ({bad_rows / rows:.2%}), more than data.max_bad_share {max_bad_share:g}. "
            f"Correct them, or train without them: data.max_bad_share: {_share(bad_rows, rows):g}.",
        )


def _of(bad: int, rows: int) -> str:
    return f"{bad:,} of {rows:,} rows {'is' if bad == 1 else 'are'} bad"


def _share(bad: int, rows: int) -> float:
    """A data.max_bad_share that lets these pass, of two digits."""
    return min(1.0, max(0.01, float(f"{bad / rows * 1.05:.2g}")))
