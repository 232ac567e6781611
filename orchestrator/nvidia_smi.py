"""GPUs of this machine as `nvidia-smi` reports them, with a timeout for a driver that hangs."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.results import clause

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
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace"
    )
    try:
        message, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        assert process.stdout is not None
        process.stdout.close()
        return None
    return message if process.returncode == 0 else ""


@dataclass(frozen=True, slots=True)
class InstalledGpu:
    """A GPU that processes may open, and its MIG instances, by UUID; "" where unknown."""

    uuid: str
    instances: tuple[str, ...] = ()


_LINE = re.compile(r"^(GPU \d+|\s+MIG\b).*\(UUID: ([^)]+)\)", re.MULTILINE)
_DRIVER, _DEVICES = Path("/proc/driver/nvidia/gpus"), Path("/dev")


@functools.cache
def installed_gpus() -> tuple[InstalledGpu, ...]:
    """Return the GPUs of this machine that processes may open; asked once per process.

    From nvidia-smi. Without its answer from the NVIDIA driver, whose list in a container has the host's GPUs: those
    without a device file are left out.
    """
    program = shutil.which("nvidia-smi")
    listed = list(_parse_list(output_of([program, "-L"], SECONDS) or "")) if program is not None else []
    return tuple(listed or _gpus_of_driver())


def _parse_list(text: str) -> Iterator[InstalledGpu]:
    uuid, instances = "", []
    for kind, name in _LINE.findall(text):
        if not kind.startswith("GPU"):
            instances.append(name)
            continue
        if uuid:
            yield InstalledGpu(uuid, tuple(instances))
        uuid, instances = name, []
    if uuid:
        yield InstalledGpu(uuid, tuple(instances))


def _gpus_of_driver() -> Iterator[InstalledGpu]:
    for file in sorted(_DRIVER.glob("*/information")):
        text = file.read_text(encoding="utf-8", errors="replace")
        uuid, minor = (re.search(rf"^{field}:\s*(\S+)", text, re.MULTILINE) for field in ("GPU UUID", "Device Minor"))
        if minor is not None and (_DEVICES / f"nvidia{minor[1]}").exists():
            yield InstalledGpu("" if uuid is None else uuid[1])


def count_visible(allowed: str | None, installed: Sequence[InstalledGpu]) -> int:
    """Return how many devices CUDA offers with `allowed` as CUDA_VISIBLE_DEVICES; None: the variable is not set.

    Indices, prefixes of UUIDs and MIG instances; the list ends before the first device that does not exist, such as
    Slurm's `NoDevFiles`, and a device that is named twice hides all.
    """
    if allowed is None:
        return len(installed)
    chosen: list[str] = []
    for name in map(str.strip, allowed.split(",")):
        device = _device(name, installed)
        if device is None:
            break
        if device in chosen:
            return 0
        chosen.append(device)
    return len(chosen)


def _device(name: str, installed: Sequence[InstalledGpu]) -> str | None:
    if name.isdecimal():
        return str(int(name)) if int(name) < len(installed) else None
    if name.startswith("MIG-GPU-"):  # of drivers before 470: MIG-GPU-UUID/GI/CI
        return name if any(gpu.uuid and name.startswith(f"MIG-{gpu.uuid}/") for gpu in installed) else None
    if name.startswith("MIG-"):
        known = [instance for gpu in installed for instance in gpu.instances if instance.startswith(name)]
        return known[0] if len(known) == 1 else None
    if name.startswith("GPU-"):
        matching = [str(index) for index, gpu in enumerate(installed) if gpu.uuid.startswith(name)]
        return matching[0] if len(matching) == 1 else None
    return None


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs visible to this process, without importing torch."""
    return count_visible(os.environ.get("CUDA_VISIBLE_DEVICES"), installed_gpus())


def hidden_gpus() -> str:
    """Return a message if CUDA_VISIBLE_DEVICES hides all GPUs, or names some that do not exist; else ""."""
    allowed, installed = os.environ.get("CUDA_VISIBLE_DEVICES"), installed_gpus()
    if allowed is None or count_visible(allowed, installed):
        return ""
    if installed:
        return f"CUDA_VISIBLE_DEVICES={allowed!r} hides this machine's {len(installed)} GPUs: trials run on the CPU"
    if re.match(r"\d|GPU-|MIG-", allowed.strip()):
        return f"CUDA_VISIBLE_DEVICES={allowed!r}, but this machine has no GPU: trials run on the CPU"
    return ""


@functools.cache
def smallest_memory() -> float | None:
    """Return the memory in bytes of the smallest GPU, queried once per process.

    None if unknown; a driver that hangs is reported on stderr.
    """
    try:
        lines = query_gpus("memory.total")
    except NvidiaSmiHangs as error:
        sys.stderr.write(f"{clause(error)}; the GPUs' memory is treated as unknown ({REMEDY})\n")
        return None
    mebibytes = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]  # "81559 MiB"
    return min(mebibytes) * 2.0**20 if mebibytes else None
