"""The answers to the fixed prompts as text, for people: a file that grows with each look and survives a new attempt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.evaluation.answers import Answer
from trainer.storage.durable import write_text

FILE = "samples.jsonl"
"""One JSON object per line: step, prompt, answer, expected, right."""


class Samples:
    """The first `kept` answers of each look, in `folder`/samples.jsonl."""

    def __init__(self, folder: Path, kept: int) -> None:
        self._path, self._kept = folder / FILE, kept
        self._rows: dict[int, list[dict[str, Any]]] = {}

    def take_over(self, folders: Sequence[Path], until: int) -> None:
        """What older attempts, the newest last, were answered up to update `until`, where this one goes on."""
        for folder in folders:
            path = folder / FILE
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            theirs: dict[int, list[dict[str, Any]]] = {}
            for row in map(json.loads, lines):
                theirs.setdefault(row["step"], []).append(row)
            self._rows |= {step: rows for step, rows in theirs.items() if step <= until}

    def add(self, step: int, answers: Sequence[Answer]) -> None:
        """Keep a look; the file is whole at every moment."""
        self._rows[step] = [
            {"step": step, "prompt": a.prompt, "answer": a.answer, "expected": a.expected, "right": a.right}
            for a in answers[: self._kept]
        ]
        rows = [row for _, given in sorted(self._rows.items()) for row in given]
        write_text(self._path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
