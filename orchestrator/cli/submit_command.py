"""Command `submit`, and `plan --slurm` and `--kuberay`: render a job, hand it to the scheduler, show its reply."""

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
"""Of each machine, where nobody says; memory of KubeRay's only."""
_OPTIONS = (
    click.option("--slurm", is_flag=True, help="As a Slurm job: a batch script."),
    click.option("--kuberay", is_flag=True, help="As a RayJob of KubeRay: a manifest."),
    click.option("--machines", type=_COUNT, default=1, show_default=True, help="Of the job's Ray cluster."),
    click.option("--gpus-per-machine", type=click.IntRange(0), default=None, show_default=str(_GPUS)),
    click.option("--cpus-per-machine", type=_COUNT, default=None, show_default=str(_CPUS)),
    click.option("--memory-per-machine", type=_COUNT, metavar="GB", help="By default Slurm's own; 256 for KubeRay."),
    click.option("--time", default="24:00:00", show_default=True, help="Slurm: the job's limit; it requeues itself."),
    click.option("--partition", help="Slurm."),
    click.option("--account", help="Slurm."),
    click.option("--sbatch", "more", multiple=True, metavar="OPTION", help="Slurm: --sbatch=--constraint=h100"),
    click.option(
        "--setup", multiple=True, metavar="LINE", help='Slurm: shell before anything else: "module load cuda".'
    ),
    click.option("--image", help="KubeRay: a container image that holds this program."),
    click.option(
        "--claim", default="prefsweep-runs", show_default=True, help="KubeRay: the volume of the runs folder."
    ),
    click.option("--namespace", default="default", show_default=True, help="KubeRay."),
    click.option("--secret", help="KubeRay: a Secret whose keys become environment variables (HF_TOKEN)."),
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The bytes for a scheduler, and the command that takes them."""

    text: str
    command: tuple[str, ...]
    assumed: str
    """Of the machines, in words; empty where everything was said."""


def job_options(command: F) -> F:
    """What a job of a scheduler asks for."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def render(spec: SweepSpec, job_settings: dict[str, Any], *, trust: bool = False) -> Rendered | None:
    """The job that was asked for; None where neither scheduler was named."""
    if job_settings["slurm"] and job_settings["kuberay"]:
        raise click.UsageError("--slurm or --kuberay, not both")
    common: dict[str, Any] = {
        "machines": job_settings["machines"],
        "cpus": _CPUS if job_settings["cpus_per_machine"] is None else job_settings["cpus_per_machine"],
        "gpus": _GPUS if job_settings["gpus_per_machine"] is None else job_settings["gpus_per_machine"],
        "trust": trust,
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
        return Rendered(slurm_job.render_slurm_job(spec, job), ("sbatch",), assumed)
    if job_settings["kuberay"]:
        from orchestrator.commands import kuberay_job

        if job_settings["image"] is None:
            raise click.UsageError("--kuberay needs --image: a container image that holds this program")
        kube = kuberay_job.KubeJob(
            memory_gb=job_settings["memory_per_machine"] or _MEMORY_GB,
            **{name: job_settings[name] for name in ("image", "claim", "namespace", "secret")},
            **common,
        )
        return Rendered(kuberay_job.render_kuberay_job(spec, kube), ("kubectl", "apply", "-f", "-"), assumed)
    return None


def _assumptions(job_settings: dict[str, Any]) -> str:
    """What nobody said of the machines, and how it is said."""
    parts = [("gpus_per_machine", f"{_GPUS} GPUs"), ("cpus_per_machine", f"{_CPUS} CPUs")]
    parts += [("memory_per_machine", f"{_MEMORY_GB} GB of memory")] if job_settings["kuberay"] else []
    unsaid = [f"{words} (--{name.replace('_', '-')})" for name, words in parts if job_settings[name] is None]
    return f"assumed of each machine: {', '.join(unsaid)}" if unsaid else ""


@click.command()
@spec_options
@job_options
@TRUST
def submit(
    file: Path, sets: Sequence[str], name: str | None, rehearse: bool, trust_remote_code: bool, **job_settings: Any
) -> None:
    """Hand a sweep to Slurm or Kubernetes: exactly the bytes that `plan` prints with the same options."""

    spec, notices = read_spec(file, sets, name, rehearse)
    made = render(spec, job_settings, trust=trust_remote_code)
    if made is None:
        raise click.UsageError("--slurm or --kuberay?")
    if job_settings["slurm"]:
        check_name_free(spec, runs_folder())
    for line in (*notices, *submission_warnings(spec), made.assumed):
        if line:
            click.echo(line, err=True)
    click.echo(submit_job(made.text, made.command))


class NotSubmitted(OrchestrateError):
    """The scheduler's command is missing or refused."""


def submit_job(text: str, command: Sequence[str]) -> str:
    """Give the command these bytes on its stdin; what it answered."""
    program = shutil.which(command[0])
    if program is None:
        raise NotSubmitted(f"{command[0]} is not on this machine: submit where it is, or pipe `orchestrate plan` to it")
    done = subprocess.run([program, *command[1:]], input=text.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        raise NotSubmitted(f"{command[0]} refused ({done.returncode}): {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace").strip()


def check_name_free(spec: SweepSpec, root: Path) -> None:
    """NameTaken where the runs folder has a sweep of this name: better said now than in the job."""
    new_sweep_folder(root, spec.name)


def submission_warnings(spec: SweepSpec) -> list[str]:
    """What a sweep of several machines needs and its file does not give."""
    warnings: list[str] = []
    if spec.storage is None:
        warnings.append(
            "the study will be SQLite in the runs folder, which is refused on a network disk; "
            "give --set storage=postgresql+psycopg://USER@HOST/DATABASE"
        )
    if spec.mirror is None:
        warnings.append(
            "checkpoints will be in the runs folder only, on a disk that all machines share and that outlives the job; "
            "for copies elsewhere give --set mirror=s3://BUCKET/PREFIX"
        )
    if spec.tracking.uri is None:
        warnings.append(
            "MLflow will be SQLite in the runs folder; on a network disk give --set tracking.uri=http://HOST:PORT"
        )
    elif redact(spec.tracking.uri) != spec.tracking.uri:
        warnings.append(
            "tracking.uri carries a password, in this job for everybody to read; leave it out and give the job "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return warnings
