"""From sources to the rows of both splits: read, mixed, checked as text, parted by prompt, limited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.config import DataConfig, Source
from trainer.data.check import Findings
from trainer.data.format import Bad, Preference, to_preference
from trainer.data.mix import Drawn, at_most, held_out, mix, prompt_key
from trainer.data.read import read_source, source_name

Split = Literal["train", "eval"]
TRAIN: Split = "train"
EVAL: Split = "eval"


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be trained on as far as its text says. `key` is what makes two prompts the same."""

    drawn: Drawn
    preference: Preference
    key: str


@dataclass(slots=True)
class Selection:
    """Rows of both splits, and how many rows were read, looked at and found bad on the way.

    `read` and `drawn` count by (split, position of the source in that split's list); where evaluation is held out of
    the training sources, both splits share that list and what was read counts for `train`.
    """

    findings: Findings
    train: list[Row] = field(default_factory=list)
    eval: list[Row] = field(default_factory=list)
    bad: set[tuple[Split, int, int]] = field(default_factory=set)
    looked_at: int = 0
    read: Counter[tuple[Split, int]] = field(default_factory=Counter)

    def rows(self, split: Split) -> list[Row]:
        """The rows of one split."""
        return self.train if split == TRAIN else self.eval


def sources_of(data: DataConfig, split: Split) -> Sequence[Source]:
    """The sources that a split's rows come from."""
    return data.train if split == TRAIN or data.eval is None else data.eval


def select(data: DataConfig) -> Selection:
    """Rows to train and to evaluate on, bad ones left out and counted. UnreadableData for a missing source."""
    out = Selection(Findings())
    train = _readable(out, TRAIN, data)
    if data.eval is not None:
        evaluation = _readable(out, EVAL, data)
    else:
        chosen = held_out([row.key for row in train], data.eval_share)
        evaluation = [row for row in train if row.key in chosen]
        train = [row for row in train if row.key not in chosen]
    out.eval = at_most(evaluation, data.max_eval_rows)
    out.train = at_most(train, data.max_train_rows)
    if data.eval is not None:
        _part_from_evaluation(out, data)
    for split in (TRAIN, EVAL):
        _look_for_repeats(out, data, split)
    return out


def _readable(out: Selection, split: Split, data: DataConfig) -> list[Row]:
    sources = sources_of(data, split)
    read = [read_source(source) for source in sources]
    out.read.update({(split, at): len(rows) for at, rows in enumerate(read)})
    rows: list[Row] = []
    for drawn in mix(read, [source.weight for source in sources]):
        out.looked_at += 1
        raw = drawn.raw
        found = (
            Bad("unreadable", raw.trouble)
            if raw.fields is None
            else to_preference(raw.fields, score=data.score, apply_template=data.apply_template, noticed=raw.notices)
        )
        if isinstance(found, Bad):
            out.findings.add(found.kind, source_name(sources[drawn.source]), drawn.raw.number, found.detail)
            out.bad.add((split, drawn.source, drawn.raw.number))
        else:
            rows.append(Row(drawn, found, prompt_key(found.prompt)))
    return rows


def _part_from_evaluation(out: Selection, data: DataConfig) -> None:
    """Training rows whose prompt is evaluated are bad: the evaluation would measure memory."""
    evaluated = {row.key for row in out.eval}
    kept: list[Row] = []
    for row in out.train:
        if row.key in evaluated:
            out.findings.add("shared_prompt", source_name(data.train[row.drawn.source]), row.drawn.raw.number)
            out.bad.add((TRAIN, row.drawn.source, row.drawn.raw.number))
        else:
            kept.append(row)
    out.train = kept


def _look_for_repeats(out: Selection, data: DataConfig, split: Split) -> None:
    seen: set[tuple[str, str, str]] = set()
    for row in out.rows(split):
        chosen, rejected = repr(row.preference.chosen), repr(row.preference.rejected)
        name = source_name(sources_of(data, split)[row.drawn.source])
        if (row.key, chosen, rejected) in seen:
            out.findings.add("duplicate_row", name, row.drawn.raw.number)
        elif (row.key, rejected, chosen) in seen:
            out.findings.add("contradiction", name, row.drawn.raw.number)
        seen.add((row.key, chosen, rejected))
