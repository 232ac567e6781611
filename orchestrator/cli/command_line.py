"""The command `orchestrate`: parses arguments, calls `orchestrator.commands` or the driver, returns the exit code.

Implementations are imported inside the commands, which keeps `--help` fast.
"""

from __future__ import annotations

import atexit
import gc
import os
import pwd
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.api.service_client import SERVER_VARIABLE, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE
from orchestrator.cli import (
    INTERRUPTED,
    control_commands,
    data_command,
    folder_commands,
    report_commands,
    run_commands,
    setup_commands,
    status_commands,
    submit_command,
)
from orchestrator.cli.service import serve_commands
from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.loopback import bypass_proxies
from orchestrator.terminal_streams import wrapped
from trainer.results import TrialError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="prefsweep", prog_name="orchestrate")
@click.option(
    "--server",
    envvar=SERVER_VARIABLE,
    metavar="URL",
    help=f"Use the sweeps of this service; {TOKEN_VARIABLE} or {TOKEN_FILE_VARIABLE} has the token.",
)
@click.pass_context
def cli(context: click.Context, server: str | None) -> None:
    """Hyperparameter sweeps for preference tuning of language models.

    Everything is written under ./runs, or under $ORCHESTRATE_HOME.
    """
    context.obj = server or None
    is_option = context.get_parameter_source("server") is click.core.ParameterSource.COMMANDLINE
    if server and is_option and context.invoked_subcommand in _OF_THIS_MACHINE:
        raise click.UsageError(f"{context.invoked_subcommand} works on this machine only: leave out --server")


_OF_THIS_MACHINE = frozenset({"advise", "clean", "data", "doctor", "init", "schema", "serve", "submit", "token", "ui"})
"""Commands that use no service; with $ORCHESTRATE_SERVER they work as without."""


def _use_server(context: click.Context, _: click.Parameter, url: str | None) -> None:
    """Take `--server` after the command as before it, where most people write it first."""
    if url:
        root = context.find_root()
        root.obj = url
        root.set_parameter_source("server", click.core.ParameterSource.COMMANDLINE)


for command in (
    setup_commands.init,
    run_commands.plan,
    data_command.data,
    data_command.advise,
    run_commands.sweep,
    submit_command.submit,
    run_commands.resume,
    folder_commands.list_sweeps,
    status_commands.status,
    status_commands.history,
    status_commands.attach,
    folder_commands.logs,
    control_commands.stop,
    control_commands.pause,
    control_commands.unpause,
    control_commands.prune,
    control_commands.retry,
    control_commands.set_budget,
    control_commands.clone,
    control_commands.enqueue,
    status_commands.best,
    status_commands.ui,
    report_commands.report,
    report_commands.suggest,
    report_commands.compare,
    report_commands.judge,
    folder_commands.delete,
    folder_commands.archive,
    folder_commands.unarchive,
    folder_commands.clean,
    serve_commands.serve,
    serve_commands.token,
    setup_commands.doctor,
    setup_commands.schema,
):
    cli.add_command(command)
    if command.name not in _OF_THIS_MACHINE:
        command.params.append(click.Option(["--server"], hidden=True, expose_value=False, callback=_use_server))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command, as `main` does once signals are handled."""
    atexit.register(gc.freeze)  # else the interpreter's end collects all that libraries hold: two seconds after a sweep
    bypass_proxies()
    _name_unknown_user()
    return _run(arguments)


def _name_unknown_user() -> None:
    """Give libraries a name and a home folder for a user id without an entry, as in containers, unless both are set."""
    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:
        os.environ.setdefault("HOME", str(Path(tempfile.gettempdir(), f"home-of-uid-{user}")))
        os.environ.setdefault("LOGNAME", f"uid-{user}")


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = cli.main(arguments, prog_name="orchestrate", standalone_mode=False)
        sys.stdout.flush()  # a full disk is reported
        return int(code or ExitCode.DONE)
    except OrchestrateError as error:
        click.echo(wrapped(_redacted(str(error))), err=True)
        return int(error.code)
    except TrialError as error:
        click.echo(wrapped(_redacted(str(error))), err=True)
        return int(ExitCode.USER)
    except click.ClickException as error:
        error.show()
        return int(ExitCode.USER)
    except (KeyboardInterrupt, click.Abort):
        click.echo(INTERRUPTED, err=True)
        return int(ExitCode.INTERRUPTED)
    except OSError as error:
        return _disk_error(error)
    except Exception as error:  # noqa: BLE001 - last handler: a bug is reported as one line and a traceback file
        return _internal_error(error)


def _redacted(text: str) -> str:
    from orchestrator.redaction import redact

    return redact(text)


def _disk_error(error: OSError) -> int:
    from orchestrator.execution.messages import is_disk_error

    if not is_disk_error(error):
        return _internal_error(error)
    where = f" at {error.filename}" if error.filename else ""
    click.echo(f"disk error{where}: {error.strerror}; free some space, then resume the sweep", err=True)
    return int(ExitCode.REFUSED)


def _internal_error(error: Exception) -> int:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix="orchestrate-", suffix=".traceback.txt", delete=False
    ) as file:
        file.write(_redacted("".join(traceback.format_exception(error))))
    message = _redacted(f"{type(error).__name__}: {error}")
    click.echo(
        f"internal error: {message}\nThe traceback is in {file.name}; please report it.",
        err=True,
    )
    return int(ExitCode.INTERNAL_ERROR)
