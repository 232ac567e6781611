"""Commands `data` and `advise`: what is seen of the pairs before training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.options import JSON, SET, TRUST, print_json, read_spec
from orchestrator.errors import ExitCode
from orchestrator.folders import runs_folder
from orchestrator.terminal_streams import wrapped


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
        click.echo(wrapped(notice), err=True)
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
        click.echo(wrapped(str(preview.refused)), err=True)
        return ExitCode.USER
    return ExitCode.DONE


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@SET
@click.option("--rows", type=click.IntRange(2), metavar="N", help="Score a sample of N pairs instead of all.")
@click.option("--write", is_flag=True, help="Write the advised values into FILE; the file as it was becomes FILE.bak.")
@JSON
@TRUST
def advise(
    file: Path, overrides: Sequence[str], rows: int | None, write: bool, as_json: bool, trust_remote_code: bool
) -> None:
    """Advise on the settings of a sweep FILE before it trains.

    Scores pairs under the initial model, as the sweep does before its first trial: what one of them has computed, the
    other finds in the cache. An `sft:` stage that has not run yet is trained first.
    """
    if write and overrides:
        raise click.UsageError("--write changes FILE, which --set does not: leave out one of the two")
    from dashboards.terminal.advice_output import print_advice
    from orchestrator.commands.advice.advise_sweep import ProgressLine, advise_sweep
    from orchestrator.commands.advice.advised_file import write_advice

    spec, notices = read_spec(file, overrides, None, False)
    progress = ProgressLine()
    try:
        made = advise_sweep(
            spec, runs_folder(), rows=rows, trust_remote_code=trust_remote_code, on_progress=progress.show
        )
    finally:
        progress.close()
    for notice in (*notices, *made.notices):
        click.echo(wrapped(notice), err=True)
    done = write_advice(file, made.to_write) if write else None
    if as_json:
        written = None if done is None else {"settings": list(done.written), "refused": dict(done.refused)}
        print_json(made.as_json() | {"written": written})
    else:
        print_advice(made)
    if done is None:
        if made.to_write and not as_json:
            click.echo(f"orchestrate advise {file} --write    writes these values into the file", err=True)
        return
    for setting, reason in done.refused.items():
        click.echo(wrapped(f"{setting}: not written, set it by hand: {reason}"), err=True)
    if done.backup is None:
        click.echo(f"{file}: nothing was written", err=True)
    else:
        count = len(done.written)
        notice = f"{file}: {count} setting{'s' if count > 1 else ''} written; as it was: {done.backup}"
        click.echo(wrapped(notice), err=True)
