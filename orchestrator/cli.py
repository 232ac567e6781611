"""The commands: parse, call, exit code. What they do is elsewhere and imported late, so that `--help` is quick."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.folders import existing, fresh, home
from trainer.errors import TrialError

if TYPE_CHECKING:
    from orchestrator.spec.sweep import SweepSpec

F = TypeVar("F", bound=Callable[..., Any])

_SET = click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Replace one leaf: loss.beta=2.5")
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
_TRUST = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the model. Never taken from a file."
)


def _spec_options(command: F) -> F:
    file = click.argument("file", type=click.Path(path_type=Path))
    name = click.option("--name", help="Another name than the file's.")
    rehearse = click.option("--rehearse", is_flag=True, help="Tiny random model, few rows, few steps, few trials.")
    return file(_SET(name(rehearse(command))))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="prefsweep", prog_name="orchestrate")
def cli() -> None:
    """Hyperparameter sweeps for preference tuning of language models.

    Everything is written under ./runs, or under $ORCHESTRATE_HOME.
    """


@cli.command()
@_spec_options
@_JSON
def plan(file: Path, sets: Sequence[str], name: str | None, rehearse: bool, as_json: bool) -> None:
    """What a sweep would do: trials, corners, steps, tokens, files. Starts nothing."""
    from orchestrator.commands.planning import plan_here
    from orchestrator.commands.printing import print_plan

    spec, notices = _read(file, sets, name, rehearse)
    made = plan_here(spec, home(), notices)
    if as_json:
        _data(made.as_json())
    else:
        print_plan(made)


@cli.command()
@_spec_options
@_TRUST
def sweep(file: Path, sets: Sequence[str], name: str | None, rehearse: bool, trust_remote_code: bool) -> ExitCode:
    """Run a sweep. Ctrl-C once: checkpoint and stop; twice: now."""
    spec, notices = _read(file, sets, name, rehearse)
    fresh(home(), spec.name)
    from orchestrator.sweep import start

    for notice in notices:
        click.echo(notice, err=True)
    return start(spec, home(), trust_remote_code=trust_remote_code)


@cli.command()
@click.argument("name")
@_SET
@_TRUST
def resume(name: str, sets: Sequence[str], trust_remote_code: bool) -> ExitCode:
    """Go on with a sweep that was stopped or killed."""
    existing(home(), name)
    from orchestrator.sweep import resume as go_on

    return go_on(name, home(), sets, trust_remote_code=trust_remote_code)


@cli.command()
@click.argument("name")
@_JSON
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
        _data(found)
    else:
        print_status(found)


@cli.command()
@click.argument("name")
@click.argument("trial", type=int, required=False)
def stop(name: str, trial: int | None) -> None:
    """Stop a running sweep, or one TRIAL of it; it can be resumed."""
    existing(home(), name)
    from orchestrator.sweep import stop as ask_to_stop

    ask_to_stop(name, home(), trial)
    what = f"trial {trial} of {name}" if trial is not None else name
    click.echo(f"asked {what} to stop", err=True)


@cli.command()
@click.argument("name")
@_JSON
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
        _data(found)
    else:
        print_best(found)


@cli.command()
@click.argument("name", required=False)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@click.option("--open/--no-open", "open_browser", default=False, help="Open a browser.")
def ui(name: str | None, port: int, open_browser: bool) -> ExitCode:
    """The MLflow pages, on this machine only; of one sweep if named."""
    if name is not None:
        existing(home(), name)
    from orchestrator.sweep import ui as show

    return show(name, home(), port, open_browser=open_browser)


@cli.command()
@_JSON
def doctor(as_json: bool) -> ExitCode:
    """What this machine offers, what is missing, and the fix for each."""
    from orchestrator.commands.doctor import examine, healthy
    from orchestrator.commands.printing import print_checks

    checks = examine(home())
    if as_json:
        _data({"healthy": healthy(checks), "checks": [check.as_json() for check in checks]})
    else:
        print_checks(checks)
    return ExitCode.DONE if healthy(checks) else ExitCode.USER


@cli.command()
def schema() -> None:
    """The JSON Schema of a sweep's file, for editors."""
    from orchestrator.spec.schema import schema as made

    _data(made())


def _read(file: Path, sets: Sequence[str], name: str | None, rehearse: bool) -> tuple[SweepSpec, tuple[str, ...]]:
    from orchestrator.spec.load import read

    loaded = read(file, sets, name=name)
    if not rehearse:
        return loaded.spec, loaded.notices
    from orchestrator.commands.rehearse import rehearse as small

    rehearsal = small(loaded.spec, home())
    return rehearsal.spec, (*loaded.notices, *rehearsal.notices)


def _data(value: Any) -> None:
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; every ending is an exit code, and a user's mistake is a sentence, not a traceback."""
    try:
        code = cli.main(arguments, prog_name="orchestrate", standalone_mode=False)
        return int(code or ExitCode.DONE)
    except OrchestrateError as error:
        click.echo(str(error), err=True)
        return int(error.code)
    except TrialError as error:
        click.echo(str(error), err=True)
        return int(ExitCode.USER)
    except click.ClickException as error:
        error.show()
        return int(ExitCode.USER)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our stdout has gone, as `head` does; nobody is left to tell.
        sys.stderr.close()
        return int(ExitCode.DONE)
    except Exception as error:  # noqa: BLE001 - the last door: a bug becomes a line and a file, never a wall of text
        return _ours(error)


def _ours(error: Exception) -> int:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix="orchestrate-", suffix=".traceback.txt", delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    click.echo(
        f"this is ours, not yours: {type(error).__name__}: {error}\nThe traceback is in {file.name}; please report it.",
        err=True,
    )
    return int(ExitCode.OURS)


if __name__ == "__main__":
    sys.exit(main())
