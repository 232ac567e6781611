"""The command as a process of its own, and waiting for what processes and threads do."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")
LIMIT_SECONDS = 900.0
"""No test waits so long, on a busy machine neither; what takes longer has gone wrong."""


def wait_until(event: Callable[[], T], says: Callable[[], object] = lambda: "it never came") -> T:
    """What the event gives once that is true. Looks at it half of the time at most: who is waited for needs the CPU."""
    until = time.monotonic() + LIMIT_SECONDS
    while True:
        began = time.monotonic()
        if found := event():
            return found
        assert began < until, says()
        time.sleep(max(0.01, time.monotonic() - began))


def environment(root: Path, **more: str) -> dict[str, str]:
    """For a command over these runs: with the MLflow beside them, and no GPU."""
    env = os.environ | {"ORCHESTRATE_HOME": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    env.pop("MLFLOW_TRACKING_URI", None)
    return env


def orchestrate(
    root: Path, *arguments: str, stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, **more: str
) -> subprocess.Popen[str]:
    """`orchestrate ARGUMENTS` in a process group of its own; `more` is added to its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        env=environment(root, **more), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True,
        start_new_session=True,
    )  # fmt: skip


def finished(root: Path, *arguments: str, code: int = 0, **more: str) -> tuple[str, str]:
    """What the command wrote to stdout and stderr, once it has ended with this code."""
    process = orchestrate(root, *arguments, **more)
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == code, out + err
    return out, err


def call(root: Path, *arguments: str, **more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command in this process, which costs no start."""
    from orchestrator import cli

    with (
        patch.dict(os.environ, environment(root, **more), clear=True),
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def called(root: Path, *arguments: str, code: int = 0, **more: str) -> tuple[str, str]:
    """As `finished`, in this process."""
    ended, out, err = call(root, *arguments, **more)
    assert ended == code, out + err
    return out, err


def json_of(root: Path, *arguments: str) -> Any:
    return json.loads(called(root, *arguments, "--json")[0])
