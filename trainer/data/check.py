"""What can be wrong with preference data, in words: each kind with its weight, counted with row numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Literal

from trainer.errors import TrialError
from trainer.frozen import Frozen

SHOWN = 20
"""Row numbers kept per finding and source; the count is always whole."""


class Severity(StrEnum):
    """fatal: no row can help it; bad_row: the row cannot be trained on; notice: worth knowing."""

    FATAL = "fatal"
    BAD_ROW = "bad_row"
    NOTICE = "notice"


Kind = Literal[
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
]

_F, _B, _N = Severity.FATAL, Severity.BAD_ROW, Severity.NOTICE
_MEANING: dict[Kind, tuple[Severity, str, str]] = {
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
        "have a response that is not one assistant's message, or a prompt that ends with one",
        "the dialogues must differ in their last message alone",
    ),
    "shared_prompt": (_N, "have a prompt that is evaluated too; left out of training", ""),
    "no_rows": (_F, "no row is left", "give more rows, or another data.eval"),
    "prompt_cut": (_N, "have a prompt longer than data.max_prompt_length; its oldest tokens are left out", ""),
    "response_cut": (_N, "have a response cut at data.max_length; it loses its end token", ""),
    "equal_after_cut": (_N, "are equal once cut at data.max_length: left out", "raise data.max_length"),
    "boundary_merged": (_N, "have a token that joins prompt and response; it is scored with the response", ""),
    "other_end": (_N, "end with another special token than eos_token; generation must stop there too", ""),
    "special_in_text": (_N, "hold the text of a special token", ""),
    "duplicate_row": (_N, "repeat an earlier row", ""),
    "contradiction": (_N, "prefer what another row of the same prompt rejects", ""),
}
_SINGULAR = {"are": "is", "have": "has"}


def severity(kind: Kind) -> Severity:
    """How grave a kind is."""
    return _MEANING[kind][0]


class Finding(Frozen):
    """One kind of trouble: how many rows have it and the first of them, as (source, row number from 1)."""

    kind: Kind
    severity: Severity
    count: int
    rows: tuple[tuple[str, int], ...]
    detail: str = ""
    """The first case in words, where the kind alone does not say enough."""

    @property
    def advice(self) -> str:
        """What to do about it; empty for a notice that needs nothing done."""
        return _MEANING[self.kind][2]

    def __str__(self) -> str:
        meaning = _MEANING[self.kind][1]
        verb, _, rest = meaning.partition(" ")
        one = f"1 row {_SINGULAR.get(verb, verb + 's')} {rest}"
        text = one if self.count == 1 else f"{self.count:,} rows {meaning}" if self.count else meaning
        by_source: dict[str, list[str]] = {}
        for source, row in self.rows:
            by_source.setdefault(source, []).append(str(row))
        places = [f"{source}: {', '.join(rows)}" for source, rows in by_source.items()]
        if places:
            text += f" ({'; '.join(places)}{', ...' if self.count > len(self.rows) else ''})"
        return f"{text}. {self.detail}".rstrip(" .") if self.detail else text


class BadData(TrialError):
    """Data that must not be trained on. `findings` are all that was found, the notices included."""

    def __init__(self, findings: Sequence[Finding], next_step: str) -> None:
        self.findings = tuple(findings)
        self.next_step = next_step
        empty = any(f.kind == "no_rows" for f in self.findings)  # then the notices say where the rows went
        grave = [f for f in self.findings if empty or f.severity is not Severity.NOTICE]
        lines = [f"  {f}{f' - {f.advice}' if f.advice else ''}" for f in grave]
        super().__init__("\n".join(["the preference data cannot be used:", *lines, next_step]))

    def __reduce__(self) -> tuple[type[BadData], tuple[tuple[Finding, ...], str]]:
        return (BadData, (self.findings, self.next_step))


class UnreadableData(TrialError):
    """A source that cannot be opened at all, or does not have the columns asked for; the message says what to do."""


class Findings:
    """Collects what is found, row by row."""

    def __init__(self) -> None:
        self._counts: dict[Kind, int] = {}
        self._rows: dict[Kind, list[tuple[str, int]]] = {}
        self._details: dict[Kind, str] = {}

    def add(self, kind: Kind, source: str, row: int, detail: str = "") -> None:
        """One row of one kind; `detail` of the first is kept."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        rows = self._rows.setdefault(kind, [])
        if len(rows) < SHOWN:
            rows.append((source, row))
        if detail:
            self._details.setdefault(kind, detail)

    def add_whole(self, kind: Kind, detail: str) -> None:
        """A finding about the data as a whole, no row in particular."""
        self._counts.setdefault(kind, 0)
        self._details.setdefault(kind, detail)

    def as_tuple(self) -> tuple[Finding, ...]:
        """All findings, gravest first, then by count."""
        found = [
            Finding(
                kind=kind,
                severity=severity(kind),
                count=count,
                rows=tuple(self._rows.get(kind, ())),
                detail=self._details.get(kind, ""),
            )
            for kind, count in self._counts.items()
        ]
        order = list(Severity)
        return tuple(sorted(found, key=lambda f: (order.index(f.severity), -f.count, f.kind)))


def judge(
    findings: Iterable[Finding], bad: int, rows: int, mode: Literal["refuse", "skip"], max_bad_share: float
) -> None:
    """Raise BadData where the rules say so: a fatal finding always; bad rows when refused, or more than the share.

    `bad` counts distinct bad rows among `rows` looked at.
    """
    found = tuple(findings)
    if any(f.severity is Severity.FATAL for f in found):
        raise BadData(found, "No setting skips this; correct it and start again.")
    if not bad:
        return
    if mode == "refuse":
        raise BadData(
            found,
            f"{bad:,} of {rows:,} rows are bad. Correct them, or train without them: "
            f"data.bad_rows: skip, data.max_bad_share: {_share(bad, rows):g}.",
        )
    if bad > max_bad_share * rows:
        raise BadData(
            found,
            f"{bad:,} of {rows:,} rows are bad ({bad / rows:.2%}), more than data.max_bad_share {max_bad_share:g}. "
            f"Correct them, or train without them: data.max_bad_share: {_share(bad, rows):g}.",
        )


def _share(bad: int, rows: int) -> float:
    """A data.max_bad_share that lets these pass, of two digits."""
    return min(1.0, max(0.01, float(f"{bad / rows * 1.05:.2g}")))
