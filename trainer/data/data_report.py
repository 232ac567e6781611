"""`DataReport`: JSON summary of prepared data; and which rows differ between two preparations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trainer.config.base import FrozenModel
from trainer.data.data_findings import DataFinding, cited_settings
from trainer.data.pair_dataset import PairDataset, TokenizedPair

_PERCENTILES = (50, 90, 99, 100)


class SourceRows(FrozenModel):
    """Rows of one source: read, drawn for a split (by weights and row limits), and kept after all checks."""

    name: str
    split: str
    read: int
    drawn: int
    kept: int


class DataReport(FrozenModel):
    """Findings, counts and lengths. `lengths` are tokens per row at percentiles 50, 90, 99 and 100 (`p50`...)."""

    fingerprint: str
    train_rows: int
    eval_rows: int
    bad_rows: int
    dropped_rows: int
    sources: tuple[SourceRows, ...]
    findings: tuple[DataFinding, ...]
    lengths: dict[str, dict[str, int]]
    stop_tokens: tuple[int, ...]
    """Token ids at which generation stops: eos_token, and special tokens with which the template ends a response."""
    eval_held_out: bool
    """Whether the evaluation rows were held out of the training rows, by prompt."""
    checked_rows: int = 0
    """Rows drawn from the sources and checked, bad ones included; 0 in reports of older versions."""
    labels: dict[str, tuple[int, int]] | None = None
    """Of rows with one response: split -> rows with label true, and with label false. None for pairs."""

    def with_source_names(self, names: Sequence[str]) -> DataReport:
        """Return the report with other source names, in their order: the cached report may have old ones."""
        new = {source.name: name for source, name in zip(self.sources, names, strict=True)}
        sources = tuple(source_rows.model_copy(update={"name": new[source_rows.name]}) for source_rows in self.sources)
        findings = tuple(
            finding.model_copy(update={"rows": tuple((new[source], row) for source, row in finding.rows)})
            for finding in self.findings
        )
        return self.model_copy(update={"sources": sources, "findings": findings})

    def with_settings(self, settings: Mapping[str, str]) -> DataReport:
        """Return the report whose findings show the values of the settings that they cite."""
        findings = tuple(
            finding.model_copy(update={"settings": cited_settings(finding.kind, settings)}) for finding in self.findings
        )
        return self.model_copy(update={"findings": findings})

    def summary_lines(self) -> list[str]:
        """Return the report as text lines: sizes, rows left out, then every finding."""
        held_out = ", held out by prompt" if self.eval_held_out else ""
        rows, pairs = self.lengths.get("row"), "pair" if self.labels is None else "row"
        return [
            f"{self.train_rows:,} {pairs}{'s'[: self.train_rows != 1]} to train on, {self.eval_rows:,} to evaluate on"
            f"{held_out}",
            *([] if self.labels is None else [_labels_line(self.labels)]),
            *([] if rows is None else [_lengths_line(rows)]),
            *(f"{source.name} ({source.split}): {source.kept:,} of {source.read:,} rows" for source in self.sources),
            *([] if not self.bad_rows else [self._bad_rows_line()]),
            *(str(finding) for finding in self.findings),
        ]

    def counts(self) -> dict[str, int]:
        """Return pairs, dropped rows and findings by kind, by their names in tracking; labels of the training rows."""
        counts = {"train_rows": self.train_rows, "eval_rows": self.eval_rows}
        counts |= {"bad_rows": self.bad_rows, "dropped_rows": self.dropped_rows}
        if self.labels is not None:
            counts |= dict(zip(("desirable_rows", "undesirable_rows"), self.labels["train"], strict=True))
        for finding in self.findings:
            name = f"rows.{finding.kind}"
            counts[name] = counts.get(name, 0) + finding.count
        return counts

    def _bad_rows_line(self) -> str:
        one = self.bad_rows == 1
        of = f" of {self.checked_rows:,}" if self.checked_rows else ""
        share = f" ({self.bad_rows / self.checked_rows:.2%})" if self.checked_rows else ""
        return f"{self.bad_rows:,}{of} rows {'is' if one else 'are'} bad and left out{share}"


def _labels_line(labels: Mapping[str, tuple[int, int]]) -> str:
    parts = [f"{split} {yes:,} desirable and {no:,} undesirable" for split, (yes, no) in labels.items()]
    return f"one response a row, with a label: {', '.join(parts)}"


def _lengths_line(rows: Mapping[str, int]) -> str:
    return f"tokens per row: median {rows['p50']}, 90 % up to {rows['p90']}, longest {rows['p100']}"


def length_table(pairs: Iterable[TokenizedPair]) -> dict[str, dict[str, int]]:
    """Return percentiles of the token counts of prompts, responses and whole rows (prompt and longer response)."""
    import numpy as np

    pair_list = list(pairs)
    columns = {
        "prompt": [len(p.prompt) for p in pair_list],
        "chosen": [len(p.chosen) for p in pair_list if len(p.chosen)],
        "rejected": [len(p.rejected) for p in pair_list if len(p.rejected)],
        "row": [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pair_list],
    }
    return {
        name: {f"p{q}": int(np.percentile(values, q, method="higher")) for q in _PERCENTILES}
        for name, values in columns.items()
        if values
    }


_MAX_ROWS_SHOWN = 5
_SPLITS = ("train", "eval")


def describe_changes(cache: Path, before: DataReport, now: DataReport) -> list[str]:
    """Return a line for each split and source that differs; if the older files are gone, from the reports alone."""
    lines = [line for split in _SPLITS for line in _changed_rows(cache, before, now, split)]
    return lines or ["the rows are the same: the tokenizer, the template, a length or the version of prefsweep changed"]


def _changed_rows(cache: Path, before: DataReport, now: DataReport, split: str) -> list[str]:
    was, has = (r.train_rows if split == "train" else r.eval_rows for r in (before, now))
    message = f"{split}: {was:,} {'pairs' if now.labels is None else 'rows'} before, {has:,} now"
    try:
        old, new = (PairDataset.open(cache / "data" / r.fingerprint, split) for r in (before, now))
    except (OSError, ValueError):  # the cache was cleared: only the counts are known
        return [message] if was != has else []
    names = [s.name for s in now.sources if s.split == split]
    old_rows, new_rows = _index_by_row(old), _index_by_row(new)
    removed, added = sorted(old_rows.keys() - new_rows.keys()), sorted(new_rows.keys() - old_rows.keys())
    both = old_rows.keys() & new_rows.keys()
    altered = sorted(row for row in both if not _same_pair(old, old_rows[row], new, new_rows[row]))
    if not (removed or added or altered):
        return []
    parts = [
        f"{len(rows):,} {change} ({_format_rows(rows, names)})"
        for rows, change in ((altered, "altered"), (removed, "gone"), (added, "new"))
        if rows
    ]
    return [f"{message}: {', '.join(parts)}"]


def _index_by_row(pairs: PairDataset) -> dict[tuple[int, int], int]:
    return {(int(s), int(r)): i for i, (s, r) in enumerate(zip(pairs.sources, pairs.rows, strict=True))}


def _same_pair(old: PairDataset, old_index: int, new: PairDataset, new_index: int) -> bool:
    left, right = old.pair(old_index), new.pair(new_index)
    return all(
        np.array_equal(old_tokens, new_tokens)
        for old_tokens, new_tokens in (
            (left.prompt, right.prompt),
            (left.chosen, right.chosen),
            (left.rejected, right.rejected),
        )
    )


def _format_rows(rows: list[tuple[int, int]], names: list[str]) -> str:
    shown = [f"{names[s] if s < len(names) else f'source {s + 1}'} row {r}" for s, r in rows[:_MAX_ROWS_SHOWN]]
    return ", ".join(shown) + (f" and {len(rows) - _MAX_ROWS_SHOWN:,} more" if len(rows) > _MAX_ROWS_SHOWN else "")
