"""Commands `plan`, `sweep` and `resume`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.options import (
    JSON,
    SET,
    TRUST,
    cluster_address,
    cluster_options,
    print_json,
    read_spec,
    spec_options,
)
from orchestrator.cli.submit_command import job_options, render
from orchestrator.errors import ExitCode
from orchestrator.folders import existing_sweep, runs_folder

POSITIVE = click.FloatRange(0, min_open=True)


@click.command()
@spec_options
@JSON
@click.option("--gpu-memory", type=POSITIVE, metavar="GB", help="Of one GPU; by default the visible one's.")
@click.option("--price-per-gpu-hour", "price", type=click.FloatRange(0), help="Adds the cost, in the same currency.")
@click.option("--efficiency", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak reached; 0.3.")
@click.option("--tflops", type=POSITIVE, help="A GPU's peak in bfloat16; 989, an H100's or H200's.")
@click.option("--tokens-per-pair", type=click.IntRange(1), help="On average; by default the most, 2 * max_length.")
@click.option("--train-pairs", type=click.IntRange(1), help="Where the data is not downloaded yet.")
@click.option("--probe", is_flag=True, help="Measure one update here: loads model and data, trains a few updates.")
@job_options
@TRUST
def plan(
    file: Path,
    sets: Sequence[str],
    name: str | None,
    rehearse: bool,
    as_json: bool,
    gpu_memory: float | None,
    price: float | None,
    efficiency: float | None,
    tflops: float | None,
    tokens_per_pair: int | None,
    train_pairs: int | None,
    probe: bool,
    trust_remote_code: bool,
    **job_settings: Any,
) -> None:
    """What a sweep would do: trials, corners, steps, tokens, memory, GPU-hours, files. Starts no trial.

    With --slurm or --kuberay: the very bytes that `submit` would hand over.
    """
    from dashboards.terminal.command_output import print_plan
    from orchestrator.commands.local_plan import plan_locally
    from orchestrator.spec.estimates.cost_estimate import EFFICIENCY, PEAK_TFLOPS, GpuAssumptions
    from orchestrator.spec.estimates.gpu_memory import GB

    spec, notices = read_spec(file, sets, name, rehearse)
    job = render(spec, job_settings, trust=trust_remote_code)
    if job is not None:
        from orchestrator.cli.submit_command import submission_warnings

        for line in (*notices, *submission_warnings(spec), job.assumed):
            if line:
                click.echo(line, err=True)
        click.echo(job.text, nl=False)
        return
    machine = GpuAssumptions(
        gpu_memory=None if gpu_memory is None else gpu_memory * GB,
        tflops=tflops or PEAK_TFLOPS,
        efficiency=efficiency or EFFICIENCY,
        price=price,
        tokens_per_pair=tokens_per_pair,
        train_pairs=train_pairs,
    )
    if probe:
        click.echo("measuring one update on this machine", err=True)
    made = plan_locally(spec, runs_folder(), notices, machine, probe=probe, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(made.as_json())
    else:
        print_plan(made)


@click.command()
@spec_options
@cluster_options
@click.option("--continue", "go_on", is_flag=True, help="Go on with it where this very sweep has begun already.")
@TRUST
def sweep(
    file: Path,
    sets: Sequence[str],
    name: str | None,
    rehearse: bool,
    address: str | None,
    machines: int,
    go_on: bool,
    trust_remote_code: bool,
) -> ExitCode:
    """Run a sweep. Ctrl-C once: checkpoint and stop; twice: now."""
    spec, notices = read_spec(file, sets, name, rehearse)
    cluster_at = cluster_address(address, machines)
    if not go_on and (runs_folder() / spec.name).exists():
        from orchestrator.driver.crash_report import free_folder

        free_folder(runs_folder(), spec.name)
    from orchestrator.cli.composition import start, start_or_resume

    begin = start_or_resume if go_on else start

    for notice in notices:
        click.echo(notice, err=True)
    return begin(spec, runs_folder(), cluster_at=cluster_at, trust_remote_code=trust_remote_code)


@click.command()
@click.argument("name")
@SET
@click.option("--mirror", metavar="URL", help="Where this disk does not have the sweep: bring it from its mirror.")
@cluster_options
@TRUST
def resume(
    name: str, sets: Sequence[str], mirror: str | None, address: str | None, machines: int, trust_remote_code: bool
) -> ExitCode:
    """Go on with a sweep that was stopped or killed."""
    if mirror is None:
        existing_sweep(runs_folder(), name)
    from orchestrator.cli.composition import resume as go_on

    cluster_at = cluster_address(address, machines)
    return go_on(name, runs_folder(), sets, mirror=mirror, cluster_at=cluster_at, trust_remote_code=trust_remote_code)
