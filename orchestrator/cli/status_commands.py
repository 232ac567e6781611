"""Commands `status`, `attach`, `history`, `best` and `ui`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.api import Sweep, open_sweep
from orchestrator.cli.folder_commands import show_sweeps
from orchestrator.cli.options import JSON, TRUST, end_orphaned_runs, find_sweep, print_json, remote_sweep
from orchestrator.cli.remote_commands import follow_sweep
from orchestrator.cli.remote_commands import print_status as print_remote_status
from orchestrator.errors import ExitCode
from orchestrator.folders import existing_sweep, known_sweeps, runs_folder
from orchestrator.terminal_streams import wrapped


@click.command()
@click.argument("name", required=False)
@JSON
@click.option("--watch", is_flag=True, help="Show live progress until the sweep ends.")
def status(name: str | None, as_json: bool, watch: bool) -> None:
    """Show the state of a sweep and its trials.

    Without NAME: list the sweeps of the runs folder.
    """
    if name is None:
        if watch:
            raise click.UsageError("--watch requires NAME")
        show_sweeps(as_json=as_json)
        return
    remote = remote_sweep(name)
    sweep = remote or open_sweep(name)
    if watch:
        from orchestrator.cli.sweep_summary import watch_sweep

        if remote is not None:
            follow_sweep(remote)
            return
        watch_sweep(name, runs_folder())
        end_orphaned_runs(name)
        return
    found = sweep.status()
    if as_json:
        print_json(found)
    elif remote is not None:
        print_remote_status(found)
    else:
        from dashboards.terminal.command_output import print_status

        print_status(found)
    end_orphaned_runs(name)


@click.command()
@click.argument("name")
def attach(name: str) -> None:
    """Show the live table of a sweep that runs in the background. Ctrl-C leaves the sweep running."""
    if (remote := remote_sweep(name)) is not None:
        follow_sweep(remote)
        return
    existing_sweep(runs_folder(), name)
    from orchestrator.cli.sweep_summary import watch_sweep

    try:
        watch_sweep(name, runs_folder())
    except KeyboardInterrupt:
        click.echo(
            f"{name} continues; `orchestrate attach {name}` shows it again, `orchestrate stop {name}` stops it",
            err=True,
        )


@click.command()
@click.argument("name")
@JSON
def history(name: str, as_json: bool) -> None:
    """List the events of a sweep and the changes of its spec.

    Events have times and reasons. What people and the service did with the sweep in a service's queue is among them.
    """
    remote = remote_sweep(name)
    if remote is None:
        from orchestrator.commands.status import history as read_history  # also of a sweep that only waits in the queue

        found = read_history(name, runs_folder())
    else:
        found = remote.history()
    if as_json:
        print_json(found)
    else:
        from dashboards.terminal.command_output import print_history

        print_history(found)
    if name in known_sweeps(runs_folder()):
        end_orphaned_runs(name)


@click.command()
@click.argument("name")
@JSON
@click.option("--export", "to", type=click.Path(path_type=Path), help="Write the best trial's model to this folder.")
@click.option("--metrics", "all_metrics", is_flag=True, help="Show all metrics, beside the initial model's.")
@click.option("--merge", is_flag=True, help="With --export: merge LoRA adapters into the weights.")
@click.option(
    "--compare/--no-compare",
    default=True,
    help="With --export: load the model with plain transformers and compare its log-probs with the trial's (default).",
)
@TRUST
def best(
    name: str,
    as_json: bool,
    to: Path | None,
    all_metrics: bool,
    merge: bool,
    compare: bool,
    trust_remote_code: bool,
) -> None:
    """Show the best configuration so far; export its model."""
    if to is None and (merge or trust_remote_code or not compare):
        flag = "--merge" if merge else "--trust-remote-code" if trust_remote_code else "--no-compare"
        raise click.UsageError(f"{flag} requires --export DIR")
    sweep = find_sweep(name)
    if to is not None and not isinstance(sweep, Sweep):
        raise click.UsageError("--export: on this machine only, not with --server")
    found = sweep.best()
    reasons = found.pop("do_not_use")
    if to is not None and isinstance(sweep, Sweep):
        exported = sweep.export(to, merge=merge, compare=compare, trust_remote_code=trust_remote_code, log=_log)
        found |= {"exported": str(exported)}
    if as_json:
        print_json(found | {"do_not_use": reasons})
        return
    from dashboards.terminal.command_output import print_best

    print_best(found, metrics=all_metrics)
    if reasons:
        text = f"Do not use trial {found['number']} yet: {'; '.join(reasons)}."
        _log(f"{text}\n`orchestrate report {name}` has the evidence and the next steps.")
    end_orphaned_runs(name)


def _log(text: str) -> None:
    click.echo(wrapped(text), err=True)


@click.command()
@click.argument("name", required=False)
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True, help="0: any free one.")
@click.option("--open/--no-open", "open_browser", default=False, help="Open a browser.")
def ui(name: str | None, port: int, open_browser: bool) -> ExitCode:
    """Serve the MLflow UI on this machine only.

    With NAME: print the URL of that sweep.
    """
    if (service := click.get_current_context().find_root().obj) is not None:
        text = f"the runs of {runs_folder()}; those of the service's sweeps are at {service.rstrip('/')}/mlflow/"
        click.echo(wrapped(text), err=True)
    if name is not None:
        existing_sweep(runs_folder(), name)
        end_orphaned_runs(name)
    from orchestrator.cli.composition import serve_ui

    return serve_ui(name, runs_folder(), port, open_browser=open_browser)
