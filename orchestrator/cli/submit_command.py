"""Command `submit`, and `plan --slurm` and `--kuberay`: render a job, submit it, show the scheduler's reply."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from orchestrator.cli.options import TRUST, read_spec, spec_options
from orchestrator.errors import OrchestrateError
from orchestrator.folders import new_sweep_folder, runs_folder
from orchestrator.redaction import redact
from orchestrator.spec.sweep_spec import SweepSpec

F = TypeVar("F", bound=Callable[..., Any])

_COUNT = click.IntRange(1)
_GPUS, _CPUS, _MEMORY_GB = 8, 64, 256
"""Defaults of each machine; the memory (GB) is used for KubeRay only."""
_OPTIONS = (
    click.option("--slurm", is_flag=True, help="Slurm job: a batch script."),
    click.option("--kuberay", is_flag=True, help="KubeRay job: a RayJob manifest."),
    click.option("--machines", type=_COUNT, default=1, show_default=True, help="Machines of the job's Ray cluster."),
    click.option("--gpus-per-machine", type=click.IntRange(0), default=None, show_default=str(_GPUS)),
    click.option("--cpus-per-machine", type=_COUNT, default=None, show_default=str(_CPUS)),
    click.option("--memory-per-machine", type=_COUNT, metavar="GB", help="Default: Slurm's own; 256 for KubeRay."),
    click.option(
        "--time", default="24:00:00", show_default=True, help="Slurm: time limit of the job, which requeues itself."
    ),
    click.option("--partition", help="Slurm: partition."),
    click.option("--account", help="Slurm: account."),
    click.option(
        "--sbatch",
        "more",
        multiple=True,
        metavar="OPTION",
        help="Slurm: further sbatch option: --sbatch=--constraint=h100",
    ),
    click.option(
        "--setup", multiple=True, metavar="LINE", help='Slurm: shell line at the start of the job: "module load cuda".'
    ),
    click.option("--image", help="KubeRay: container image with prefsweep installed."),
    click.option(
        "--claim", default="prefsweep-runs", show_default=True, help="KubeRay: volume claim of the runs folder."
    ),
    click.option("--namespace", default="default", show_default=True, help="KubeRay: namespace."),
    click.option("--secret", help="KubeRay: Secret whose keys become environment variables (HF_TOKEN)."),
)


@dataclass(frozen=True, slots=True)
class RenderedJob:
    """A job file and the command that submits it."""

    text: str
    command: tuple[str, ...]
    assumed: str
    """Defaults used for the machines, as a notice; empty where all were given."""


def job_options(command: F) -> F:
    """Add the options of a scheduler's job."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def render(spec: SweepSpec, job_settings: dict[str, Any], *, trust_remote_code: bool = False) -> RenderedJob | None:
    """Return the job of `--slurm` or `--kuberay`; None without either."""
    if job_settings["slurm"] and job_settings["kuberay"]:
        raise click.UsageError("--slurm and --kuberay exclude each other")
    common: dict[str, Any] = {
        "machines": job_settings["machines"],
        "cpus": _CPUS if job_settings["cpus_per_machine"] is None else job_settings["cpus_per_machine"],
        "gpus": _GPUS if job_settings["gpus_per_machine"] is None else job_settings["gpus_per_machine"],
        "trust_remote_code": trust_remote_code,
    }
    assumed = _assumptions(job_settings)
    if job_settings["slurm"]:
        from orchestrator.commands import slurm_job

        job = slurm_job.SlurmJob(
            home=runs_folder(),
            programs=Path(sys.executable).parent,
            memory_gb=job_settings["memory_per_machine"],
            more=tuple(job_settings["more"]),
            **{name: job_settings[name] for name in ("time", "partition", "account")},
            setup=tuple(job_settings["setup"]),
            **common,
        )
        return RenderedJob(slurm_job.render_slurm_job(spec, job), ("sbatch",), assumed)
    if job_settings["kuberay"]:
        from orchestrator.commands import kuberay_job

        if job_settings["image"] is None:
            raise click.UsageError("--kuberay requires --image: a container image with prefsweep installed")
        kube = kuberay_job.KubeJob(
            memory_gb=job_settings["memory_per_machine"] or _MEMORY_GB,
            **{name: job_settings[name] for name in ("image", "claim", "namespace", "secret")},
            **common,
        )
        return RenderedJob(kuberay_job.render_kuberay_job(spec, kube), ("kubectl", "apply", "-f", "-"), assumed)
    return None


