"""Commands `report`, `suggest` and `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.options import JSON, print_json
from orchestrator.folders import existing_sweep, runs_folder


@click.command()
@click.argument("name")
@click.option("--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Another file than report.html.")
@JSON
def report(name: str, to: Path | None, as_json: bool) -> None:
    """One page to read and to send: the answer, how sure it is, what is wrong, what to try next."""
    existing_sweep(runs_folder(), name)
    from orchestrator.cli.report_data import report as make

    found = make(name, runs_folder(), to)
    if as_json:
        print_json(found)
    else:
        click.echo(found["file"])


@click.command()
@click.argument("name")
@click.option("--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Write it into this new file.")
def suggest(name: str, to: Path | None) -> None:
    """A follow-up sweep that acts on the diagnosis, each range with its reason."""
    existing_sweep(runs_folder(), name)
    from orchestrator.cli.report_data import suggest as make

    text = make(name, runs_folder(), to)
    if to is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"written to {to}; look at it, then: orchestrate sweep {to}", err=True)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME NAME...")
@click.option("--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Also as an HTML page, here.")
@JSON
def compare(names: tuple[str, ...], to: Path | None, as_json: bool) -> None:
    """Sweeps side by side by one ruler, and whether data, start model and tokens are matched."""
    if len(set(names)) < 2:
        raise click.UsageError("give two sweeps or more")
    for name in names:
        existing_sweep(runs_folder(), name)
    from orchestrator.cli.report_data import compare as side_by_side

    found = side_by_side(names, runs_folder(), to)
    if as_json:
        from dashboards.analysis.comparison import as_json as comparison_as_json

        print_json(comparison_as_json(found))
    else:
        from dashboards.report.comparison_page import print_comparison
        from dashboards.terminal.progress_views import wide_console

        print_comparison(found, wide_console())
    if to is not None:
        click.echo(f"written to {to}", err=True)
