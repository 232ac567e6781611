"""Commands through a service (`--server`): submit and follow a sweep; what the API gives in another form than here."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.api.service_client import SERVER_VARIABLE
from orchestrator.cli.options import print_json
from orchestrator.errors import ExitCode, SpecError, SpecProblem
from orchestrator.terminal_streams import wrapped

if TYPE_CHECKING:
    from orchestrator.api import RemoteSweep, Server


def submit_sweep(
    service: Server,
    file: Path,
    overrides: Sequence[str],
    name: str | None,
    *,
    priority: int,
    upload: bool | None,
    detach: bool,
    refused: Mapping[str, object],
) -> ExitCode:
    """Add a sweep to the service's queue and follow it, unless `detach`.

    `upload`: whether files of data and model folders that are here are sent; None asks, and sends none where there is
    no terminal.

    Raises:
        click.UsageError: an option of `refused` was given, which a service does not take.
    """
    refuse_options(refused)
    with _naming_unsent(upload) as is_sent:
        sweep = service.submit(file, overrides, name=name, priority=priority, upload=is_sent, on_progress=_show_upload)
    for notice in sweep.notices:
        click.echo(wrapped(notice), err=True)
    return _follow_new(sweep, service, detach=detach)


@contextmanager
def _naming_unsent(upload: bool | None) -> Generator[Callable[[Mapping[str, Path]], bool]]:
    """Yield what decides whether files that are here are sent, as `_is_sent`.

    Where they are not, and the service finds mistakes, say which of these need them.
    """
    unsent: list[str] = []

    def is_sent(found: Mapping[str, Path]) -> bool:
        sent = upload is not False and _is_sent(found, upload)
        unsent.extend(() if sent else found)
        return sent

    try:
        yield is_sent
    except SpecError as error:
        needed = [[name for name in unsent if _names(problem, name)] for problem in error.problems]
        if count := sum(map(bool, needed)):
            what = f"{count} of the {len(needed)} findings below need{'s' if count == 1 else ''} files of this machine"
            names = ", ".join(dict.fromkeys(name for each in needed for name in each))
            text = f"{what} that the service does not have: {names}; --upload sends them"
            click.echo(wrapped(text), err=True)
        raise


def _names(problem: SpecProblem, name: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", problem.problem) is not None


def _is_sent(found: Mapping[str, Path], upload: bool | None) -> bool:
    """Show what can be sent, and return whether it is: as given, else as answered; without a terminal it is not."""
    from orchestrator.api.uploads import ModelNotSent, model_files
    from orchestrator.spec.estimates.disk_space import format_bytes

    for name, path in found.items():
        try:
            sent, others = model_files(path) if path.is_dir() else ([path], [])
        except ModelNotSent as error:
            click.echo(wrapped(f"{name}: {error}"), err=True)
            continue
        what = f"model of {len(sent)} files" if path.is_dir() else "file"
        size = format_bytes(sum(each.stat().st_size for each in sent))
        click.echo(f"{name} is a {what} here: {path}, {size}", err=True)
        if others:
            text = f"{len(others)} that loading it does not need are not sent: {', '.join(others)}"
            click.echo(wrapped(text), err=True)
    if upload is not None:
        return upload
    if not sys.stdin.isatty():
        click.echo("not sent: the service looks for these names on its machine; --upload sends them", err=True)
        return False
    return click.confirm("Send to the service?", err=True)


def _show_upload(sent: int, size: int) -> None:
    """Show the progress of an upload in one line of a terminal; nothing where stderr is none."""
    if sys.stderr.isatty():
        share = 100 if not size else sent * 100 // size
        click.echo(f"\rsent {share}%", err=True, nl=sent == size)


def resume_sweep(
    service: Server,
    sweep: RemoteSweep,
    overrides: Sequence[str],
    *,
    retry_failed: bool,
    detach: bool,
    refused: Mapping[str, object],
) -> ExitCode:
    """Let a sweep wait in the service's queue again with these changes, and follow it, unless `detach`."""
    refuse_options(refused)
    for notice in sweep.resume(overrides, retry_failed=retry_failed)[:-1]:
        click.echo(wrapped(notice), err=True)
    return _follow_new(sweep, service, detach=detach)


def _follow_new(sweep: RemoteSweep, service: Server, *, detach: bool) -> ExitCode:
    text = f"{sweep.name} waits in the queue of {service.url}"
    if detach:
        click.echo(f"{text}\n{_how_to_return(sweep.name)}", err=True)
        return ExitCode.DONE
    return follow_sweep(sweep, text)


