"""How many rows a data set has, where that shows without downloading or tokenising anything."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path

from trainer.config import DataConfig, FileSource, GeneratedSource, HubSource, Source


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows for training and evaluation, before any is found bad; None: unknown until downloaded."""

    train: int | None
    eval: int | None
    exact: bool
    """False where the held-out part is split off by prompt, so that its size is about this."""


def count_rows(data: DataConfig) -> Rows:
    """Count what is on this machine; hub data sets only if they were downloaded before."""
    train = _mixed(data.train)
    if data.eval is not None:
        return Rows(_at_most(train, data.max_train_rows), _at_most(_mixed(data.eval), data.max_eval_rows), exact=True)
    if train is None:
        return Rows(None, None, exact=False)
    held_out = round(train * data.eval_share)
    return Rows(_at_most(train - held_out, data.max_train_rows), _at_most(held_out, data.max_eval_rows), exact=False)


def _mixed(sources: tuple[Source, ...]) -> int | None:
    counts = [_count(source) for source in sources]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    from trainer.data.mix import shares

    return sum(shares(known, [source.weight for source in sources]))


def _at_most(count: int | None, limit: int | None) -> int | None:
    return count if count is None or limit is None else min(count, limit)


def _count(source: Source) -> int | None:
    match source:
        case GeneratedSource(rows=rows):
            return rows
        case FileSource(path=path):
            return _in_file(Path(path))
        case HubSource():
            return _cached(source)


def _in_file(path: Path) -> int | None:
    try:
        match path.suffix.lower():
            case ".jsonl":
                with path.open("rb") as file:
                    return sum(1 for line in file if line.strip())
            case ".csv":
                with path.open(encoding="utf-8", newline="") as file:
                    return max(0, sum(1 for row in csv.reader(file) if row) - 1)
            case ".json":
                return len(json.loads(path.read_bytes()))
            case ".parquet":
                from pyarrow.parquet import ParquetFile

                return ParquetFile(path).metadata.num_rows
            case _:
                return None
    except (OSError, ValueError, csv.Error, TypeError):
        # The data's own check, before the first trial, says what is wrong with the file and where.
        return None


def _cached(source: HubSource) -> int | None:
    """From what the `datasets` library left behind when it downloaded this data set."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    root = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    name = source.dataset.replace("/", "___").lower()
    for found in sorted(root.glob("*")) if root.is_dir() else []:
        if found.name.lower() != name:
            continue
        for info in sorted(found.glob("*/*/*/dataset_info.json")):
            if source.subset is not None and info.parents[2].name != source.subset:
                continue
            try:
                splits = json.loads(info.read_bytes()).get("splits") or {}
            except (OSError, ValueError):
                continue
            if source.split in splits:
                return splits[source.split].get("num_examples")
    return None
