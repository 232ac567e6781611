"""status, history, best, ui."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.shared import JSON, print_json
from orchestrator.errors import ExitCode
from orchestrator.folders import existing, home


@click.command()
@click.argument("name")
@JSON
@click.option("--watch", is_flag=True, help="Stay and follow it.")
def status(name: str, as_json: bool, watch: bool) -> None:
    """Where a sweep stands."""
    existing(home(), name)
    from orchestrator import sweep as room
    from orchestrator.commands.printing import print_status

    if watch:
        room.watch(name, home())
        return
    found = room.status(name, home())
    if as_json:
        print_json(found)
    else:
        print_status(found)


@click.command()
@click.argument("name")
@JSON
def history(name: str, as_json: bool) -> None:
    """What happened to a sweep, in order, with times and reasons; and how its spec changed."""
    existing(home(), name)
    from orchestrator.commands.history import history as told
    from orchestrator.commands.printing import print_history

    found = told(name, home())
    if as_json:
        print_json(found)
    else:
        print_history(found)


@click.command()
@click.argument("name")
@JSON
@click.option("--export", "to", type=click.Path(path_type=Path), help="Write the winner as a model folder.")
@click.option("--merge", is_flag=True, help="With --export: fold LoRA adapters into the weights.")
def best(name: str, as_json: bool, to: Path | None, merge: bool) -> None:
    """The best configuration so far, and its model."""
    if merge and to is None:
        raise click.UsageError("--merge goes with --export DIR")
    existing(home(), name)
    from orchestrator import sweep as room
    from orchestrator.commands.printing import print_best

    found = room.best(name, home())
    if to is not None:
        found = {**found, "exported": str(room.export(name, home(), to, merge))}
    if as_json:
        print_json(found)
    else:
        print_best(found)


@click.command()
@click.argument("name", required=False)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--open/--no-open", "open_browser", default=False, help="Open a browser.")
def ui(name: str | None, port: int, open_browser: bool) -> ExitCode:
    """The MLflow pages, on this machine only; of one sweep if named."""
    if name is not None:
        existing(home(), name)
    from orchestrator.sweep import ui as show

    return show(name, home(), port, open_browser=open_browser)
