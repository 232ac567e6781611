"""Commands `stop`, `pause`, `unpause`, `prune`, `retry`, `clone`, `enqueue` and `set`: requests to a running sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from orchestrator.api import RemoteSweep
from orchestrator.cli.options import SET, find_sweep
from orchestrator.terminal_streams import wrapped

_NAME = click.argument("name")
_TRIAL = click.argument("trial", type=click.IntRange(min=0))
_OPTIONAL_TRIAL = click.argument("trial", type=click.IntRange(min=0), required=False)
_WHY = click.option("--why", default="", metavar="TEXT", help="Reason, stored in the history.")


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@click.option("--abandon", is_flag=True, help="End the sweep for good, running or not: unfinished trials are PRUNED.")
@_WHY
def stop(name: str, trial: int | None, abandon: bool, why: str) -> None:
    """Stop a sweep, which can be resumed, or one TRIAL for good."""
    if not abandon:
        _print(find_sweep(name).stop(trial, why=why))
        return
    if trial is not None:
        raise click.UsageError("--abandon ends the whole sweep; without it one TRIAL is stopped for good")
    _print(find_sweep(name).abandon(why=why))


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def pause(name: str, trial: int | None, why: str) -> None:
    """Pause one TRIAL, or the whole sweep.

    A paused trial writes a checkpoint and frees its slot for the next one.
    """
    _print(find_sweep(name).pause(trial, why=why))


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def unpause(name: str, trial: int | None, why: str) -> None:
    """Continue a paused TRIAL, or a paused sweep."""
    _print(find_sweep(name).unpause(trial, why=why))


@click.command()
@_NAME
@_TRIAL
@click.option("--why", required=True, metavar="TEXT", help="Reason, stored in the history.")
def prune(name: str, trial: int, why: str) -> None:
    """Prune one TRIAL with a reason; its state becomes PRUNED."""
    _print(find_sweep(name).prune(trial, why=why))


@click.command()
@_NAME
@click.argument("trials", type=click.IntRange(min=0), nargs=-1, required=True, metavar="TRIAL...")
@_WHY
def retry(name: str, trials: Sequence[int], why: str) -> None:
    """Try failed trials again.

    Each keeps its number and configuration, and begins from the initial model.
    """
    _print(find_sweep(name).retry(trials, why=why))


@click.command("set")
@_NAME
@click.argument("settings", nargs=-1, required=True, metavar="budget.SETTING=VALUE...")
def set_budget(name: str, settings: Sequence[str]) -> None:
    """Change the budget of a running sweep, without a stop.

    Settings: budget.trials, hours, gpu_hours, target and concurrency; null takes a limit away. A sweep that waits in a
    service's queue also has a priority.
    """
    sweep, priorities = find_sweep(name), [one for one in settings if one.partition("=")[0].strip() == "priority"]
    if priorities:
        if not isinstance(sweep, RemoteSweep):
            raise click.UsageError("priority: of a sweep in a service's queue; it needs --server")
        value = priorities[-1].partition("=")[2].strip()
        if not re.fullmatch(r"-?\d{1,4}", value):
            raise click.UsageError(f"priority={value}: must be a whole number from -1000 to 1000")
        sweep.set_priority(int(value))
        _print([f"{name} waits with priority {int(value)}"])
    if others := [one for one in settings if one not in priorities]:
        _print(sweep.set_budget(others))


@click.command()
@_NAME
@_TRIAL
@SET
@click.option(
    "--from-checkpoint", is_flag=True, help="Start from TRIAL's newest checkpoint instead of the initial model."
)
@_WHY
def clone(name: str, trial: int, overrides: Sequence[str], why: str, from_checkpoint: bool) -> None:
    """Enqueue a copy of TRIAL with some settings changed.

    It runs next, and comes in addition to budget.trials. A FAILED trial may be cloned without changes.
    """
    _print(find_sweep(name).clone(trial, overrides, from_checkpoint=from_checkpoint, why=why))


@click.command()
@_NAME
@SET
@click.option("--again", is_flag=True, help="Train a trial with these settings once more, with another training.seed.")
def enqueue(name: str, overrides: Sequence[str], again: bool) -> None:
    """Enqueue a trial with these settings; it runs next.

    Others are as in base. It comes in addition to budget.trials.
    """
    _print(find_sweep(name).enqueue(overrides, again=again))


def _print(notices: Sequence[str]) -> None:
    for notice in notices:
        click.echo(wrapped(notice), err=True)
