"""Hands on a sweep from another terminal: stop, pause, unpause, prune, clone, enqueue."""

from __future__ import annotations

from collections.abc import Sequence

import click

from orchestrator.cli.options import SET
from orchestrator.folders import existing, home

_NAME = click.argument("name")
_ONE = click.argument("trial", type=click.IntRange(min=0))
_PERHAPS = click.argument("trial", type=click.IntRange(min=0), required=False)
_WHY = click.option("--why", default="", metavar="TEXT", help="The reason, for the record.")


@click.command()
@_NAME
@_PERHAPS
@_WHY
def stop(name: str, trial: int | None, why: str) -> None:
    """Stop a running sweep, resumably; or end one TRIAL of it for good."""
    _ask("stop", name, trial, why or "stopped")


@click.command()
@_NAME
@_PERHAPS
@_WHY
def pause(name: str, trial: int | None, why: str) -> None:
    """Checkpoint one TRIAL and give its slot to the next; or pause the whole sweep."""
    _ask("pause", name, trial, why)


@click.command()
@_NAME
@_PERHAPS
@_WHY
def unpause(name: str, trial: int | None, why: str) -> None:
    """Go on with a paused TRIAL, or with a sweep that is paused as a whole."""
    _ask("unpause", name, trial, why)


@click.command()
@_NAME
@_ONE
@click.option("--why", required=True, metavar="TEXT", help="The reason, for the record.")
def prune(name: str, trial: int, why: str) -> None:
    """End one TRIAL for good, with a reason; its state is PRUNED."""
    _ask("prune", name, trial, why)


@click.command()
@_NAME
@_ONE
@SET
@click.option(
    "--from-checkpoint", is_flag=True, help="Go on from TRIAL's newest checkpoint instead of from the start model."
)
@_WHY
def clone(name: str, trial: int, sets: Sequence[str], why: str, from_checkpoint: bool) -> None:
    """Run a trial like TRIAL with some leaves changed, next and on top of budget.trials."""
    existing(home(), name)
    from orchestrator.commands.trial_control import clone as queue

    _say(queue(name, home(), trial, sets, why, from_checkpoint=from_checkpoint))


@click.command()
@_NAME
@SET
def enqueue(name: str, sets: Sequence[str]) -> None:
    """Run a trial with these leaves next, on top of budget.trials; the others are the base's."""
    existing(home(), name)
    from orchestrator.commands.trial_control import enqueue as queue

    _say(queue(name, home(), sets))


def _ask(kind: str, name: str, trial: int | None, why: str) -> None:
    existing(home(), name)
    from orchestrator.commands.trial_control import ask

    _say(ask(name, home(), kind, trial, why))


def _say(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        click.echo(sentence, err=True)
