"""GPUs of this machine, found without torch: NVIDIA's, AMD's under ROCm, Apple's; and which a process may use.

NVIDIA: `nvidia-smi` with a timeout for a driver that hangs, else the driver's files. AMD: the topology of the kernel's
driver (/sys/class/kfd), which is HIP's order, with names from amd-smi or rocm-smi. A machine has GPUs of one vendor
here, as in Ray: NVIDIA's before AMD's before Apple's.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SECONDS = 20.0
"""Timeout of the vendors' tools, which may never return with a broken GPU or driver."""
HANGS = "nvidia-smi does not answer: the driver or one of the GPUs hangs"
REMEDY = "look for `Xid` in `dmesg`; restart the machine, or leave that GPU out with CUDA_VISIBLE_DEVICES"
_WSL = Path("/usr/lib/wsl/lib")
"""Where Windows puts nvidia-smi for WSL2, not always on the PATH."""
_DRIVER, _DEVICES = Path("/proc/driver/nvidia"), Path("/dev")
_KFD = Path("/sys/class/kfd/kfd/topology/nodes")
_MIB = 2.0**20
_METAL_SHARE = 2 / 3
"""Share of a Mac's memory that Metal recommends for its GPU at most (recommendedMaxWorkingSetSize)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that processes may open, or a MIG instance of one; "" and None where unknown."""

    vendor: str
    """nvidia, amd or apple."""
    index: str
    """Position in the order of the vendor's tool and variable; of an instance also its own: 0.1."""
    uuid: str = ""
    name: str = ""
    memory: float | None = None
    """Bytes."""
    driver: str = ""
    instances: tuple[Gpu, ...] = ()
    """MIG instances, in which case processes use these and not the GPU."""
    token: str = ""
    """What names it in the variable of visible devices."""

    @property
    def key(self) -> str:
        """What names it among all GPUs of this machine."""
        return re.sub(r"[^\w.-]", "_", self.uuid or f"{self.vendor}-{self.index}")

    @property
    def memory_text(self) -> str:
        """The memory as nvidia-smi prints it; "" where unknown."""
        return "" if self.memory is None else f"{self.memory / _MIB:.0f} MiB"

    def __str__(self) -> str:
        return f"GPU {self.index}{f' ({self.name})' if self.name else ''}"


# --- the vendors' tools ----------------------------------------------------------------------------------------------


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
class _Found:
    gpus: tuple[Gpu, ...] = ()
    hangs: bool = False
    """Whether nvidia-smi did not answer."""


@functools.cache
def _found() -> _Found:
    """Look for GPUs; asked once per process."""
    nvidia = _nvidia_gpus()
    if nvidia.gpus or nvidia.hangs:
        return nvidia
    if gpus := tuple(amd_gpus()) if torch_uses_rocm() else ():
        return _Found(gpus)
    return _Found(tuple(_apple_gpu()))


def forget_gpus() -> None:
    """Have the next call look for GPUs again."""
    for cached in (_found, _report_hanging_driver):
        cached.cache_clear()


# --- NVIDIA ----------------------------------------------------------------------------------------------------------

_LISTED = re.compile(r"^(?:GPU (\d+): (.*)|\s+(MIG .*\S)\s+Device\s+(\d+):) \(UUID: ([^)]+)\)", re.MULTILINE)
_PROFILE = re.compile(r"(\d+)gb")
"""A MIG profile's gigabytes: 3g.40gb; the instance has slightly more in bytes."""


def _nvidia_smi() -> str | None:
    return shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(_WSL))


def _nvidia_gpus() -> _Found:
    program = _nvidia_smi()
    listed = None if program is None else output_of([program, "-L"], SECONDS)
    gpus = list(_parse_list(listed or ""))
    if not gpus:
        return _Found(tuple(_gpus_of_driver()), hangs=program is not None and listed is None)
    assert program is not None
    text = output_of([program, "--query-gpu=uuid,memory.total,driver_version", "--format=csv,noheader"], SECONDS)
    lines = [line.strip().split(", ") for line in (text or "").splitlines()]
    details = {uuid: rest for uuid, *rest in lines if len(rest) == 2}
    return _Found(tuple(_with_details(gpu, *details.get(gpu.uuid, ("", ""))) for gpu in gpus), hangs=text is None)


