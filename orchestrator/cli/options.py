"""Options shared by several commands, loading of the sweep file, JSON output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.api import RemoteSweep, Server, SweepHandle, load, open_sweep
from orchestrator.errors import ExitCode
from orchestrator.folders import existing_sweep, runs_folder
from orchestrator.terminal_streams import encodes_unicode, wrapped

if TYPE_CHECKING:
    from orchestrator.execution.remote_cluster import ClusterAddress
    from orchestrator.folders import SweepFolder
    from orchestrator.spec.sweep_spec import SweepSpec

F = TypeVar("F", bound=Callable[..., Any])


def set_option(example: str) -> Callable[[F], F]:
    """Return the option `--set`, with an example that the command accepts."""
    return click.option(
        "--set", "overrides", multiple=True, metavar="PATH=VALUE", help=f"Override one setting: {example}"
    )


SET = set_option("loss.beta=2.5")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
TRUST = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code of the model's repository. Never taken from a file."
)


DETACH = click.option("--detach", is_flag=True, help="Run in the background, also after the terminal closes.")


NO_WAIT = click.option("--no-wait", is_flag=True, help="Refuse at once where other sweeps have the GPUs.")


def run_detached(folder: SweepFolder) -> ExitCode:
    """Run the current command without `--detach` in the background; return its exit code if it ends at once."""
    from orchestrator.commands.detached_driver import start_detached

    name = folder.name
    driver = start_detached(
        folder, _command_line(click.get_current_context()), lambda text: click.echo(text, nl=False, err=True)
    )
    if driver.code is not None:
        return ExitCode(driver.code)
    if driver.waiting:
        click.echo(
            f"{driver.waiting}\n{name} waits in the background (process {driver.pid}, output in {driver.log})\n"
            f"  orchestrate status {name}    says for whom\n"
            f"  kill {driver.pid}    ends the waiting; `orchestrate resume {name}` takes it up again",
            err=True,
        )
        return ExitCode.DONE
    started = f"{name} runs in the background (process {driver.pid}, output in {driver.log})"
    click.echo(
        f"{wrapped(started)}\n"
        f"  orchestrate attach {name}    its table; Ctrl-C there leaves it running\n"
        f"  orchestrate stop {name}      stops it with checkpoints",
        err=True,
    )
    return ExitCode.DONE


def _command_line(context: click.Context) -> list[str]:
    """Return the command with its options, without `--detach`."""
    options, arguments = [context.info_name or ""], ["--"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if isinstance(parameter, click.Argument):
            arguments += map(str, value if isinstance(value, (list, tuple)) else [value])
        elif isinstance(value, bool):
            options += [parameter.opts[0]] if value and parameter.opts[0] != "--detach" else []
        elif value is not None:
            options += [f"{parameter.opts[0]}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return options + arguments


def cluster_options(command: F) -> F:
    """Add `--address` and `--machines`: an existing Ray cluster instead of this machine."""
    address = click.option(
        "--address", metavar="HOST:PORT", help="Run on this existing Ray cluster; auto: the one on this machine."
    )
    machines = click.option(
        "--machines", type=click.IntRange(1), default=1, help="With --address: wait for this many machines."
    )
    return address(machines(command))


def cluster_address(address: str | None, machines: int) -> ClusterAddress | None:
    """Return the cluster of `--address` and `--machines`; None without `--address`."""
    from orchestrator.execution.remote_cluster import ClusterAddress

    if address is None and machines != 1:
        raise click.UsageError("--machines requires --address")
    return None if address is None else ClusterAddress(address, machines)


def spec_options(command: F) -> F:
    """Add the sweep file argument and the options that override it."""
    file = click.argument("file", type=click.Path(path_type=Path))
    name = click.option("--name", help="Name of the sweep instead of the file's.")
    rehearse = click.option(
        "--rehearse", is_flag=True, help="Run a small copy: tiny random model, few rows, steps and trials."
    )
    return file(SET(name(rehearse(command))))


def read_spec(
    file: Path, overrides: Sequence[str], name: str | None, rehearse: bool
) -> tuple[SweepSpec, tuple[str, ...]]:
    """Load the sweep file with overrides.

    Returns:
        The spec and notices about its loading.

    Raises:
        SpecError: with all errors of the file.
    """
    read = load(file, overrides, name=name, rehearse=rehearse)
    return read.spec, read.notices


def server() -> Server | None:
    """Return the service of `--server` or $ORCHESTRATE_SERVER; None for the sweeps of this machine."""
    url = click.get_current_context().find_root().obj
    return None if url is None else Server(url)


def remote_sweep(name: str) -> RemoteSweep | None:
    """Return the service's sweep of this name, not asked for yet; None for the sweeps of this machine."""
    service = server()
    return None if service is None else RemoteSweep(service.client, name)


def find_sweep(name: str) -> SweepHandle:
    """Return a sweep of the service, or of this machine. Raises NoSuchSweep for one that this machine lacks."""
    return remote_sweep(name) or open_sweep(name)


def end_orphaned_runs(name: str) -> None:
    """End the runs in MLflow of a sweep whose driver was killed; a command that looks at it calls this at its end."""
    if click.get_current_context().find_root().obj is not None:
        return
    from orchestrator.interfaces import SWEEP_RUN
    from orchestrator.tracking.deferred_messages import is_run_open

    if is_run_open(existing_sweep(runs_folder(), name).outbox, SWEEP_RUN):
        from orchestrator.api import driving

        driving.end_orphaned_runs(name, runs_folder(), lambda text: click.echo(text, err=True))


def print_json(value: Any) -> None:
    """Print JSON on stdout; NaN and infinities become null."""
    is_ascii = not encodes_unicode(sys.stdout)  # a replacement character would change a value
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=is_ascii, allow_nan=False))


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value
