"""Command `data`: rows as the model will see them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.options import SET, TRUST
from orchestrator.errors import ExitCode
from orchestrator.folders import runs_folder


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@SET
@click.option("--rows", type=click.IntRange(1), metavar="N", help="How many; by default 3, with --json all of them.")
@click.option("--split", type=click.Choice(["train", "eval"]), help="Of one split alone.")
@click.option("--row", type=click.IntRange(1), metavar="N", help="The row of this number in its source.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row on stdout, then one of the whole.")
@TRUST
def data(
    file: Path,
    sets: Sequence[str],
    rows: int | None,
    split: str | None,
    row: int | None,
    as_json: bool,
    trust_remote_code: bool,
) -> ExitCode:
    """What the model will see of FILE's data: rows with prompt and answers, tokens, and what was noticed.

    FILE is a sweep's, or a trial's as for `python -m trainer`. Rows that have something to notice come first. Trains
    nothing, loads no model and needs no GPU. Exit code 2 where a sweep would be refused for these rows.
    """
    from dashboards.terminal.data_output import print_data
    from orchestrator.commands.data_preview import SHOWN, chosen_rows, config_of, preview_here

    config, notices = config_of(file, sets)
    for notice in notices:
        click.echo(notice, err=True)
    made = preview_here(config, runs_folder(), trust_remote_code=trust_remote_code)
    count = rows if rows is not None or as_json or row is not None else SHOWN
    shown, left = chosen_rows(made, count, split, row)
    if as_json:
        for each in (*(row.as_json() for row in shown), made.report_json()):
            # a lone surrogate, which is no UTF-8, becomes its escape in JSON
            text = json.dumps(each, ensure_ascii=False).encode("utf-8", "backslashreplace")
            click.echo(text.decode("utf-8"))
    else:
        print_data(made, shown)
    if left:
        click.echo(f"{left} more kind{'s' if left > 1 else ''} of notices; --rows N shows more rows", err=True)
    if made.refused is not None:
        click.echo(str(made.refused), err=True)
        return ExitCode.USER
    return ExitCode.DONE