def follow_sweep(sweep: RemoteSweep, text: str = "") -> ExitCode:
    """Show the live table until the sweep's end; return its exit code, 0 after Ctrl-C, which leaves it running.

    `text`: a line before it.
    """
    try:
        if text:
            click.echo(text, err=True)
        from orchestrator.api.remote_sweep import WatchedRemote  # takes a second, in which Ctrl-C leaves the sweep too
        from orchestrator.api.sweep_handle import ending
        from orchestrator.cli.sweep_summary import watch

        progress = watch(sweep.name, WatchedRemote(sweep, lambda text: click.echo(text, err=True)), program())
    except KeyboardInterrupt:
        click.echo(f"{sweep.name} continues\n{_how_to_return(sweep.name)}", err=True)
        return ExitCode.DONE
    code, reason = ending(sweep.status())
    if progress.spec is None:
        click.echo(f"{sweep.name} is {progress.state}: {reason}", err=True)
    return code


def _how_to_return(name: str) -> str:
    return (
        f"  {program()} attach {name}    its table; Ctrl-C there leaves it running\n"
        f"  {program()} stop {name}      stops it with checkpoints"
    )


def print_logs(sweep: RemoteSweep, trial: int | None, attempt: int | None, *, tail: int, follow: bool) -> None:
    """Print the last lines of a log, and with `follow` what is added, until its end or Ctrl-C."""
    if not follow:
        lines = sweep.log(trial, attempt=attempt)
        _print_lines(lines[-tail:] if tail else lines)
        return
    if attempt is not None:
        raise click.UsageError("a service follows the log of a sweep or of a TRIAL: leave out --attempt or -f")
    left = tail
    try:
        for lines in sweep.follow(trial):
            _print_lines(lines[-left:] if left else lines)
            left = 0
    except KeyboardInterrupt:
        click.echo(f"{sweep.name} continues; `{program()} stop {sweep.name}` stops it", err=True)


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)
    sys.stdout.flush()


def print_plan(
    service: Server,
    file: Path,
    overrides: Sequence[str],
    name: str | None,
    *,
    upload: bool | None,
    as_json: bool,
    refused: Mapping[str, object],
) -> None:
    """Print what a sweep would do on the service's machine. `upload`: as of `submit_sweep`."""
    refuse_options(refused)
    with _naming_unsent(upload) as is_sent:
        found = service.plan(file, overrides, name=name, upload=is_sent, on_progress=_show_upload)
    if as_json:
        print_json(found)
        return
    from dashboards.terminal.command_output import print_plan as print_local
    from orchestrator.api.sweep_files import plan_from_json

    print_local(plan_from_json(found))


def print_comparison(service: Server, names: Sequence[str], to: Path | None, *, as_json: bool) -> None:
    """Print a service's comparison of sweeps, and write its page."""
    if as_json:
        print_json(service.compare(*names))
    else:
        from dashboards.formatting import wide_console
        from dashboards.report.comparison_page import ComparisonTable
        from dashboards.report.comparison_page import print_comparison as print_local

        print_local(ComparisonTable.from_json(service.comparison_table(*names)), wide_console())
    if to is not None:
        to.write_text(service.comparison_page(*names), encoding="utf-8")
        click.echo(f"written to {to}", err=True)


def judge_sweep(
    sweep: RemoteSweep, *, top: int | None, prompts: int | None, yes: bool, as_json: bool, refused: Mapping[str, object]
) -> ExitCode:
    """Judge a sweep on the service's machine, in the background."""
    refuse_options(refused)
    notices = sweep.judge(top=top, prompts=prompts, confirm_cost=yes)
    if as_json:
        print_json({"name": sweep.name, "notices": notices})
    else:
        for notice in notices:
            click.echo(wrapped(notice), err=True)
    return ExitCode.DONE


def print_status(found: Mapping[str, Any]) -> None:
    """Print the status of a service's sweep, with its place in the queue and its judge."""
    from dashboards.terminal.command_output import print_status as print_study

    if "goal" in found:
        print_study(found)
    else:
        click.echo(f"{found['name']}: {found['state']}{': ' if found['why'] else ''}{found['why']}")
    if (queue := found.get("queue")) is not None:
        state = "started" if queue["state"] == "driven" else queue["state"]
        click.echo(f"queue: {state}, priority {queue['priority']}, submitted by {queue['owner']}")
    if (judging := found.get("judging")) is not None:
        click.echo(f"judge: {judging['state']}{': ' if judging['why'] else ''}{judging['why']}")


def refuse_options(given: Mapping[str, object]) -> None:
    """Raise click.UsageError with the options that were given and that no service takes."""
    refused = [option for option, value in given.items() if value is not None and value is not False and value != ()]
    if refused:
        raise click.UsageError(f"{', '.join(refused)}: on this machine only, not with --server or ${SERVER_VARIABLE}")


def program() -> str:
    """Return the command with the options that it needs to find this service again."""
    root = click.get_current_context().find_root()
    is_option = root.get_parameter_source("server") is click.core.ParameterSource.COMMANDLINE
    return f"orchestrate --server {root.obj}" if is_option else "orchestrate"
