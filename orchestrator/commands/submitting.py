"""Hand a rendered job to the scheduler's own command, and say what it says."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import OrchestrateError
from orchestrator.folders import fresh
from orchestrator.spec.sweep import SweepSpec
from orchestrator.tracking.secrets import redact


class NotSubmitted(OrchestrateError):
    """The scheduler's command is missing or refused."""


def submit(text: str, command: Sequence[str]) -> str:
    """Give the command these bytes on its stdin; what it answered."""
    program = shutil.which(command[0])
    if program is None:
        raise NotSubmitted(f"{command[0]} is not on this machine: submit where it is, or pipe `orchestrate plan` to it")
    done = subprocess.run([program, *command[1:]], input=text.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        raise NotSubmitted(f"{command[0]} refused ({done.returncode}): {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace").strip()


def check_free(spec: SweepSpec, root: Path) -> None:
    """NameTaken where the runs folder has a sweep of this name: better said now than in the job."""
    fresh(root, spec.name)


def cautions(spec: SweepSpec) -> list[str]:
    """What a sweep of several machines needs and its file does not give."""
    said: list[str] = []
    if spec.storage is None:
        said.append(
            "the study will be SQLite in the runs folder, which is refused on a network disk; "
            "give --set storage=postgresql+psycopg://USER@HOST/DATABASE"
        )
    if spec.mirror is None:
        said.append(
            "checkpoints will be in the runs folder only, on a disk that all machines share and that outlives the job; "
            "for copies elsewhere give --set mirror=s3://BUCKET/PREFIX"
        )
    if spec.tracking.uri is None:
        said.append(
            "MLflow will be SQLite in the runs folder; on a network disk give --set tracking.uri=http://HOST:PORT"
        )
    elif redact(spec.tracking.uri) != spec.tracking.uri:
        said.append(
            "tracking.uri carries a password, in this job for everybody to read; leave it out and give the job "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return said
