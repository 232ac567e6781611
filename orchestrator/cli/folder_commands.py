"""Commands `list`, `logs`, `delete`, `archive`, `unarchive` and `clean`: the sweeps of the runs folder as files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from orchestrator.api import open_sweep
from orchestrator.api import unarchive as bring_back
from orchestrator.cli.options import JSON, print_json, remote_sweep, server
from orchestrator.errors import Declined
from orchestrator.folders import existing_sweep, known_sweeps, runs_folder
from orchestrator.terminal_streams import wrapped


@click.command("list")
@JSON
def list_sweeps(as_json: bool) -> None:
    """List all sweeps with state, trials, best value, age and disk."""
    show_sweeps(as_json=as_json, with_disk=True)


def show_sweeps(*, as_json: bool, with_disk: bool = False) -> None:
    """Print the table of sweeps of `list`, and of `status` without a name."""
    from dashboards.terminal.folder_output import print_sweeps
    from orchestrator.commands.runs_folder.sweep_list import list_sweeps as read_list

    found = read_list(runs_folder(), with_disk=with_disk) if (service := server()) is None else service.listed()
    if as_json:
        print_json(found)
    else:
        print_sweeps(found)


@click.command()
@click.argument("name")
@click.argument("trial", type=click.IntRange(min=0), required=False)
@click.option("-f", "--follow", is_flag=True, help="Print what is added, until the sweep or the TRIAL ends or Ctrl-C.")
@click.option("--tail", type=click.IntRange(min=0), default=200, show_default=True, help="Last lines; 0: all.")
@click.option("--attempt", type=click.IntRange(min=1), help="With TRIAL: events and traceback of this attempt.")
def logs(name: str, trial: int | None, follow: bool, tail: int, attempt: int | None) -> None:
    """Show the log of a sweep, or of one TRIAL.

    A sweep's log is its history, then the output of its driver if that runs in the background. A trial's log is its
    events, its metrics by update and the tracebacks of its attempts.
    """
    if attempt is not None and trial is None:
        raise click.UsageError("--attempt requires TRIAL")
    if (remote := remote_sweep(name)) is not None:
        from orchestrator.cli.remote_commands import print_logs

        print_logs(remote, trial, attempt, tail=tail, follow=follow)
        return
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.runs_folder.sweep_logs import SweepLog

    with SweepLog.open(name, runs_folder(), trial, attempt) as log:
        lines = log.new_lines(at_end=not follow)
        shown = lines[-tail:] if tail else lines
        if len(shown) < len(lines):
            click.echo(f"{len(lines) - len(shown)} earlier lines; `--tail 0` shows all", err=True)
        _print_lines(shown)
        for other in log.other_logs():
            click.echo(other, err=True)
        if not follow:
            return
        try:
            for added in log.followed():
                _print_lines(added)
        except KeyboardInterrupt:
            click.echo(f"{name} continues; `orchestrate stop {name}` stops it", err=True)


def _print_lines(lines: Sequence[str]) -> None:
    from orchestrator.redaction import redact

    for line in lines:
        click.echo(redact(line))
    sys.stdout.flush()


_YES = click.option("--yes", is_flag=True, help="Do not ask.")


@click.command()
@click.argument("name")
@_YES
@click.option("--keep-mlflow", is_flag=True, help="Leave its runs in MLflow.")
def delete(name: str, yes: bool, keep_mlflow: bool) -> None:
    """Delete a sweep: its folder, its study and its runs in MLflow.

    Says what that frees, and asks. Caches that sweeps share stay; `clean` removes those that no sweep needs.
    """
    from orchestrator.commands.runs_folder.sweep_deletion import finish_deletion, half_deleted

    root, remote = runs_folder(), remote_sweep(name)
    if remote is None and name in half_deleted(root):
        freed = finish_deletion(root, name)
        _log(f"the deletion of a sweep named {name} was interrupted: it is finished now ({_size(freed)})")
        if name not in known_sweeps(root):
            return

    def confirm(lines: Sequence[str]) -> None:
        for line in lines:
            _log(line)
        _confirm(f"Delete {name}?", yes=yes)

    freed = (remote or open_sweep(name)).delete(keep_mlflow=keep_mlflow, confirm=confirm)
    _log(f"{name} is deleted; {_size(freed)} freed")


@click.command()
@click.argument("name")
@click.option("--to", "url", required=True, metavar="URL", help="s3://, gs://, file:// or another fsspec URL.")
def archive(name: str, url: str) -> None:
    """Move a sweep's folder to a URL, and free its disk.

    Each file is copied and compared by its digest, then the folder is removed here. An interrupted call is continued by
    the same call. `unarchive` brings the sweep back; its runs in MLflow stay.
    """
    if (remote := remote_sweep(name)) is not None:
        remote.archive(url, log=_log)
        return
    from orchestrator.commands.runs_folder.sweep_archive import archive_sweep

    archive_sweep(name, runs_folder(), url, _log)


@click.command()
@click.argument("name")
@click.option("--from", "url", metavar="URL", help="The URL of `archive --to`; known for what was archived from here.")
def unarchive(name: str, url: str | None) -> None:
    """Bring an archived sweep back; it can be resumed as before."""
    if (service := server()) is None:
        bring_back(name, url, log=_log)
    else:
        service.unarchive(name, url, log=_log)


_CLEANED_AGE = 30.0
"""Days; the default of `clean --older-than`."""


@click.command()
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=_CLEANED_AGE,
    show_default=True,
    metavar="DAYS",
    help="Leave what was used since.",
)
@click.option(
    "--max-size",
    type=click.FloatRange(min=0),
    metavar="GB",
    help="Remove only until cache and uploads are this small, what was used longest ago first.",
)
@click.option("--yes", is_flag=True, help="Remove; without it, only show what would be removed.")
@JSON
def clean(older_than: float, max_size: float | None, yes: bool, as_json: bool) -> None:
    """Show cache and uploads that no sweep needs, or remove them.

    What a sweep that runs or can be resumed may need stays; of all sweeps that are there, archived or queued, SFT
    models and the files that were sent to the service with them.
    """
    from dashboards.terminal.folder_output import cleaning_as_json, print_cleaning
    from orchestrator.commands.runs_folder.cache_cleaning import clean as remove
    from orchestrator.commands.runs_folder.cache_cleaning import plan_cleaning

    root = runs_folder()
    cleaning = plan_cleaning(
        root, older_than=older_than * 86400, max_bytes=None if max_size is None else max_size * 1e9
    )
    if yes:
        remove(root, cleaning)
    if as_json:
        print_json(cleaning_as_json(cleaning, is_removed=yes))
    else:
        given = "" if older_than == _CLEANED_AGE else f" --older-than {older_than:g}"
        given += "" if max_size is None else f" --max-size {max_size:g}"
        print_cleaning(cleaning, is_removed=yes, root=root, command=f"orchestrate clean{given} --yes")


def _confirm(question: str, *, yes: bool) -> None:
    """Ask, unless `yes`. Raises click.UsageError where there is no terminal to ask on, Declined after a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on, and nothing was changed; add --yes")
    if not click.confirm(question, err=True):
        raise Declined


def _log(text: str) -> None:
    click.echo(wrapped(text), err=True)


def _size(count: float) -> str:
    from orchestrator.spec.estimates.disk_space import format_bytes

    return format_bytes(count)
