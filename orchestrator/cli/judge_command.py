"""judge."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from orchestrator.cli.options import JSON, SET, TRUST, print_json
from orchestrator.errors import ExitCode
from orchestrator.folders import existing, home

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
    existing(home(), name)
    from dashboards.sweep_reporter import DashboardReporter
    from dashboards.terminal.judge_output import Talk, print_verdicts
    from dashboards.terminal.progress_views import wide_console
    from orchestrator.commands.judge_sweep import judge as run
    from orchestrator.judge.judgements import as_json as told

    short = {"judge.top": top, "judge.prompts": prompts}
    given = (*sets, *(f"{path}={value}" for path, value in short.items() if value is not None))
    with Talk() as talk:
        found = run(
            name,
            home(),
            given,
            stage=talk.stage,
            say=talk.say,
            agree=_agree(yes, talk.pause),
            reporter=DashboardReporter(),
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json({"name": name, "trials": told(found.verdicts), "notices": list(found.notices)})
    else:
        print_verdicts(found.verdicts, wide_console())
    for notice in found.notices:
        click.echo(notice, err=True)
    return found.code


def _agree(yes: bool, pause: Callable[[], None]) -> Callable[[Endpoint, Estimate], bool]:
    """Whether the endpoint may be asked: what --yes says, else a person; NotAgreed where nobody says yes."""
    from orchestrator.driver.judge_stage import NotAgreed

    def agree(endpoint: Endpoint, expected: Estimate) -> bool:
        if yes:
            return True
        pause()
        if not sys.stdin.isatty():
            raise NotAgreed(f"nobody is there to agree to {expected}; add --yes, or leave it out: {_WITHOUT}")
        if not click.confirm(f"Ask {endpoint.model} now?", err=True):
            raise NotAgreed(f"nothing was generated and nobody was asked; without the endpoint: {_WITHOUT}")
        return True

    return agree
