"""Help, schema, plan, metrics and exit codes are those of the files in tests/golden/surface; `make golden` renews."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import sweeps
from orchestrator.cli.command_line import cli
from orchestrator.errors import ExitCode
from tests.support.surface import GOLDEN, WIDTH, compare, keys, lines, output
from trainer.metrics import METRICS

COMMANDS = sorted(cli.commands) + [
    f"{name} {inner}"
    for name, group in cli.commands.items()
    if isinstance(group, click.Group)
    for inner in sorted(group.commands)
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command(command: str, tmp_path: Path) -> None:
    file = f"help/{command.replace(' ', '-') or 'orchestrate'}.txt"
    assert compare(file, output(tmp_path, *command.split(), "--help")) == []


@pytest.mark.parametrize("module", ["trainer", "trainer.probe"])
def test_help_of_the_trainer(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": str(WIDTH)},
    )  # fmt: skip
    assert compare(f"help/{module}.txt", done.stdout) == []


def test_no_golden_help_without_its_command() -> None:
    known = {"orchestrate", "trainer", "trainer.probe", *(command.replace(" ", "-") for command in COMMANDS)}
    assert {file.stem for file in (GOLDEN / "help").glob("*.txt")} == known


def test_schema(tmp_path: Path) -> None:
    schema = json.loads(output(tmp_path, "schema"))
    assert compare("schema.json", json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n") == []


def test_keys_of_a_plan(tmp_path: Path) -> None:
    file = Path(sweeps.__file__).parent / "quickstart.yaml"
    found = json.loads(output(tmp_path, "plan", str(file), "--json", "--gpu-memory", "80"))
    assert compare("plan.txt", lines(keys(found))) == []


def test_metrics() -> None:
    assert compare("metrics.txt", lines(METRICS)) == []


def test_exit_codes() -> None:
    assert compare("exit-codes.txt", "".join(f"{code.value} {code.name}\n" for code in ExitCode)) == []
