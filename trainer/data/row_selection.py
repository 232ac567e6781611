"""From sources to the rows of both splits: read, mixed, checked as text, parted by prompt, limited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.config.trial import DataConfig, Source
from trainer.data.formats import Bad, Preference, to_preference
from trainer.data.mixing import Drawn, at_most, held_out, mix, prompt_key
from trainer.data.sources import read_source, source_name
from trainer.data.validation import Findings, Kind, Severity, severity

Split = Literal["train", "eval"]
TRAIN: Split = "train"
EVAL: Split = "eval"
Place = tuple[Split, int, int]
"""A row: its split, the position of its source in that split's list, its number there from 1."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be trained on as far as its text says. `key` is what makes two prompts the same."""

    drawn: Drawn
    preference: Preference
    key: str

    def place(self, split: Split) -> Place:
        """Where it comes from, as a row of this split."""
        return split, self.drawn.source, self.drawn.raw.number


@dataclass(slots=True)
class Selection:
    """Rows of both splits, and how many rows were read, looked at and found bad on the way.

    `read` and `checked` count by (split, position of the source in that split's list); where evaluation is held out of
    the training sources, both splits share that list and what was read counts for `train`.
    """

    names: dict[Split, list[str]]
    """How the sources of a split are called, in their order."""
    findings: Findings = field(default_factory=Findings)
    train: list[Row] = field(default_factory=list)
    eval: list[Row] = field(default_factory=list)
    bad: set[Place] = field(default_factory=set)
    shared: set[Place] = field(default_factory=set)
    """Training rows left out because their prompt is evaluated."""
    checked: Counter[tuple[Split, int]] = field(default_factory=Counter)
    read: Counter[tuple[Split, int]] = field(default_factory=Counter)
    notes: dict[Place, list[tuple[Kind, str]]] = field(default_factory=dict)
    """What was noticed about each row: kinds, with the case in words."""

    def rows(self, split: Split) -> list[Row]:
        """The rows of one split."""
        return self.train if split == TRAIN else self.eval

    @property
    def looked_at(self) -> int:
        """Rows drawn from all sources and checked."""
        return self.checked.total()

    def note(self, place: Place, kind: Kind, detail: str = "") -> None:
        """Record one thing noticed about one row; a kind that is a bad row's makes the row one."""
        split, source, row = place
        self.findings.add(kind, self.names[split][source], row, detail)
        self.notes.setdefault(place, []).append((kind, detail))
        if severity(kind) is Severity.BAD_ROW:
            self.bad.add(place)


def sources_of(data: DataConfig, split: Split) -> Sequence[Source]:
    """The sources that a split's rows come from."""
    return data.train if split == TRAIN or data.eval is None else data.eval


def select(data: DataConfig) -> Selection:
    """Rows to train and to evaluate on, bad ones left out and counted. UnreadableData for a missing source."""
    out = Selection({split: [source_name(source) for source in sources_of(data, split)] for split in (TRAIN, EVAL)})
    train = _readable(out, TRAIN, data)
    if data.eval is not None:
        out.eval = at_most(_readable(out, EVAL, data), data.max_eval_rows)
        train = _apart_from_evaluation(out, train)
    else:
        chosen = held_out([row.key for row in train], data.eval_share)
        out.eval = at_most([row for row in train if row.key in chosen], data.max_eval_rows)
        train = [row for row in train if row.key not in chosen]
    out.train = at_most(train, data.max_train_rows)
    for split in (TRAIN, EVAL):
        _look_for_repeats(out, split)
    return out


def _readable(out: Selection, split: Split, data: DataConfig) -> list[Row]:
    sources = sources_of(data, split)
    read = [read_source(source) for source in sources]
    out.read.update({(split, at): len(rows) for at, rows in enumerate(read)})
    rows: list[Row] = []
    for drawn in mix(read, [source.weight for source in sources]):
        out.checked[split, drawn.source] += 1
        raw = drawn.raw
        found = (
            Bad("unreadable", raw.trouble)
            if raw.fields is None
            else to_preference(raw.fields, score=data.score, apply_template=data.apply_template, noticed=raw.notices)
        )
        if isinstance(found, Bad):
            out.note((split, drawn.source, drawn.raw.number), found.kind, found.detail)
        else:
            rows.append(Row(drawn, found, prompt_key(found.prompt)))
    return rows


def _apart_from_evaluation(out: Selection, train: list[Row]) -> list[Row]:
    """Training rows whose prompt is evaluated are left out: the evaluation would measure memory."""
    evaluated = {row.key for row in out.eval}
    kept: list[Row] = []
    for row in train:
        if row.key not in evaluated:
            kept.append(row)
            continue
        place = row.place(TRAIN)
        out.note(place, "shared_prompt")
        out.shared.add(place)
    return kept


def _look_for_repeats(out: Selection, split: Split) -> None:
    seen: set[tuple[str, str, str]] = set()
    for row in out.rows(split):
        chosen, rejected = repr(row.preference.chosen), repr(row.preference.rejected)
        if (row.key, chosen, rejected) in seen:
            out.note(row.place(split), "duplicate_row")
        elif (row.key, rejected, chosen) in seen:
            out.note(row.place(split), "contradiction")
        seen.add((row.key, chosen, rejected))
