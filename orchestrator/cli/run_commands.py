"""Commands `plan`, `sweep` and `resume`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.api import RemoteSweep, load
from orchestrator.api import plan as make_plan
from orchestrator.cli.options import (
    DETACH,
    JSON,
    NO_WAIT,
    SET,
    TRUST,
    cluster_address,
    cluster_options,
    print_json,
    run_detached,
    server,
    spec_options,
)
from orchestrator.cli.submit_command import job_options, render
from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.folders import SweepFolder, existing_sweep, runs_folder
from orchestrator.terminal_streams import drop_failed_output, wrapped
from trainer.environment import collect_garbage_rarely
from trainer.results import TrialError

if TYPE_CHECKING:
    from orchestrator.spec.estimates.gpu_table import PlannedMachine

POSITIVE = click.FloatRange(0, min_open=True)
UPLOAD = click.option(
    "--upload/--no-upload",
    default=None,
    help="With --server: send files of data that are here, each once by its SHA-256; by default it asks.",
)


@click.command()
@spec_options
@JSON
@click.option("--gpu-memory", type=POSITIVE, metavar="GB", help="Memory of one GPU; default: the visible GPU's.")
@click.option(
    "--price",
    "--price-per-gpu-hour",
    "price",
    type=click.FloatRange(0),
    help="Price of a GPU-hour for the cost estimate, in any currency.",
)
@click.option(
    "--efficiency", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak FLOPS reached; default 0.3."
)
@click.option("--tflops", type=POSITIVE, help="Peak bfloat16 TFLOPS of one GPU; default 989 (H100, H200).")
@click.option(
    "--tokens-per-pair",
    type=click.IntRange(1),
    help="Average tokens of a pair; default: the published mean, else 2 * max_length.",
)
@click.option("--train-pairs", type=click.IntRange(1), help="Training pairs, if the data is not downloaded yet.")
@click.option(
    "--on",
    multiple=True,
    metavar="MACHINE",
    help="Plan for another machine, such as 8xH100 or 1xRTX4090; several give a table.",
)
@click.option(
    "--probe", is_flag=True, help="Measure an update on this machine: loads model and data, trains a few updates."
)
@job_options
@UPLOAD
@TRUST
def plan(
    file: Path,
    overrides: Sequence[str],
    name: str | None,
    rehearse: bool,
    as_json: bool,
    gpu_memory: float | None,
    price: float | None,
    efficiency: float | None,
    tflops: float | None,
    tokens_per_pair: int | None,
    train_pairs: int | None,
    on: Sequence[str],
    probe: bool,
    upload: bool | None,
    trust_remote_code: bool,
    **job_settings: Any,
) -> None:
    """Show what a sweep would do, without running a trial.

    Trials, corners, steps, tokens, memory, GPU-hours, files. With --slurm or --kuberay: print the job exactly as
    `submit` would submit it.
    """
    if (service := server()) is not None:
        from orchestrator.cli.remote_commands import print_plan as print_remote

        jobs = {"--slurm": job_settings["slurm"], "--kuberay": job_settings["kuberay"]}
        sizes = {"--gpu-memory": gpu_memory, "--price": price, "--efficiency": efficiency, "--tflops": tflops}
        sizes |= {"--tokens-per-pair": tokens_per_pair, "--train-pairs": train_pairs, "--on": tuple(on)}
        refused = {"--rehearse": rehearse, "--probe": probe, "--trust-remote-code": trust_remote_code} | sizes | jobs
        print_remote(service, file, overrides, name, upload=upload, as_json=as_json, refused=refused)
        return
    if upload is not None:
        raise click.UsageError("--upload sends files to a service: it needs --server")
    machines = _read_machines(on)
    from dashboards.terminal.command_output import print_plan
    from dashboards.terminal.machines_output import print_machines
    from orchestrator.commands.local_plan import plan_machines
    from orchestrator.spec.estimates.cost_estimate import EFFICIENCY, PEAK_TFLOPS, GpuAssumptions
    from orchestrator.spec.estimates.gpu_memory import GB

    read = load(file, overrides, name=name, rehearse=rehearse)
    spec, notices = read.spec, read.notices
    job = render(spec, job_settings, trust_remote_code=trust_remote_code)
    if machines and (job is not None or probe or gpu_memory is not None or tflops is not None):
        raise click.UsageError(
            "--on has machine and GPU: leave out --gpu-memory, --tflops, --probe, --slurm, --kuberay"
        )
    if job is not None:
        from orchestrator.cli.submit_command import submission_warnings

        for line in (*notices, *submission_warnings(spec), job.assumed):
            if line:
                click.echo(line, err=True)
        click.echo(job.text, nl=False)
        return
    assumptions = GpuAssumptions(
        gpu_memory=None if gpu_memory is None else gpu_memory * GB,
        tflops=tflops or PEAK_TFLOPS,
        efficiency=efficiency or EFFICIENCY,
        price=price,
        tokens_per_pair=tokens_per_pair,
        train_pairs=train_pairs,
    )
    if machines:
        found = plan_machines(spec, runs_folder(), machines, notices, assumptions)
        if as_json:
            print_json({"name": spec.name, "machines": [one.as_json() for one in found]})
            return
        only = found[0].plan if len(found) == 1 else None
        if only is not None:
            print_plan(only)
        print_machines(spec.name, found, read.command(), notices=only is None)
        return
    if probe:
        click.echo("measuring one update on this machine", err=True)
    try:
        made = make_plan(read, assumptions=assumptions, probe=probe, trust_remote_code=trust_remote_code)
    except (OrchestrateError, TrialError):
        for notice in notices:  # they may name the cause, such as a misspelt folder that became a name on the hub
            click.echo(wrapped(notice), err=True)
        raise
    if as_json:
        print_json(made.as_json())
    else:
        print_plan(made)


def _read_machines(texts: Sequence[str]) -> list[PlannedMachine]:
    """Return the machines of `--on`; a UsageError has all that are not understood."""
    from orchestrator.spec.estimates.gpu_table import UnknownMachine, parse_machine

    found: list[PlannedMachine] = []
    problems: list[str] = []
    for text in texts:
        try:
            found.append(parse_machine(text))
        except UnknownMachine as error:
            problems.append(f"--on: {error}")
    if problems:
        raise click.UsageError("\n".join(problems))
    return found


@click.command()
@spec_options
@cluster_options
@click.option("--continue", "go_on", is_flag=True, help="Resume the sweep if it exists with this spec.")
@UPLOAD
@click.option("--priority", type=int, default=0, help="With --server: larger ones start first; default 0.")
@DETACH
@NO_WAIT
@TRUST
def sweep(
    file: Path,
    overrides: Sequence[str],
    name: str | None,
    rehearse: bool,
    address: str | None,
    machines: int,
    go_on: bool,
    priority: int,
    upload: bool | None,
    detach: bool,
    no_wait: bool,
    trust_remote_code: bool,
) -> ExitCode:
    """Run a sweep. Ctrl-C once: write checkpoints and stop; twice: stop at once."""
    collect_garbage_rarely()
    if (service := server()) is not None:
        from orchestrator.cli.remote_commands import submit_sweep

        refused = {"--rehearse": rehearse, "--continue": go_on, "--no-wait": no_wait, "--address": address}
        refused |= {"--machines": machines != 1, "--trust-remote-code": trust_remote_code}
        return submit_sweep(
            service, file, overrides, name, priority=priority, upload=upload, detach=detach, refused=refused
        )
    if priority or upload is not None:
        raise click.UsageError("--priority and --upload are for a service's queue: they need --server")
    read = load(file, overrides, name=name, rehearse=rehearse)
    spec = read.spec
    cluster_at = cluster_address(address, machines)
    if not go_on and (runs_folder() / spec.name).exists():
        from orchestrator.driver.crash_report import free_folder

        free_folder(runs_folder(), spec.name)
    if detach:
        return run_detached(SweepFolder(runs_folder(), spec.name))
    from orchestrator.cli.composition import start

    drop_failed_output()
    for notice in read.notices:
        click.echo(wrapped(notice), err=True)
    from orchestrator.spec.estimates.arrangement import DoesNotFit

    try:
        return start(
            spec,
            runs_folder(),
            resume_existing=go_on,
            cluster_at=cluster_at,
            trust_remote_code=trust_remote_code,
            waits=not no_wait,
        )
    except DoesNotFit as error:
        raise read.with_line(error) from None


@click.command()
@click.argument("name")
@SET
@click.option("--retry-failed", is_flag=True, help="Try all failed trials again, each with its number.")
@click.option("--mirror", metavar="URL", help="Download the sweep from its mirror if this disk does not have it.")
@cluster_options
@DETACH
@NO_WAIT
@TRUST
def resume(
    name: str,
    overrides: Sequence[str],
    retry_failed: bool,
    mirror: str | None,
    address: str | None,
    machines: int,
    detach: bool,
    no_wait: bool,
    trust_remote_code: bool,
) -> ExitCode:
    """Resume a sweep that was stopped or killed.

    If it stopped because trials failed alike, these are tried again.
    """
    collect_garbage_rarely()
    if (service := server()) is not None:
        from orchestrator.cli.remote_commands import resume_sweep as resume_remote

        refused = {"--mirror": mirror, "--no-wait": no_wait, "--address": address}
        refused |= {"--machines": machines != 1, "--trust-remote-code": trust_remote_code}
        remote = RemoteSweep(service.client, name)
        return resume_remote(service, remote, overrides, retry_failed=retry_failed, detach=detach, refused=refused)
    if mirror is None:
        existing_sweep(runs_folder(), name)
    cluster_at = cluster_address(address, machines)
    if detach:
        return run_detached(SweepFolder(runs_folder(), name))
    from orchestrator.cli.composition import resume as resume_sweep

    drop_failed_output()
    return resume_sweep(
        name,
        runs_folder(),
        overrides,
        mirror=mirror,
        cluster_at=cluster_at,
        trust_remote_code=trust_remote_code,
        retry_failed=retry_failed,
        waits=not no_wait,
    )
