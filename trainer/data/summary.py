"""What was prepared, for people and for tracking: JSON-serialisable."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.data.check import Finding
from trainer.data.pairs import Tokenised
from trainer.frozen import Frozen

_PERCENTILES = (50, 90, 99, 100)


class SourceRows(Frozen):
    """Rows of one source: read, drawn for a split (by weights and row limits), and kept after the checks."""

    name: str
    split: str
    read: int
    drawn: int
    kept: int


class DataReport(Frozen):
    """Findings, counts and lengths. Lengths are tokens per row at percentiles 50, 90, 99 and 100 (`p50`...)."""

    fingerprint: str
    train_rows: int
    eval_rows: int
    bad_rows: int
    dropped_rows: int
    sources: tuple[SourceRows, ...]
    findings: tuple[Finding, ...]
    lengths: dict[str, dict[str, int]]
    eval_held_out: bool
    """Whether evaluation was split off from training rows, by prompt."""


def length_table(pairs: Iterable[Tokenised]) -> dict[str, dict[str, int]]:
    """Percentiles of tokens of prompts, responses and whole rows (prompt and longer response)."""
    import numpy as np

    kept = list(pairs)
    columns = {
        "prompt": [len(p.prompt) for p in kept],
        "chosen": [len(p.chosen) for p in kept],
        "rejected": [len(p.rejected) for p in kept],
        "row": [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in kept],
    }
    return {
        name: {f"p{q}": int(np.percentile(values, q, method="higher")) for q in _PERCENTILES}
        for name, values in columns.items()
        if values
    }
