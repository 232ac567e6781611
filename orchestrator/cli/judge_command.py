"""Command `judge`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from orchestrator.cli.options import JSON, SET, TRUST, print_json
from orchestrator.errors import ExitCode
from orchestrator.folders import existing_sweep, runs_folder

if TYPE_CHECKING:
    from orchestrator.judge.endpoint_batch import Estimate
    from orchestrator.spec.judge_config import Endpoint

_WITHOUT = "--set judge.endpoint=null"


@click.command()
@click.argument("name")
@click.option("--top", type=click.IntRange(1), metavar="K", help="Judge the K best trials; short for judge.top.")
@click.option("--prompts", type=click.IntRange(1), metavar="N", help="On N prompts; short for judge.prompts.")
@click.option("--yes", is_flag=True, help="Ask a paid endpoint without asking me first.")
@SET
@JSON
@TRUST
def judge(
    name: str,
    top: int | None,
    prompts: int | None,
    yes: bool,
    sets: tuple[str, ...],
    as_json: bool,
    trust_remote_code: bool,
) -> ExitCode:
    """Win rates of the best trials against the start model, by an outside judge.

    By the rows' own answers, a reward model or an OpenAI-compatible endpoint, as `judge:` in the sweep's file or --set
    says. Ctrl-C loses nothing: the same command goes on where it was, and asks nobody twice.
    """
    existing_sweep(runs_folder(), name)
    from dashboards.sweep_reporter import DashboardReporter
    from dashboards.terminal.judge_output import JudgeProgress, print_judgements
    from dashboards.terminal.progress_views import wide_console
    from orchestrator.commands.judge_sweep import judge_sweep as run
    from orchestrator.judge.judgements import as_json as judgements_as_json

    short = {"judge.top": top, "judge.prompts": prompts}
    given = (*sets, *(f"{path}={value}" for path, value in short.items() if value is not None))
    with JudgeProgress() as progress:
        found = run(
            name,
            runs_folder(),
            given,
            set_stage=progress.set_stage,
            log=progress.log,
            confirm_cost=_confirm_cost(yes, progress.pause),
            reporter=DashboardReporter(),
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json({"name": name, "trials": judgements_as_json(found.judgements), "notices": found.notices})
    else:
        print_judgements(found.judgements, wide_console())
    for notice in found.notices:
        click.echo(notice, err=True)
    return found.code


def _confirm_cost(yes: bool, pause: Callable[[], None]) -> Callable[[Endpoint, Estimate], bool]:
    """Whether the endpoint may be asked: what --yes says, else a person; CostNotConfirmed where nobody says yes."""
    from orchestrator.driver.judge_stage import CostNotConfirmed

    def agree(endpoint: Endpoint, expected: Estimate) -> bool:
        if yes:
            return True
        pause()
        if not sys.stdin.isatty():
            raise CostNotConfirmed(f"nobody is there to agree to {expected}; add --yes, or leave it out: {_WITHOUT}")
        if not click.confirm(f"Ask {endpoint.model} now?", err=True):
            raise CostNotConfirmed(f"nothing was generated and nobody was asked; without the endpoint: {_WITHOUT}")
        return True

    return agree
