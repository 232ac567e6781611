"""Command `data`: shows preference rows as the model sees them."""

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
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Number of rows; default 3, with --json all rows.")
@click.option("--split", type=click.Choice(["train", "eval"]), help="Rows of one split only.")
@click.option("--row", type=click.IntRange(1), metavar="N", help="Row with this number in its source.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row on stdout, then one with the summary.")
@TRUST
def data(
    file: Path,
    overrides: Sequence[str],
    rows: int | None,
    split: str | None,
    row: int | None,
    as_json: bool,
    trust_remote_code: bool,
) -> ExitCode:
    """Show rows of FILE's data as the model sees them, with notices.

    Of each row: prompt, answers, token counts and notices. FILE is a sweep file, or a trial file as for `python -m
    trainer`. Rows with notices come first. Loads no model and needs no GPU. Exit code 2 where a sweep would be refused
    because of these rows.
    """
    from dashboards.terminal.data_output import print_data
    from orchestrator.commands.data_preview import SHOWN, chosen_rows, config_of, preview_here

    config, notices = config_of(file, overrides)
    for notice in notices:
        click.echo(notice, err=True)
    preview = preview_here(config, runs_folder(), trust_remote_code=trust_remote_code)
    count = rows if rows is not None or as_json or row is not None else SHOWN
    shown, left = chosen_rows(preview, count, split, row)
    if as_json:
        for item in (*(row.as_json() for row in shown), preview.report_json()):
            # A lone surrogate is invalid in UTF-8; JSON allows its escape sequence.
            text = json.dumps(item, ensure_ascii=False).encode("utf-8", "backslashreplace")
            click.echo(text.decode("utf-8"))
    else:
        print_data(preview, shown)
    if left:
        click.echo(f"{left} more kind{'s' if left > 1 else ''} of notices; show more rows with --rows N", err=True)
    if preview.refused is not None:
        click.echo(str(preview.refused), err=True)
        return ExitCode.USER
    return ExitCode.DONE
