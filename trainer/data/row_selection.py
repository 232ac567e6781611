"""Select the rows of both splits: read, mix, check as text, split by prompt, limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.config.trial import DataConfig, Source
from trainer.data.chat_messages import InvalidRow
from trainer.data.data_findings import FindingCollector, FindingKind, Severity, UnreadableData, severity_of
from trainer.data.formats import Preference, to_preference
from trainer.data.mixing import SampledRow, held_out_prompts, limit_rows, mix_sources, prompt_key
from trainer.data.sources import read_source, source_name

Split = Literal["train", "eval"]
TRAIN: Split = "train"
EVAL: Split = "eval"
RowAddress = tuple[Split, int, int]
"""Address of a row: its split, the position of its source in that split's list, its row number from 1."""


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A row whose text passed all checks. `key` is equal for rows with the same prompt (`prompt_key`)."""

    sampled: SampledRow
    preference: Preference
    key: str

    def address(self, split: Split) -> RowAddress:
        """Return the address of this row in a split."""
        return split, self.sampled.source, self.sampled.row.number


@dataclass(slots=True)
class Selection:
    """Rows of both splits, and how many rows were read, checked and found invalid.

    `rows_read` and `checked` count by (split, position of the source in that split's list). Where evaluation rows are
    held out of the training sources, both splits share that list and rows read count for `train`.
    """

    names: dict[Split, list[str]]
    """Names of the sources of each split, in the order of the configuration."""
    findings: FindingCollector = field(default_factory=FindingCollector)
    train: list[PreferenceRow] = field(default_factory=list)
    eval: list[PreferenceRow] = field(default_factory=list)
    invalid: set[RowAddress] = field(default_factory=set)
    shared: set[RowAddress] = field(default_factory=set)
    """Training rows left out because their prompt is in the evaluation split."""
    checked: Counter[tuple[Split, int]] = field(default_factory=Counter)
    rows_read: Counter[tuple[Split, int]] = field(default_factory=Counter)
    findings_by_row: dict[RowAddress, list[tuple[FindingKind, str]]] = field(default_factory=dict)
    """Findings about each row: kind and detail."""

    def rows(self, split: Split) -> list[PreferenceRow]:
        """Return the rows of one split."""
        return self.train if split == TRAIN else self.eval

    @property
    def checked_rows(self) -> int:
        """Number of rows drawn from all sources and checked."""
        return self.checked.total()

    def add_finding(self, address: RowAddress, kind: FindingKind, detail: str = "") -> None:
        """Record a finding about one row; a finding of severity BAD_ROW makes the row invalid."""
        split, source, row = address
        self.findings.add(kind, self.names[split][source], row, detail)
        self.findings_by_row.setdefault(address, []).append((kind, detail))
        if severity_of(kind) is Severity.BAD_ROW:
            self.invalid.add(address)


def sources_of(data: DataConfig, split: Split) -> Sequence[Source]:
    """Return the sources that a split's rows come from."""
    return data.train if split == TRAIN or data.eval is None else data.eval


def select_rows(data: DataConfig) -> Selection:
    """Return the rows to train and to evaluate on; invalid ones are left out and counted. Raises UnreadableData."""
    out = Selection({split: [source_name(source) for source in sources_of(data, split)] for split in (TRAIN, EVAL)})
    train = _read_rows(out, TRAIN, data)
    if data.eval is not None:
        out.eval = limit_rows(_read_rows(out, EVAL, data), data.max_eval_rows)
        train = _without_evaluated_prompts(out, train)
    else:
        chosen = held_out_prompts([row.key for row in train], data.eval_share)
        out.eval = limit_rows([row for row in train if row.key in chosen], data.max_eval_rows)
        train = [row for row in train if row.key not in chosen]
    out.train = limit_rows(train, data.max_train_rows)
    if data.confirm_share is not None:
        _divide_eval(out, data.confirm_share, data.eval_on)
    if len({row.preference.is_single for row in (*out.train, *out.eval)}) > 1:
        raise UnreadableData(
            "data: some rows are pairs (chosen, rejected), others one response with a label (completion, label); write "
            "each pair as two rows with prompt, completion and label, or leave the rows of one kind out"
        )
    for split in (TRAIN, EVAL):
        _find_duplicates(out, split)
    return out


def _divide_eval(out: Selection, confirm_share: float, eval_on: Literal["search", "confirm"]) -> None:
    """Keep the held-out rows of one part: `confirm_share` of their prompts, chosen by hash, or the others.

    Both parts stay out of training. Where one is empty, none is left, as the sweep needs both.
    """
    confirm = held_out_prompts([row.key for row in out.eval], confirm_share)
    if eval_on == "search":
        for row in out.eval:
            if row.key in confirm:
                out.add_finding(row.address(EVAL), "kept_to_confirm")
    out.eval = [row for row in out.eval if (row.key in confirm) == (eval_on == "confirm")] if confirm else []


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
            else to_preference(
                raw.fields, score=data.score, apply_template=data.apply_template, row_notices=raw.notices
            )
        )
        if isinstance(found, InvalidRow):
            out.add_finding((split, sampled.source, sampled.row.number), found.kind, found.detail)
        else:
            rows.append(PreferenceRow(sampled, found, prompt_key(found.prompt)))
    return rows


def _without_evaluated_prompts(out: Selection, train: list[PreferenceRow]) -> list[PreferenceRow]:
    """Remove training rows whose prompt is evaluated: evaluation would measure memorization."""
    evaluated = {row.key for row in out.eval}
    remaining: list[PreferenceRow] = []
    for row in train:
        if row.key not in evaluated:
            remaining.append(row)
            continue
        address = row.address(TRAIN)
        out.add_finding(address, "shared_prompt")
        out.shared.add(address)
    return remaining


def _find_duplicates(out: Selection, split: Split) -> None:
    seen: set[tuple[str, str, str]] = set()
    for row in out.rows(split):
        chosen, rejected = repr(row.preference.chosen), repr(row.preference.rejected)
        if (row.key, chosen, rejected) in seen:
            out.add_finding(row.address(split), "duplicate_row")
        elif (row.key, rejected, chosen) in seen:
            out.add_finding(row.address(split), "contradiction")
        seen.add((row.key, chosen, rejected))
