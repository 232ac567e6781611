"""Commands `list`, `logs`, `delete`, `archive`, `unarchive` and `clean`: the sweeps of the runs folder as files."""

from __future__ import annotations

import click

from orchestrator.cli.options import JSON, print_json
from orchestrator.folders import runs_folder


@click.command("list")
@JSON
def list_sweeps(as_json: bool) -> None:
    """List the sweeps of the runs folder with state, trials, best value, age and disk."""
    show_sweeps(as_json=as_json, with_disk=True)


def show_sweeps(*, as_json: bool, with_disk: bool = False) -> None:
    """Print the table of sweeps of `list`, and of `status` without a name."""
    from dashboards.terminal.folder_output import print_sweeps
    from orchestrator.commands.runs_folder.sweep_list import list_sweeps as read_list

    found = read_list(runs_folder(), with_disk=with_disk)
    if as_json:
        print_json(found)
    else:
        print_sweeps(found)
