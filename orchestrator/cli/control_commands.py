"""Commands `stop`, `pause`, `unpause`, `prune`, `clone` and `enqueue`: requests to a running sweep."""

from __future__ import annotations

from collections.abc import Sequence

import click

from orchestrator.cli.options import SET
from orchestrator.folders import existing_sweep, runs_folder

_NAME = click.argument("name")
_TRIAL = click.argument("trial", type=click.IntRange(min=0))
_OPTIONAL_TRIAL = click.argument("trial", type=click.IntRange(min=0), required=False)
_WHY = click.option("--why", default="", metavar="TEXT", help="Reason, stored in the history.")


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def stop(name: str, trial: int | None, why: str) -> None:
    """Stop a running sweep, which can be resumed; or stop one TRIAL for good."""
    _request("stop", name, trial, why or "stopped")


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def pause(name: str, trial: int | None, why: str) -> None:
    """Checkpoint one TRIAL and free its slot for the next one; or pause the whole sweep."""
    _request("pause", name, trial, why)


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def unpause(name: str, trial: int | None, why: str) -> None:
    """Continue a paused TRIAL, or a paused sweep."""
    _request("unpause", name, trial, why)


@click.command()
@_NAME
@_TRIAL
@click.option("--why", required=True, metavar="TEXT", help="Reason, stored in the history.")
def prune(name: str, trial: int, why: str) -> None:
    """Prune one TRIAL with a reason; its state becomes PRUNED."""
    _request("prune", name, trial, why)


@click.command()
@_NAME
@_TRIAL
@SET
@click.option(
    "--from-checkpoint", is_flag=True, help="Start from TRIAL's newest checkpoint instead of the initial model."
)
@_WHY
def clone(name: str, trial: int, sets: Sequence[str], why: str, from_checkpoint: bool) -> None:
    """Enqueue a copy of TRIAL with some settings changed; runs next, in addition to budget.trials."""
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.request_commands import enqueue_clone

    _print(enqueue_clone(name, runs_folder(), trial, sets, why, from_checkpoint=from_checkpoint))


@click.command()
@_NAME
@SET
def enqueue(name: str, sets: Sequence[str]) -> None:
    """Enqueue a trial with these settings, the others as in base; runs next, in addition to budget.trials."""
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.request_commands import enqueue_trial

    _print(enqueue_trial(name, runs_folder(), sets))


def _request(kind: str, name: str, trial: int | None, reason: str) -> None:
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.request_commands import request_control

    _print(request_control(name, runs_folder(), kind, trial, reason))


def _print(notices: Sequence[str]) -> None:
    for notice in notices:
        click.echo(notice, err=True)
