"""Whether held-out rows say their right answer, as far as that shows without reading the data."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from trainer.config import DataConfig, FileSource, GeneratedSource, HubSource, Source

ANSWER = "answer"


def eval_rows_have_answers(data: DataConfig) -> bool:
    """False only where a source certainly has no answers."""
    return any(_may_have(source) for source in (data.eval or data.train))


def _may_have(source: Source) -> bool:
    match source:
        case GeneratedSource():
            return True
        case HubSource(columns=columns):
            return ANSWER in columns or not columns
        case FileSource(path=path, columns=columns):
            first = _first_row(Path(path))
            return first is None or columns.get(ANSWER, ANSWER) in first


def _first_row(path: Path) -> set[str] | None:
    """The first row's columns; None where that takes more than a glance, or the row cannot be read here."""
    try:
        with path.open(encoding="utf-8") as file:
            match path.suffix.lower():
                case ".jsonl":
                    row = json.loads(next((line for line in file if line.strip()), "null"))
                    return set(row) if isinstance(row, dict) else None
                case ".csv":
                    return set(next(csv.reader(file), []))
                case _:
                    return None
    except (OSError, ValueError, csv.Error):
        # The data's own check says what is wrong with the file.
        return None
