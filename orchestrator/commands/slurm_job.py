"""Renders a sweep as a Slurm batch script for `sbatch`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec

GRACE_SECONDS = 180
"""Seconds before the job's time limit at which running trials are checkpointed."""
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_WORD = re.compile(r"[A-Za-z0-9._,@%+-]+")


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """Resources of the job. `home`: the runs folder; `programs`: the folder of `orchestrate`; both on a shared disk."""

    home: Path
    programs: Path
    machines: int
    cpus: int
    """Per machine, like `gpus` and `memory_gb`."""
    gpus: int
    time: str
    memory_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    grace: int = GRACE_SECONDS
    more: tuple[str, ...] = ()
    """Further sbatch options, one `#SBATCH` line each."""
    setup: tuple[str, ...] = ()
    """Shell lines at the start of the job, such as `module load cuda`."""
    trust_remote_code: bool = False


def render_slurm_job(spec: SweepSpec, job: SlurmJob) -> str:
    """Return the batch script, which contains the resolved sweep file as of submission.

    Raises:
        SpecError: an option of the job is invalid.
    """
    _check(job)
    sweep = dump_spec(spec)
    heredoc_end = "END_OF_SWEEP"
    while heredoc_end in sweep:
        heredoc_end += "_"
    return _template().render(name=spec.name, job=job, sweep=sweep, heredoc_end=heredoc_end)


def _check(job: SlurmJob) -> None:
    problems: list[SpecProblem] = []
    if not _TIME.fullmatch(job.time):
        problems.append(
            SpecProblem("--time", "", f"{job.time!r} is not a time limit", "MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
        )
    for flag, word in (("--partition", job.partition), ("--account", job.account)):
        if word is not None and not _WORD.fullmatch(word):
            problems.append(SpecProblem(flag, "", f"{word!r} is not a valid name", "letters, digits, . _ , - only"))
    for line in job.more:
        if not line.startswith("-") or "\n" in line:
            problems.append(
                SpecProblem("--sbatch", "", f"{line!r} is not an sbatch option", "for example --constraint=h100")
            )
    if problems:
        raise SpecError(problems)


@cache
def _template() -> Template:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML
    )
    made.filters["quote"] = lambda value: shlex.quote(str(value))
    return made.get_template("slurm.sh.j2")
