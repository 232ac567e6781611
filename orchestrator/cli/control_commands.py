"""Commands `stop`, `pause`, `unpause`, `prune`, `retry`, `clone`, `enqueue` and `set`: requests to a running sweep."""

from __future__ import annotations

from collections.abc import Sequence

import click

from orchestrator.cli.options import SET
from orchestrator.folders import SweepFolder, existing_sweep, lock_holder, runs_folder
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
        _request("stop", name, trial, why or "stopped")
        return
    if trial is not None:
        raise click.UsageError("--abandon ends the whole sweep; without it one TRIAL is stopped for good")
    existing_sweep(runs_folder(), name)
    if lock_holder(SweepFolder(runs_folder(), name)) is not None:
        _request("abandon", name, None, why)
        return
    from orchestrator.cli.composition import abandon as end_sweep

    end_sweep(name, runs_folder(), why)


@click.command()
@_NAME
@_OPTIONAL_TRIAL
@_WHY
def pause(name: str, trial: int | None, why: str) -> None:
    """Pause one TRIAL, or the whole sweep.

    A paused trial writes a checkpoint and frees its slot for the next one.
    """
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
@click.argument("trials", type=click.IntRange(min=0), nargs=-1, required=True, metavar="TRIAL...")
@_WHY
def retry(name: str, trials: Sequence[int], why: str) -> None:
    """Try failed trials again, each with its number and configuration."""
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.request_commands import request_retries

    _print(request_retries(name, runs_folder(), trials, why))


@click.command("set")
@_NAME
@click.argument("settings", nargs=-1, required=True, metavar="budget.SETTING=VALUE...")
def set_budget(name: str, settings: Sequence[str]) -> None:
    """Change the budget of a running sweep, without a stop.

    Settings: budget.trials, hours, gpu_hours, target and concurrency; null takes a limit away.
    """
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.budget_control import set_budget as request_budget

    _print(request_budget(name, runs_folder(), settings))


@click.command()
@_NAME
@_TRIAL
@SET
@click.option(
    "--from-checkpoint", is_flag=True, help="Start from TRIAL's newest checkpoint instead of the initial model."
)
@_WHY
def clone(name: str, trial: int, overrides: Sequence[str], why: str, from_checkpoint: bool) -> None:
    """Enqueue a copy of TRIAL with some settings changed; it runs next.

    It comes in addition to budget.trials. A FAILED trial may be cloned without changes.
    """
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.request_commands import enqueue_clone

    _print(enqueue_clone(name, runs_folder(), trial, overrides, why, from_checkpoint=from_checkpoint))


@click.command()
@_NAME
@SET
@click.option("--again", is_flag=True, help="Train a trial with these settings once more, with another training.seed.")
def enqueue(name: str, overrides: Sequence[str], again: bool) -> None:
    """Enqueue a trial with these settings; it runs next.

    Others are as in base. It comes in addition to budget.trials.
    """
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.request_commands import enqueue_trial

    _print(enqueue_trial(name, runs_folder(), overrides, again=again))


def _request(kind: str, name: str, trial: int | None, reason: str) -> None:
    existing_sweep(runs_folder(), name)
    from orchestrator.commands.request_commands import request_control

    _print(request_control(name, runs_folder(), kind, trial, reason))


def _print(notices: Sequence[str]) -> None:
    for notice in notices:
        click.echo(wrapped(notice), err=True)
