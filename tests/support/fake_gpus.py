"""Machines with GPUs that are not there: tools on the PATH that print what the real ones print."""

import json
import os
from pathlib import Path

import pytest

from orchestrator import gpus

LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa11)
  MIG 3g.40gb     Device  0: (UUID: MIG-c1)
  MIG 3g.40gb     Device  1: (UUID: MIG-c2)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aa22)
"""
"""`nvidia-smi -L` on a machine whose first GPU is divided."""


def write_tool(folder: Path, name: str, script: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def write_nvidia_smi(folder: Path, listed: str, driver: str = "580.65.06", memory: str = "81559 MiB") -> None:
    """An nvidia-smi that prints `listed` for -L and as many lines for a query; answers no other question."""
    uuids = [line.split("UUID: ")[1].rstrip(")") for line in listed.splitlines() if line.startswith("GPU")]
    rows = "\\n".join(f"{uuid}, {memory}, {driver}" for uuid in uuids)
    write_tool(
        folder,
        "nvidia-smi",
        f"if [ \"$*\" = -L ]; then printf '%b' '{listed}'\n"
        "elif [ \"$*\" = '--query-gpu=uuid,memory.total,driver_version --format=csv,noheader' ]; then"
        f" printf '{rows}\\n'\nelse exit 2; fi",
    )


def nvidia_list(count: int) -> str:
    """`nvidia-smi -L` of so many cards."""
    return "".join(f"GPU {i}: NVIDIA A100-SXM4-80GB (UUID: GPU-{i:08x}-0000)\\n" for i in range(count)).replace(
        "\\n", "\n"
    )


class FakeMachine:
    """An empty machine in `folder`: no GPU, no tool but those that are written, no variable of visible devices."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.tools, self.devices = folder / "tools", folder / "dev"
        self.driver, self.kfd = folder / "proc", folder / "kfd"
        for path in (self.tools, self.devices / "dri", self.driver / "gpus", self.kfd):
            path.mkdir(parents=True)
        for name, path in (("_DRIVER", self.driver), ("_DEVICES", self.devices), ("_KFD", self.kfd)):
            monkeypatch.setattr(gpus, name, path)
        monkeypatch.setattr(gpus, "_WSL", folder / "wsl")
        monkeypatch.setattr(gpus, "SECONDS", 60.0)
        monkeypatch.setattr(gpus, "torch_uses_rocm", lambda: False)
        monkeypatch.setenv("PATH", str(self.tools), prepend=os.pathsep)
        monkeypatch.setenv("ORCHESTRATE_GPU_LOCKS", str(folder / "locks"))
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        gpus.forget_gpus()

    def has_nvidia(self, listed: str = LISTED, **more: str) -> None:
        write_nvidia_smi(self.tools, listed, **more)
        gpus.forget_gpus()

    def has_driver_files(self, minor: int, *, device: bool = True) -> None:
        """The driver's file of a GPU, as a container shows it for every GPU of the host."""
        path = self.driver / "gpus" / f"0000:0{minor + 1}:00.0" / "information"
        path.parent.mkdir()
        path.write_text(f"Model: \t\t NVIDIA L4\nGPU UUID: \t GPU-{minor}\nDevice Minor: \t {minor}\n")
        if device:
            (self.devices / f"nvidia{minor}").touch()
        gpus.forget_gpus()

    def has_amd(self, count: int, *, unique: int = 0x2F1C00) -> None:
        """The kernel's topology: a CPU, then GPUs from the kernel's node 1 on, in the reverse of rocm-smi's order."""
        self.has_kfd_node(0, cpu_cores_count=64, simd_count=0)
        for i in range(count):
            minor = 128 + 8 * i
            (self.devices / "dri" / f"renderD{minor}").touch()
            values = {"simd_count": 1216, "gfx_target_version": 90402, "drm_render_minor": minor}
            node = self.has_kfd_node(i + 1, cpu_cores_count=0, unique_id=unique + i, **values)
            (node / "mem_banks" / "0").mkdir(parents=True)
            (node / "mem_banks" / "0" / "properties").write_text("heap_type 1\nsize_in_bytes 206141652992\nflags 0\n")
        self._patch.setattr(gpus, "torch_uses_rocm", lambda: True)
        gpus.forget_gpus()

    def has_kfd_node(self, number: int, **values: int) -> Path:
        node = self.kfd / str(number)
        node.mkdir()
        (node / "properties").write_text("".join(f"{key} {value}\n" for key, value in values.items()))
        return node

    def has_json_tool(self, name: str, answer: object) -> None:
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(answer))
        write_tool(self.tools, name, f"cat {file}")
        gpus.forget_gpus()
