"""doctor, schema: what needs no sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.shared import JSON, SET, print_json, read_spec
from orchestrator.errors import ExitCode
from orchestrator.folders import home


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@SET
@JSON
def doctor(file: Path | None, sets: Sequence[str], as_json: bool) -> ExitCode:
    """What this machine offers, what is missing, and the fix for each.

    With a sweep's FILE: also whether its models, data sets, tracking server and database can be reached.
    """
    from orchestrator.commands.doctor import examine, healthy
    from orchestrator.commands.printing import print_checks

    spec = None if file is None else read_spec(file, sets, None, False)[0]
    checks = examine(home(), spec)
    if as_json:
        print_json({"healthy": healthy(checks), "checks": [check.as_json() for check in checks]})
    else:
        print_checks(checks)
    return ExitCode.DONE if healthy(checks) else ExitCode.USER


@click.command()
def schema() -> None:
    """The JSON Schema of a sweep's file, for editors."""
    from orchestrator.spec.schema import schema as made

    print_json(made())