def _with_details(gpu: Gpu, memory: str, driver: str) -> Gpu:
    number = memory.split()[0] if memory else ""  # "81559 MiB", "[N/A]"
    driver = driver if re.match(r"\d+\.\d", driver) else ""
    instances = tuple(replace(instance, driver=driver) for instance in gpu.instances)
    return replace(gpu, memory=float(number) * _MIB if number.isdecimal() else None, driver=driver, instances=instances)


def _parse_list(text: str) -> Iterator[Gpu]:
    """Parse `nvidia-smi -L`: a line per GPU, below it a line per MIG instance."""
    gpu: Gpu | None = None
    for index, name, profile, number, uuid in _LISTED.findall(text):
        if index:
            if gpu is not None:
                yield gpu
            gpu = Gpu("nvidia", index, uuid, name)
        elif gpu is not None:
            size = _PROFILE.search(profile)
            instance = Gpu(
                "nvidia",
                f"{gpu.index}.{number}",
                uuid,
                f"{gpu.name} {' '.join(profile.split())}",
                float(size[1]) * 1e9 if size else None,
            )
            gpu = replace(gpu, instances=(*gpu.instances, instance))
    if gpu is not None:
        yield gpu


def _gpus_of_driver() -> Iterator[Gpu]:
    """Yield what the driver's files say where nvidia-smi is missing or hangs, as in some containers.

    The driver's list in a container has the host's GPUs: those without a device file are left out. Without the list
    only the numbers of the device files are known.
    """
    version = re.search(r"Module\b.*?\s(\d+\.\d[\d.]*)\s", _text(_DRIVER / "version"))
    driver = "" if version is None else version[1]
    files = sorted((_DRIVER / "gpus").glob("*/information"))
    found: list[Gpu] = []
    for text in map(_text, files):
        read = (re.search(rf"^{f}:\s*(\S.*?)\s*$", text, re.MULTILINE) for f in ("Device Minor", "GPU UUID", "Model"))
        minor, uuid, model = ("" if match is None else match[1] for match in read)
        if minor and (_DEVICES / f"nvidia{minor}").exists():
            found.append(Gpu("nvidia", str(len(found)), uuid, model, driver=driver))
    if not files:
        minors = sorted(int(path.name[6:]) for path in _DEVICES.glob("nvidia[0-9]*") if path.name[6:].isdecimal())
        found = [Gpu("nvidia", str(position), f"nvidia{n}", driver=driver) for position, n in enumerate(minors)]
    yield from found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


# --- AMD -------------------------------------------------------------------------------------------------------------


@functools.cache
def torch_uses_rocm() -> bool:
    """Return whether the installed torch is a build for ROCm; others use no AMD GPU, such as that of a laptop."""
    spec = importlib.util.find_spec("torch")  # finds without importing
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    return (
        folder is not None and re.search(r"^hip\b.*=\s*['\"]", _text(folder / "version.py"), re.MULTILINE) is not None
    )


def amd_gpus() -> Iterator[Gpu]:
    """Yield AMD's GPUs whose device this process has, in HIP's order, whether or not torch uses them."""
    numbered = [(int(node.name), node) for node in _KFD.glob("*") if node.name.isdecimal()]
    nodes = [(_properties(node / "properties"), node) for _, node in sorted(numbered)]
    gpus = [
        (values, node)
        for values, node in nodes
        if values.get("simd_count")  # a CPU's node has none
        and (_DEVICES / "dri" / f"renderD{values.get('drm_render_minor', -1)}").exists()
    ]
    named = _amd_names() if gpus else {}
    ids = [values.get("unique_id", 0) for values, _ in gpus]
    for position, (values, node) in enumerate(gpus):
        unique = values.get("unique_id", 0)
        name, driver = named.get(unique, ("", ""))
        banks = [_properties(bank).get("size_in_bytes", 0) for bank in node.glob("mem_banks/*/properties")]
        yield Gpu(
            "amd",
            str(position),
            # Partitions of one GPU may share its id; the device file is their own.
            f"GPU-{unique:016x}" if unique and ids.count(unique) == 1 else f"renderD{values['drm_render_minor']}",
            name or f"AMD gfx{_gfx(values.get('gfx_target_version', 0))}",
            float(max(banks)) if any(banks) else None,
            driver,
        )


