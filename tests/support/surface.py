"""What users see and a redesign must not change, as text to be compared with the files in tests/golden/surface.

`make golden` writes them anew.
"""

import difflib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from orchestrator.cli.command_line import cli

GOLDEN = Path(__file__).parents[1] / "golden" / "surface"
WIDTH = 100
"""Columns of a terminal."""
_NAMES = re.compile(r"[0-9a-f]{16,}")
_THIS_MACHINE = re.compile(r"mlflow\.(source\.|user$)|git\.")
"""Tags that only some machines give."""


def compare(name: str, found: str) -> list[str]:
    """The lines in which `found` differs from the golden file of this name: none where nothing has changed."""
    golden = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(found, encoding="utf-8")
    if not golden.is_file():
        return [f"there is no golden file {name}; write it with `make golden`"]
    expected, now = golden.read_text(encoding="utf-8").splitlines(), found.splitlines()
    return list(difflib.unified_diff(expected, now, name, "found; if that is meant, `make golden`", lineterm=""))


def output(root: Path, *arguments: str) -> str:
    """The stdout of a command over this runs folder, at a fixed width."""
    environment = {"ORCHESTRATE_HOME": str(root), "COLUMNS": str(WIDTH), "MLFLOW_TRACKING_URI": None}
    done = CliRunner().invoke(
        cli, list(arguments), prog_name="orchestrate", env=environment, terminal_width=WIDTH, catch_exceptions=False
    )
    return done.stdout


def lines(found: Iterable[str]) -> str:
    """Sorted, each once."""
    return "".join(f"{line}\n" for line in sorted(set(found)))


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all keys; items of lists under `[]`. What is named by the user is cut off by the caller."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            where = f"{path}.{name}" if path else str(name)
            yield where
            yield from keys(inner, where)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner, f"{path}[]")


def tables(database: Path) -> str:
    """`table.column type` of an SQLite database."""
    connection = sqlite3.connect(database)
    names = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
    found = [
        f"{name}.{column} {kind}"
        for name in names
        if not name.startswith("sqlite_")
        for _, column, kind, *_ in connection.execute(f"pragma table_info({name})")
    ]
    connection.close()
    return lines(found)


def mlflow_names(database: Path) -> str:
    """`kind of run: param, metric or tag NAME`, of the sweep's run, its stages' and its trials'."""
    connection = sqlite3.connect(database)
    runs = dict(connection.execute("select run_uuid, value from tags where key = 'prefsweep.run'"))
    found: list[str] = []
    for table, what in (("params", "param"), ("latest_metrics", "metric"), ("tags", "tag")):
        for run, name in connection.execute(f"select run_uuid, key from {table}"):
            kind = "trial" if runs[run].isdigit() else runs[run]
            if not _THIS_MACHINE.match(name):
                found.append(f"{kind}: {what} {name}")
    connection.close()
    return lines(found)


def layout(folder: Path) -> str:
    """Files under a sweep's folder, with `<n>` for numbers and `<id>` for digests; Ray's own are left out."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return lines(_plain(path) for path in found if path.parts[0] != "ray")


def _plain(path: Path) -> str:
    return "/".join("<n>" if part.isdigit() else _NAMES.sub("<id>", part) for part in path.parts)


def compare_sweep(root: Path, name: str) -> list[str]:
    """What differs on the surface of a finished sweep, which has an SFT stage and was interrupted once."""
    folder = root / name
    logged = json.loads(output(root, "history", name, "--json"))
    surface = {
        "tables.txt": tables(folder / "study.db"),
        "mlflow.txt": mlflow_names(root / "mlflow.db"),
        "layout.txt": layout(folder),
        "history.txt": lines([*(f"event {event['kind']}" for event in logged["events"]), *keys(logged)]),
        "status.txt": lines(keys(json.loads(output(root, "status", name, "--json")))),
        "best.txt": lines(keys(json.loads(output(root, "best", name, "--json")))),
    }
    return [line for file, found in surface.items() for line in compare(file, found)]
