"""GPUs of this machine as `nvidia-smi` reports them, with a timeout for a driver that hangs."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 20.0
"""Timeout of `nvidia-smi`, which may never return with a broken GPU or driver."""
HANGS = "nvidia-smi does not answer: the driver or one of the GPUs hangs"
REMEDY = "look for `Xid` in `dmesg`; restart the machine, or leave that GPU out with CUDA_VISIBLE_DEVICES"


class NvidiaSmiHangs(Exception):
    """`nvidia-smi` did not return in time."""

    def __init__(self) -> None:
        super().__init__(f"{HANGS} (waited {SECONDS:g} s)")


def query_gpus(fields: str) -> list[str]:
    """Return one line of CSV per GPU with these fields; empty if `nvidia-smi` is missing or fails.

    Raises NvidiaSmiHangs if it does not return in time.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    message = output_of([program, f"--query-gpu={fields}", "--format=csv,noheader"], SECONDS)
    if message is None:
        raise NvidiaSmiHangs
    return [line.strip() for line in message.splitlines() if line.strip()]


def output_of(command: Sequence[str], seconds: float) -> str | None:
    """Return what the command prints, "" if it fails, None if it does not end within `seconds`.

    A command that runs too long is killed and not waited for: a process that hangs inside the kernel ignores SIGKILL.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        message, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        assert process.stdout is not None
        process.stdout.close()
        return None
    return message if process.returncode == 0 else ""


@functools.cache
def smallest_memory() -> float | None:
    """Return the memory in bytes of the smallest GPU, queried once per process.

    None if unknown; a driver that hangs is reported on stderr.
    """
    try:
        lines = query_gpus("memory.total")
    except NvidiaSmiHangs as error:
        sys.stderr.write(f"{error}; the GPUs' memory is treated as unknown ({REMEDY})\n")
        return None
    mebibytes = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]  # "81559 MiB"
    return min(mebibytes) * 2.0**20 if mebibytes else None
