"""Commands `report`, `suggest`, `compare` and `judge`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.api import open_sweep
from orchestrator.cli.options import (
    JSON,
    TRUST,
    end_orphaned_runs,
    find_sweep,
    print_json,
    remote_sweep,
    server,
    set_option,
)
from orchestrator.errors import ExitCode
from orchestrator.folders import existing_sweep, runs_folder
from orchestrator.terminal_streams import wrapped

if TYPE_CHECKING:
    from orchestrator.judge.endpoint_batch import UsageEstimate
    from orchestrator.spec.judge_config import Endpoint

_WITHOUT_ENDPOINT = "--set judge.endpoint=null"


@click.command()
@click.argument("name")
@click.option(
    "--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Write this file instead of report.html."
)
@JSON
def report(name: str, to: Path | None, as_json: bool) -> None:
    """Write an HTML report: best trial, diagnosis, next steps."""
    if remote_sweep(name) is not None and to is None and not as_json:
        raise click.UsageError("the report of a service is written here: add --output FILE, or --json")
    found = find_sweep(name).report(to).conclusions
    if as_json:
        print_json(found)
    else:
        click.echo(found["file"])
    end_orphaned_runs(name)


@click.command()
@click.argument("name")
@click.option(
    "--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Write to this new file instead of stdout."
)
def suggest(name: str, to: Path | None) -> None:
    """Write a follow-up sweep file, with a reason for each range."""
    text = find_sweep(name).suggest(to)
    if to is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"written to {to}; check it, then run: orchestrate sweep {to}", err=True)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME NAME...")
@click.option(
    "--output", "to", type=click.Path(path_type=Path, dir_okay=False), help="Also write an HTML page to this file."
)
@JSON
def compare(names: tuple[str, ...], to: Path | None, as_json: bool) -> None:
    """Compare sweeps by a common metric.

    Data, initial model and tokens are checked for equality.
    """
    if len(set(names)) < 2:
        raise click.UsageError("name at least two sweeps")
    if (service := server()) is not None:
        from orchestrator.cli.remote_commands import print_comparison as print_remote

        print_remote(service, names, to, as_json=as_json)
        return
    for name in names:
        existing_sweep(runs_folder(), name)
    from orchestrator.report_data import compare as compare_sweeps

    found = compare_sweeps(names, runs_folder(), to)
    if as_json:
        from dashboards.analysis.comparison import as_json as comparison_as_json

        print_json(comparison_as_json(found))
    else:
        from dashboards.formatting import wide_console
        from dashboards.report.comparison_page import ComparisonTable, print_comparison

        print_comparison(ComparisonTable.of(found), wide_console())
    if to is not None:
        click.echo(f"written to {to}", err=True)


@click.command()
@click.argument("name")
@click.option("--top", type=click.IntRange(1), metavar="K", help="Number of best trials to judge; sets judge.top.")
@click.option("--prompts", type=click.IntRange(1), metavar="N", help="Number of prompts; sets judge.prompts.")
@click.option("--yes", is_flag=True, help="Use a paid endpoint without confirmation.")
@set_option("judge.samples=4")
@JSON
@TRUST
def judge(
    name: str,
    top: int | None,
    prompts: int | None,
    yes: bool,
    overrides: tuple[str, ...],
    as_json: bool,
    trust_remote_code: bool,
) -> ExitCode:
    """Compute win rates of the best trials against the initial model.

    The judge is independent: the checker of known answers, a reward model or an OpenAI-compatible endpoint, configured
    by `judge:` in the sweep file or --set. After Ctrl-C the same command continues; no call is repeated.
    """
    if (remote := remote_sweep(name)) is not None:
        from orchestrator.cli.remote_commands import judge_sweep

        refused = {"--set": overrides, "--trust-remote-code": trust_remote_code}
        return judge_sweep(remote, top=top, prompts=prompts, yes=yes, as_json=as_json, refused=refused)
    sweep = open_sweep(name)
    from dashboards.formatting import wide_console
    from dashboards.terminal.judge_output import JudgeProgress, print_judgements
    from orchestrator.judge.judgements import as_json as judgements_as_json

    shortcuts = {"judge.top": top, "judge.prompts": prompts}
    overrides = (*overrides, *(f"{path}={value}" for path, value in shortcuts.items() if value is not None))
    with JudgeProgress() as progress:
        found = sweep.judge(
            overrides,
            confirm_cost=_confirm_cost(yes, progress.pause),
            trust_remote_code=trust_remote_code,
            set_activity=progress.set_activity,
            log=progress.log,
        )
    if as_json:
        print_json({"name": name, "trials": judgements_as_json(found.judgements), "notices": found.notices})
    else:
        print_judgements(found.judgements, wide_console())
    for notice in found.notices:
        click.echo(wrapped(notice), err=True)
    return found.code


def _confirm_cost(yes: bool, pause: Callable[[], None]) -> Callable[[Endpoint, UsageEstimate], bool]:
    """Return the function that confirms the endpoint's estimated cost: by --yes, else by a prompt.

    It raises CostNotConfirmed where the user declines or stdin is not a terminal.
    """
    from orchestrator.driver.judge_stage import CostNotConfirmed

    def confirm(endpoint: Endpoint, expected: UsageEstimate) -> bool:
        """Return True to call the endpoint. Raises CostNotConfirmed after a no, or without a terminal to ask on."""
        if yes:
            return True
        pause()
        if not sys.stdin.isatty():
            raise CostNotConfirmed(
                f"judge.endpoint: {expected} needs a confirmation; add --yes, or skip the endpoint: {_WITHOUT_ENDPOINT}"
            )
        if not click.confirm(f"Call {endpoint.model} now?", err=True):
            raise CostNotConfirmed(
                f"judge.endpoint: not confirmed, nothing was generated or called; skip it: {_WITHOUT_ENDPOINT}"
            )
        return True

    return confirm
