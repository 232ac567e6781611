"""GPUs of this machine as `nvidia-smi` reports them, and a message where it does not answer."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 20.0
"""For `nvidia-smi` to answer; with a sick GPU or driver it never does."""
HANGS = "nvidia-smi does not answer: the driver or one of the GPUs hangs"
REMEDY = "look for `Xid` in `dmesg`; restart the machine, or leave that GPU out with CUDA_VISIBLE_DEVICES"


class NvidiaSmiHangs(Exception):
    """`nvidia-smi` did not answer in time."""

    def __init__(self) -> None:
        super().__init__(f"{HANGS} (waited {SECONDS:g} s)")


def query_gpus(fields: str) -> list[str]:
    """One line of CSV per GPU with these fields; empty where there is no `nvidia-smi` or it fails.

    Raises NvidiaSmiHangs where it does not answer in time.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    message = output_of([program, f"--query-gpu={fields}", "--format=csv,noheader"], SECONDS)
    if message is None:
        raise NvidiaSmiHangs
    return [line.strip() for line in message.splitlines() if line.strip()]


def output_of(command: Sequence[str], seconds: float) -> str | None:
    """What the command prints, empty where it fails; None where it does not end in time.

    It is killed then and not waited for: one that hangs inside the kernel does not die of it.
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
    """Bytes of the smallest GPU, asked once per process; None where it is not known: a hang is said on stderr."""
    try:
        lines = query_gpus("memory.total")
    except NvidiaSmiHangs as error:
        sys.stderr.write(f"{error}; the memory of the GPUs is taken as not known ({REMEDY})\n")
        return None
    mebibytes = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]  # "81559 MiB"
    return min(mebibytes) * 2.0**20 if mebibytes else None