def _properties(file: Path) -> dict[str, int]:
    try:
        lines = _text(file).splitlines()
    except OSError:  # a GPU that the container may not use
        return {}
    return {key: int(value) for key, _, value in (line.partition(" ") for line in lines) if value.strip().isdecimal()}


def _gfx(version: int) -> str:
    """Return the target's name of the kernel's number: 90402 is gfx942, 110000 gfx1100."""
    return f"{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _amd_names() -> Mapping[int, tuple[str, str]]:
    """Return name and driver version by unique id, from amd-smi, else rocm-smi; empty without these."""
    found: dict[int, tuple[str, str]] = {}
    for gpu in _entries(_json("amd-smi", "static", "--asic", "--driver", "--json")):
        asic, driver = gpu.get("asic", {}), gpu.get("driver", {})
        found[_hex(asic.get("asic_serial"))] = (str(asic.get("market_name", "")), str(driver.get("version", "")))
    if not found:
        cards = _json("rocm-smi", "--showproductname", "--showuniqueid", "--showdriverversion", "--json")
        cards = cards if isinstance(cards, dict) else {}
        driver = str(cards.get("system", {}).get("Driver version", ""))
        for card in (values for key, values in cards.items() if key.startswith("card")):
            lower = {key.lower(): str(value) for key, value in card.items()}  # "Card series" before ROCm 6
            found[_hex(lower.get("unique id"))] = (lower.get("card series", ""), driver)
    return found


def _entries(answer: Any) -> list[dict[str, Any]]:
    """Return the GPUs of amd-smi's answer: a list, since ROCm 7 in `gpu_data`."""
    listed = answer.get("gpu_data", []) if isinstance(answer, dict) else answer
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _json(*command: str) -> Any:
    program = shutil.which(command[0]) or shutil.which(command[0], path="/opt/rocm/bin")
    text = "" if program is None else output_of([program, *command[1:]], SECONDS)
    try:
        return json.loads(text or "null")
    except ValueError:  # a tool without the driver prints a sentence
        return None


def _hex(text: Any) -> int:
    return int(str(text), 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]+", str(text)) else 0


# --- Apple -----------------------------------------------------------------------------------------------------------


def _apple_gpu() -> Iterator[Gpu]:
    """Yield the one GPU of a Mac with Apple silicon, which shares the machine's memory."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return
    name, memory = ((output_of(["sysctl", "-n", of], SECONDS) or "").strip() for of in _SYSCTL)
    yield Gpu("apple", "0", "", name, float(memory) * _METAL_SHARE if memory.isdecimal() else None)


_SYSCTL = ("machdep.cpu.brand_string", "hw.memsize")


# --- visible to this process -----------------------------------------------------------------------------------------


def installed_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine that processes may open; looked for once per process."""
    return _found().gpus


def driver_hangs() -> bool:
    """Return whether nvidia-smi did not answer in time; little is known of its GPUs then."""
    return _found().hangs


def visible_devices(
    installed: Sequence[Gpu] | None = None, environment: Mapping[str, str] | None = None
) -> tuple[Gpu, ...]:
    """Return the GPUs and MIG instances that this process may use, each with its `token`, in the variable's order.

    As CUDA and HIP read CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES: indices, prefixes of UUIDs
    and MIG instances; the list ends before the first device that does not exist, such as Slurm's `NoDevFiles`, and a
    device that is named twice hides all. Without the variable a GPU that is divided is its instances. Indices are
    those of the vendor's tool (CUDA_DEVICE_ORDER=PCI_BUS_ID).
    """
    gpus = tuple(installed_gpus() if installed is None else installed)
    environment = os.environ if environment is None else environment
    if not gpus or gpus[0].vendor == "apple":
        return gpus
    if gpus[0].vendor == "amd" and "ROCR_VISIBLE_DEVICES" in environment:
        gpus = tuple(_chosen(environment["ROCR_VISIBLE_DEVICES"], gpus))  # HIP numbers what this leaves
    allowed = environment.get(visibility_variable(gpus[0].vendor if gpus else "", environment))
    if allowed is not None:
        return tuple(_chosen(allowed, gpus))
    each = [device for gpu in gpus for device in gpu.instances or (gpu,)]
    if each and each[0].vendor == "amd":
        return tuple(replace(gpu, token=str(position)) for position, gpu in enumerate(each))
    return tuple(replace(gpu, token=gpu.uuid if gpu.uuid.startswith(("GPU-", "MIG-")) else gpu.index) for gpu in each)