def _assumptions(job_settings: dict[str, Any]) -> str:
    """Return a notice with the defaults used for the machines and their options."""
    parts = [("gpus_per_machine", f"{_GPUS} GPUs"), ("cpus_per_machine", f"{_CPUS} CPUs")]
    parts += [("memory_per_machine", f"{_MEMORY_GB} GB of memory")] if job_settings["kuberay"] else []
    defaults = [f"{text} (--{name.replace('_', '-')})" for name, text in parts if job_settings[name] is None]
    return f"assumed for each machine: {', '.join(defaults)}" if defaults else ""


@click.command()
@spec_options
@job_options
@TRUST
def submit(
    file: Path, overrides: Sequence[str], name: str | None, rehearse: bool, trust_remote_code: bool, **job_settings: Any
) -> None:
    """Submit a sweep to Slurm or Kubernetes.

    The job is exactly what `plan` prints with the same options.
    """

    spec, notices = read_spec(file, overrides, name, rehearse)
    job = render(spec, job_settings, trust_remote_code=trust_remote_code)
    if job is None:
        raise click.UsageError("choose a scheduler: --slurm or --kuberay")
    if job_settings["slurm"]:
        check_name_free(spec, runs_folder())
    for line in (*notices, *submission_warnings(spec), job.assumed):
        if line:
            click.echo(line, err=True)
    click.echo(submit_job(job.text, job.command))


class NotSubmitted(OrchestrateError):
    """The scheduler's command is missing or failed."""


def submit_job(text: str, command: Sequence[str]) -> str:
    """Run the command with the job on stdin and return its output.

    Raises:
        NotSubmitted: the command is not installed or failed.
    """
    program = shutil.which(command[0])
    if program is None:
        raise NotSubmitted(
            f"{command[0]} is not installed on this machine: submit where it is, or pipe `orchestrate plan` to it"
        )
    done = subprocess.run([program, *command[1:]], input=text.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        raise NotSubmitted(f"{command[0]} failed ({done.returncode}): {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace").strip()


def check_name_free(spec: SweepSpec, root: Path) -> None:
    """Check before submission that no sweep of this name exists.

    Raises:
        NameTaken: the runs folder has a sweep of this name.
    """
    new_sweep_folder(root, spec.name)


def submission_warnings(spec: SweepSpec) -> list[str]:
    """Return notices about settings that a sweep on a cluster needs and the file lacks."""
    warnings: list[str] = []
    if spec.storage is None:
        warnings.append(
            "storage: the study will be SQLite in the runs folder, which is refused on a network disk; "
            "pass --set storage=postgresql+psycopg://USER@HOST/DATABASE"
        )
    if spec.mirror is None:
        warnings.append(
            "mirror: checkpoints will be in the runs folder only, which must be on a shared disk that outlives the "
            "job; for copies on object storage pass --set mirror=s3://BUCKET/PREFIX"
        )
    if spec.tracking.uri is None:
        warnings.append(
            "tracking.uri: MLflow will be SQLite in the runs folder; on a network disk pass "
            "--set tracking.uri=http://HOST:PORT"
        )
    elif redact(spec.tracking.uri) != spec.tracking.uri:
        warnings.append(
            "tracking.uri: contains a password, readable by every user of the scheduler; remove it and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the job's environment"
        )
    return warnings
