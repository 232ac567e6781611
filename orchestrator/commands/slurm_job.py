"""A sweep as a Slurm job: the very bytes that `sbatch` gets."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from orchestrator.errors import Finding, SpecError
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec

GRACE_SECONDS = 180
"""Seconds before the end of the job's time at which its trials are checkpointed."""
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_WORD = re.compile(r"[A-Za-z0-9._,@%+-]+")


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """What the job asks for. `programs` is the folder of this program's commands, on a disk that all machines share."""

    home: Path
    programs: Path
    machines: int
    cpus: int
    """Of each machine, as are `gpus` and `memory_gb`."""
    gpus: int
    time: str
    memory_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    grace: int = GRACE_SECONDS
    more: tuple[str, ...] = ()
    """Further options of sbatch, each a line."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything else: modules, environments."""
    trust: bool = False


def render_slurm_job(spec: SweepSpec, job: SlurmJob) -> str:
    """The batch script; the resolved sweep is inside, so that nothing changes between submitting and running."""
    _check(job)
    sweep = dump_spec(spec)
    fence = "END_OF_SWEEP"
    while fence in sweep:
        fence += "_"
    return _template().render(name=spec.name, job=job, sweep=sweep, fence=fence)


def _check(job: SlurmJob) -> None:
    wrong: list[Finding] = []
    if not _TIME.fullmatch(job.time):
        wrong.append(Finding("--time", "", f"{job.time!r} is no time", "MINUTES, HH:MM:SS or DAYS-HH:MM:SS"))
    for flag, word in (("--partition", job.partition), ("--account", job.account)):
        if word is not None and not _WORD.fullmatch(word):
            wrong.append(Finding(flag, "", f"{word!r} is no name", "letters, digits, . _ , - only"))
    for line in job.more:
        if not line.startswith("-") or "\n" in line:
            wrong.append(Finding("--sbatch", "", f"{line!r} is no option of sbatch", "for example --constraint=h100"))
    if wrong:
        raise SpecError(wrong)


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
