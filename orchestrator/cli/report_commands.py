"""Commands `report`, `suggest` and `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.options import JSON, end_orphaned_runs, find_sweep, print_json, remote_sweep, server
from orchestrator.folders import existing_sweep, runs_folder


@click.command()
@click.argument("name")
@click.option(
    "--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Write this file instead of report.html."
)
@JSON
def report(name: str, to: Path | None, as_json: bool) -> None:
    """Write an HTML report: best trial, diagnosis, next steps."""
    if remote_sweep(name) is not None and to is None and not as_json:
        raise click.UsageError("the report of a service is written here: add --output FILE, or --json")
    found = find_sweep(name).report(to).conclusions
    if as_json:
        print_json(found)
    else:
        click.echo(found["file"])
    end_orphaned_runs(name)


@click.command()
@click.argument("name")
@click.option(
    "--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Write to this new file instead of stdout."
)
def suggest(name: str, to: Path | None) -> None:
    """Write a follow-up sweep file, with a reason for each range."""
    text = find_sweep(name).suggest(to)
    if to is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"written to {to}; check it, then run: orchestrate sweep {to}", err=True)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME NAME...")
@click.option(
    "--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Also write an HTML page to this file."
)
@JSON
def compare(names: tuple[str, ...], to: Path | None, as_json: bool) -> None:
    """Compare sweeps by a common metric.

    Data, initial model and tokens are checked for equality.
    """
    if len(set(names)) < 2:
        raise click.UsageError("name at least two sweeps")
    if (service := server()) is not None:
        from orchestrator.cli.remote_commands import print_comparison as print_remote

        print_remote(service, names, to, as_json=as_json)
        return
    for name in names:
        existing_sweep(runs_folder(), name)
    from orchestrator.report_data import compare as compare_sweeps

    found = compare_sweeps(names, runs_folder(), to)
    if as_json:
        from dashboards.analysis.comparison import as_json as comparison_as_json

        print_json(comparison_as_json(found))
    else:
        from dashboards.formatting import wide_console
        from dashboards.report.comparison_page import ComparisonTable, print_comparison

        print_comparison(ComparisonTable.of(found), wide_console())
    if to is not None:
        click.echo(f"written to {to}", err=True)