def only_visible_in(variable: str) -> None:
    """Have this variable alone list the GPUs that this process may use, and not the other that HIP reads too."""
    tokens = [gpu.token for gpu in visible_devices()]
    for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    os.environ[variable] = ",".join(tokens)


def visibility_variable(vendor: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the variable that lists the visible devices; HIP reads CUDA's name too where its own is not set."""
    environment = os.environ if environment is None else environment
    if vendor == "amd" and ("HIP_VISIBLE_DEVICES" in environment or "CUDA_VISIBLE_DEVICES" not in environment):
        return "HIP_VISIBLE_DEVICES"
    return "CUDA_VISIBLE_DEVICES"


def _chosen(allowed: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    chosen: list[Gpu] = []
    for name in map(str.strip, allowed.split(",")):
        device = _device(name, gpus)
        if device is None:
            break
        if device.key in {one.key for one in chosen}:
            return []
        chosen.append(device)
    return chosen


def _device(name: str, gpus: Sequence[Gpu]) -> Gpu | None:
    if name.isdecimal():
        if int(name) >= len(gpus):
            return None
        gpu = gpus[int(name)]
        # CUDA uses the first instance of a GPU that is divided.
        return replace(gpu.instances[0], token=gpu.instances[0].uuid) if gpu.instances else replace(gpu, token=name)
    if name.startswith("MIG-GPU-"):  # of drivers before 470: MIG-GPU-UUID/GI/CI
        for gpu in gpus:
            if gpu.uuid and name.startswith(f"MIG-{gpu.uuid}/"):
                return replace(gpu, index=f"{gpu.index}.{name.partition('/')[2]}", uuid=name, memory=None, token=name)
        return None
    of_instances = name.startswith("MIG-")
    if not of_instances and not name.startswith("GPU-"):
        return None
    among = [device for gpu in gpus for device in (gpu.instances if of_instances else (gpu,))]
    matching = [device for device in among if device.uuid.startswith(name)]
    return replace(matching[0], token=name) if len(matching) == 1 else None


def visible_gpus() -> int:
    """Return the number of GPUs and MIG instances visible to this process."""
    return len(visible_devices())


def hidden_gpus() -> str:
    """Return a message if a variable hides all GPUs, or names some that do not exist; else ""."""
    installed = installed_gpus()
    names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    if installed and installed[0].vendor == "nvidia":
        names = names[-1:]
    found = [f"{name}={os.environ[name]!r}" for name in names if name in os.environ]
    if not found or visible_devices():
        return ""
    if installed:
        many = "1 GPU" if len(installed) == 1 else f"{len(installed)} GPUs"
        return f"{' '.join(found)} hides this machine's {many}: trials run on the CPU"
    if any(re.match(r"['\"](\d|GPU-|MIG-)", setting.partition("=")[2].strip()) for setting in found):
        return f"{' '.join(found)}, but this machine has no GPU: trials run on the CPU"
    return ""


@functools.cache
def _report_hanging_driver() -> None:
    sys.stderr.write(f"{HANGS} (waited {SECONDS:g} s); the GPUs' memory is treated as unknown ({REMEDY})\n")


def smallest_memory(environment: Mapping[str, str] | None = None) -> float | None:
    """Return the memory in bytes of the smallest GPU that is visible with these variables, by default this process's.

    None if unknown; a driver that hangs is reported on stderr, once per process.
    """
    if driver_hangs():
        _report_hanging_driver()
    known = [gpu.memory for gpu in visible_devices(environment=environment) if gpu.memory is not None]
    return min(known) if known else None
