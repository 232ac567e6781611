"""`python -m tests.end_to_end.rehearse_all`: every shipped sweep in small, by the command a user types; green or not.

Each must exit with 0 and leave every trial COMPLETE, or PRUNED by its own pruner with a reason. `--write` puts the
table into docs/rehearsals.md; of named files, the rows of the others stay.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import sweeps

SHIPPED = sorted(Path(sweeps.__file__).parent.glob("*.yaml"))
PAGE = Path(__file__).parents[2] / "docs" / "rehearsals.md"
_HEAD = ("file", "trials", "ended", "best by", "s", "result")
_GREEN = "green"
_LIMIT = 1200.0


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one file."""

    file: str
    trials: int
    ended: str
    goal: str
    seconds: float
    verdict: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        return (self.file, str(self.trials), self.ended, self.goal, f"{self.seconds:.0f}", self.verdict)


def rehearse(file: Path, home: Path) -> Row:
    """Run it, then ask `status` how it ended."""
    began = time.monotonic()
    code, _, messages = _orchestrate(home, "sweep", str(file), "--rehearse")
    took, shown = time.monotonic() - began, ""
    if code == 0:
        code, shown, messages = _orchestrate(home, "status", f"{file.stem}-rehearsal", "--json")
    if code != 0:
        last = next((line for line in reversed(messages.splitlines()) if line.strip()), "it said nothing")
        return Row(file.name, 0, "", "", took, f"exit {code}: {last.strip()}")
    status: dict[str, Any] = json.loads(shown)
    states = Counter(str(trial["state"]) for trial in status["trials"])
    wrong = [str(t["number"]) for t in status["trials"] if not _well(t)]
    best = status["best"] is not None
    decision = f"trials {', '.join(wrong)} did not end well" if wrong else _GREEN if best else "no best trial"
    ended = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))
    return Row(file.name, states.total(), ended, str(status["goal"]["metric"]), took, decision)


def _well(trial: dict[str, Any]) -> bool:
    return trial["state"] == "COMPLETE" or (trial["state"] == "PRUNED" and bool(trial["reason"]))


def _orchestrate(home: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, data, talk."""
    env = os.environ | {"ORCHESTRATE_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "orchestrator.cli", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_LIMIT, check=False)
    return done.returncode, done.stdout, done.stderr


def written_rows() -> list[Row]:
    """The rows of docs/rehearsals.md."""
    cells = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    return [
        Row(file.strip("`"), int(trials), ended, goal, float(seconds), verdict)
        for file, trials, ended, goal, seconds, verdict in (row for row in cells if row[0].endswith(".yaml`"))
    ]


def page(rows: Sequence[Row]) -> str:
    """docs/rehearsals.md with these rows, and of other files the rows that it has."""
    latest = {row.file: row for row in (*written_rows(), *rows)}
    rows = [latest[file.name] for file in SHIPPED if file.name in latest]
    green = sum(row.verdict == _GREEN for row in rows)
    missing = [f"`{file.name}`" for file in SHIPPED if file.name not in latest]
    lines = [
        "# Every sweep, rehearsed",
        "",
        f"The last run of each file by `make rehearse`: {green} of {len(rows)} green. Each file of `sweeps/` runs as",
        "`orchestrate sweep FILE --rehearse`, offline: a tiny random model of its architecture, rows of the",
        "quickstart's generator, four updates, the corners of its search. It shows that a file runs, not what its",
        "numbers are worth.",
        "",
        f"| {' | '.join(_HEAD)} |",
        "|---|---:|---|---|---:|---|",
        *(f"| {' | '.join([f'`{row.file}`', *row.cells[1:]])} |" for row in rows),
        "",
        *([f"Not run yet: {', '.join(missing)}.", ""] if missing else []),
        "s: seconds, starting Python, Ray and the workers included, on two cores.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """All of them, or those named; 0 when all are green."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="by default every file in sweeps/")
    parser.add_argument("--write", action="store_true", help="keep the table in docs/rehearsals.md")
    requested = parser.parse_args(arguments)
    files: list[Path] = requested.files or SHIPPED
    console = Console()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as path, console.status("") as shown:
        for number, file in enumerate(files, start=1):
            shown.update(f"{number} of {len(files)}: {file.name}")
            rows.append(rehearse(file, Path(path)))
            console.print(*rows[-1].cells, sep="  ", soft_wrap=True)
    table = Table(*_HEAD, title="Rehearsals")
    for row in rows:
        table.add_row(*row.cells, style=None if row.verdict == _GREEN else "red")
    console.print(table)
    if requested.write:
        PAGE.write_text(page(rows), encoding="utf-8")
    return 0 if all(row.verdict == _GREEN for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
