"""doctor, schema: what needs no sweep."""

from __future__ import annotations

import click

from orchestrator.cli.shared import JSON, print_json
from orchestrator.errors import ExitCode
from orchestrator.folders import home


@click.command()
@JSON
def doctor(as_json: bool) -> ExitCode:
    """What this machine offers, what is missing, and the fix for each."""
    from orchestrator.commands.doctor import examine, healthy
    from orchestrator.commands.printing import print_checks

    checks = examine(home())
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
