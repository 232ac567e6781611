"""Commands `stop`, `pause`, `unpause`, `prune`, `clone` and `enqueue`: requests to a sweep from another terminal."""

from __future__ import annotations

from collections.abc import Sequence

import click

from orchestrator.cli.options import SET
from orchestrator.folders import existing_sweep, runs_folder

_NAME = click.argument("name")
_TRIAL = click.argument("trial", type=click.IntRange(min=0))
_OPTIONAL_TRIAL = click.argument("trial", type=click.IntRange(min=0), required=False)
_WHY = click.option("--why", default="", metavar="TEXT", help="The reason, for the record.")


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def stop(name: str, trial: int | None, why: str) -> None:
    """Stop a running sweep, resumably; or end one TRIAL of it for good."""
    _request("stop", name, trial, why or "stopped")


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def pause(name: str, trial: int | None, why: str) -> None:
    """Checkpoint one TRIAL and give its slot to the next; or pause the whole sweep."""
    _request("pause", name, trial, why)


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def unpause(name: str, trial: int | None, why: str) -> None:
    """Go on with a paused TRIAL, or with a sweep that is paused as a whole."""
    _request("unpause", name, trial, why)


@click.command()
@_NAME
@_TRIAL
@click.option("--why", required=True, metavar="TEXT", help="The reason, for the record.")
def prune(name: str, trial: int, why: str) -> None:
    """End one TRIAL for good, with a reason; its state is PRUNED."""
    _request("prune", name, trial, why)


@click.command()
@_NAME
@_TRIAL
@SET
@click.option(
    "--from-checkpoint", is_flag=True, help="Go on from TRIAL's newest checkpoint instead of from the start model."
)
@_WHY
def clone(name: str, trial: int, sets: Sequence[str], why: str, from_checkpoint: bool) -> None:
    """Run a trial like TRIAL with some leaves changed, next and on top of budget.trials."""
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.trial_control import clone as queue

    _print(queue(name, runs_folder(), trial, sets, why, from_checkpoint=from_checkpoint))


@click.command()
@_NAME
@SET
def enqueue(name: str, sets: Sequence[str]) -> None:
    """Run a trial with these leaves next, on top of budget.trials; the others are the base's."""
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.trial_control import enqueue as queue

    _print(queue(name, runs_folder(), sets))


def _request(kind: str, name: str, trial: int | None, reason: str) -> None:
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.trial_control import request_control

    _print(request_control(name, runs_folder(), kind, trial, reason))


def _print(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        click.echo(sentence, err=True)
