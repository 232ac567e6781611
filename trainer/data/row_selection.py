"""Rows of both splits from their sources: read, mixed, checked as text, split by prompt, limited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.config.trial import DataConfig, Source
from trainer.data.chat_messages import InvalidRow
from trainer.data.formats import Preference, to_preference
from trainer.data.mixing import SampledRow, held_out_prompts, limit_rows, mix_sources, prompt_key
from trainer.data.sources import read_source, source_name
from trainer.data.validation import FindingCollector, FindingKind, Severity, severity

Split = Literal["train", "eval"]
TRAIN: Split = "train"
EVAL: Split = "eval"
Place = tuple[Split, int, int]
"""A row: its split, the position of its source in that split's list, its number there from 1."""


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A row that can be trained on as far as its text says. `key` is what makes two prompts the same."""

    sampled: SampledRow
    preference: Preference
    key: str

    def place(self, split: Split) -> Place:
        """Where it comes from, as a row of this split."""
        return split, self.sampled.source, self.sampled.row.number


@dataclass(slots=True)
class Selection:
    """Rows of both splits, and how many rows were read, looked at and found bad on the way.

    `read` and `checked` count by (split, position of the source in that split's list); where evaluation is held out of
    the training sources, both splits share that list and what was read counts for `train`.
    """

    names: dict[Split, list[str]]
    """How the sources of a split are called, in their order."""
    findings: FindingCollector = field(default_factory=FindingCollector)
    train: list[PreferenceRow] = field(default_factory=list)
    eval: list[PreferenceRow] = field(default_factory=list)
    invalid: set[Place] = field(default_factory=set)
    shared: set[Place] = field(default_factory=set)
    """Training rows left out because their prompt is evaluated."""
    checked: Counter[tuple[Split, int]] = field(default_factory=Counter)
    rows_read: Counter[tuple[Split, int]] = field(default_factory=Counter)
    notes: dict[Place, list[tuple[FindingKind, str]]] = field(default_factory=dict)
    """What was noticed about each row: kinds, with the case in words."""

    def rows(self, split: Split) -> list[PreferenceRow]:
        """The rows of one split."""
        return self.train if split == TRAIN else self.eval

    @property
    def checked_rows(self) -> int:
        """Rows drawn from all sources and checked."""
        return self.checked.total()

    def note(self, path: Place, kind: FindingKind, detail: str = "") -> None:
        """Record one thing noticed about one row; a kind that is a bad row's makes the row one."""
        split, source, row = path
        self.findings.add(kind, self.names[split][source], row, detail)
        self.notes.setdefault(path, []).append((kind, detail))
        if severity(kind) is Severity.BAD_ROW:
            self.invalid.add(path)


def sources_of(data: DataConfig, split: Split) -> Sequence[Source]:
    """The sources that a split's rows come from."""
    return data.train if split == TRAIN or data.eval is None else data.eval


def select_rows(data: DataConfig) -> Selection:
    """Rows to train and to evaluate on, bad ones left out and counted. UnreadableData for a missing source."""
    out = Selection({split: [source_name(source) for source in sources_of(data, split)] for split in (TRAIN, EVAL)})
    train = _read_rows(out, TRAIN, data)
    if data.eval is not None:
        out.eval = limit_rows(_read_rows(out, EVAL, data), data.max_eval_rows)
        train = _apart_from_evaluation(out, train)
    else:
        chosen = held_out_prompts([row.key for row in train], data.eval_share)
        out.eval = limit_rows([row for row in train if row.key in chosen], data.max_eval_rows)
        train = [row for row in train if row.key not in chosen]
    out.train = limit_rows(train, data.max_train_rows)
    for split in (TRAIN, EVAL):
        _find_duplicates(out, split)
    return out


def _read_rows(out: Selection, split: Split, data: DataConfig) -> list[PreferenceRow]:
    sources = sources_of(data, split)
    read = [read_source(source) for source in sources]
    out.rows_read.update({(split, at): len(rows) for at, rows in enumerate(read)})
    rows: list[PreferenceRow] = []
    for sampled in mix_sources(read, [source.weight for source in sources]):
        out.checked[split, sampled.source] += 1
        raw = sampled.row
        found = (
            InvalidRow("unreadable", raw.error)
            if raw.fields is None
            else to_preference(raw.fields, score=data.score, apply_template=data.apply_template, noticed=raw.notices)
        )
        if isinstance(found, InvalidRow):
            out.note((split, sampled.source, sampled.row.number), found.kind, found.detail)
        else:
            rows.append(PreferenceRow(sampled, found, prompt_key(found.prompt)))
    return rows


def _apart_from_evaluation(out: Selection, train: list[PreferenceRow]) -> list[PreferenceRow]:
    """Training rows whose prompt is evaluated are left out: the evaluation would measure memory."""
    evaluated = {row.key for row in out.eval}
    remaining: list[PreferenceRow] = []
    for row in train:
        if row.key not in evaluated:
            remaining.append(row)
            continue
        path = row.place(TRAIN)
        out.note(path, "shared_prompt")
        out.shared.add(path)
    return remaining


def _find_duplicates(out: Selection, split: Split) -> None:
    seen: set[tuple[str, str, str]] = set()
    for row in out.rows(split):
        chosen, rejected = repr(row.preference.chosen), repr(row.preference.rejected)
        if (row.key, chosen, rejected) in seen:
            out.note(row.place(split), "duplicate_row")
        elif (row.key, rejected, chosen) in seen:
            out.note(row.place(split), "contradiction")
        seen.add((row.key, chosen, rejected))
