"""Shared options of the commands, reading a sweep's file, JSON output."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.folders import runs_folder

if TYPE_CHECKING:
    from orchestrator.execution.remote_cluster import ClusterAddress
    from orchestrator.spec.sweep_spec import SweepSpec

F = TypeVar("F", bound=Callable[..., Any])

SET = click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Replace one leaf: loss.beta=2.5")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
TRUST = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the model. Never taken from a file."
)


def cluster_options(command: F) -> F:
    """An existing Ray cluster instead of this machine."""
    address = click.option(
        "--address", metavar="HOST:PORT", help="Run on this Ray cluster, which exists already; auto: the one here."
    )
    machines = click.option(
        "--machines", type=click.IntRange(1), default=1, help="With --address: wait until so many have joined."
    )
    return address(machines(command))


def cluster_address(address: str | None, machines: int) -> ClusterAddress | None:
    """What `--address` and `--machines` say."""
    from orchestrator.execution.remote_cluster import ClusterAddress

    if address is None and machines != 1:
        raise click.UsageError("--machines belongs to --address")
    return None if address is None else ClusterAddress(address, machines)


def spec_options(command: F) -> F:
    """A sweep's file, and what changes it from the command line."""
    file = click.argument("file", type=click.Path(path_type=Path))
    name = click.option("--name", help="Another name than the file's.")
    rehearse = click.option("--rehearse", is_flag=True, help="Tiny random model, few rows, few steps, few trials.")
    return file(SET(name(rehearse(command))))


def read_spec(file: Path, sets: Sequence[str], name: str | None, rehearse: bool) -> tuple[SweepSpec, tuple[str, ...]]:
    """The sweep that was asked for, and what to say about how it was read. SpecError with every finding."""
    from orchestrator.spec.loading.loader import load_with_notices
    from orchestrator.spec.loading.position_checks import check_lengths
    from trainer.environment import foreign_settings, ignored_message

    loaded, foreign = load_with_notices(file, sets, name=name), foreign_settings()
    notices = (
        *loaded.notices,
        *check_lengths(loaded.spec, loaded.document),
        *([ignored_message(foreign)] if foreign else ()),
    )
    if not rehearse:
        return loaded.spec, notices
    from orchestrator.commands.rehearsal import rehearse as small

    rehearsal = small(loaded.spec, runs_folder())
    return rehearsal.spec, (*notices, *rehearsal.notices)


def print_json(value: Any) -> None:
    """Data on stdout; NaN and the infinities are null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value
