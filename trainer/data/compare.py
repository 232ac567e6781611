"""Two preparations of what should be the same data: which rows differ, in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.pairs import PairSet
from trainer.data.summary import DataReport

_SHOWN = 5
_SPLITS = ("train", "eval")


def changes(cache: Path, before: DataReport, now: DataReport) -> list[str]:
    """A line for each split and source that differs; where the older preparation is gone, what the reports tell."""
    lines = [line for split in _SPLITS for line in _changed_rows(cache, before, now, split)]
    return lines or ["the rows are the same: the tokenizer, the template, a length or the version of prefsweep changed"]


def _changed_rows(cache: Path, before: DataReport, now: DataReport, split: str) -> list[str]:
    was, has = (r.train_rows if split == "train" else r.eval_rows for r in (before, now))
    told = f"{split}: {was:,} pairs before, {has:,} now"
    try:
        old, new = (PairSet.open(cache / "data" / r.fingerprint, split) for r in (before, now))
    except (OSError, ValueError):  # the cache was cleared: the counts have to do
        return [told] if was != has else []
    names = [s.name for s in now.sources if s.split == split]
    theirs, ours = _by_row(old), _by_row(new)
    lost, added = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    altered = sorted(row for row in theirs.keys() & ours.keys() if not _equal(old, theirs[row], new, ours[row]))
    if not (lost or added or altered):
        return []
    parts = [
        f"{len(rows):,} {what} ({_listed(rows, names)})"
        for rows, what in ((altered, "altered"), (lost, "gone"), (added, "new"))
        if rows
    ]
    return [f"{told}: {', '.join(parts)}"]


def _by_row(pairs: PairSet) -> dict[tuple[int, int], int]:
    return {(int(s), int(r)): i for i, (s, r) in enumerate(zip(pairs.sources, pairs.rows, strict=True))}


def _equal(old: PairSet, i: int, new: PairSet, j: int) -> bool:
    left, right = old.pair(i), new.pair(j)
    return all(
        np.array_equal(a, b)
        for a, b in ((left.prompt, right.prompt), (left.chosen, right.chosen), (left.rejected, right.rejected))
    )


def _listed(rows: list[tuple[int, int]], names: list[str]) -> str:
    shown = [f"{names[s] if s < len(names) else f'source {s + 1}'} row {r}" for s, r in rows[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else "")
