"""GPUs of machines that are not there, as the vendors' tools and the kernel describe them; tools that fail or hang."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import gpus
from orchestrator.commands.doctor import gpu_checks
from orchestrator.commands.doctor.machine_checks import CheckLevel
from orchestrator.execution import local_cluster, slots
from orchestrator.execution.workers import attempt_runner
from orchestrator.execution.workers.session_factory import GpuMissing, session_factory
from orchestrator.gpu_locks import reserved_gpus
from orchestrator.gpus import Gpu, hidden_gpus, installed_gpus, visible_devices, visible_gpus
from orchestrator.tracking.run_metadata import environment
from tests.support.fake_gpus import LISTED, FakeMachine, write_nvidia_smi, write_tool

HANGS = "exec sleep 600"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    yield FakeMachine(tmp_path, monkeypatch)
    gpus.forget_gpus()


# --- NVIDIA ----------------------------------------------------------------------------------------------------------


def test_name_memory_and_driver_are_those_of_nvidia_smi(machine: FakeMachine) -> None:
    machine.has_nvidia()
    divided, whole = installed_gpus()
    assert (whole.index, whole.uuid, whole.name) == ("1", "GPU-aa22", "NVIDIA H100 80GB HBM3")
    assert (whole.memory, whole.driver) == (81559 * 2.0**20, "580.65.06")
    assert [(i.index, i.uuid, i.memory, i.driver) for i in divided.instances] == [
        ("0.0", "MIG-c1", 40e9, "580.65.06"),
        ("0.1", "MIG-c2", 40e9, "580.65.06"),
    ]
    assert environment()["gpus"] == ["NVIDIA H100 80GB HBM3, 81559 MiB, 580.65.06"] * 2


def test_the_memory_is_that_of_the_smallest_gpu_that_is_visible(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has_nvidia()
    assert slots.gpu_memory() == 40e9
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpus.forget_gpus()
    assert slots.gpu_memory() == 81559 * 2.0**20


def test_wsl_has_its_tool_in_a_folder_of_windows(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.tools))
    (machine.folder / "wsl").mkdir()
    write_nvidia_smi(machine.folder / "wsl", "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)\n", memory="24564 MiB")
    assert [(gpu.name, gpu.memory) for gpu in visible_devices()] == [("NVIDIA GeForce RTX 4090", 24564 * 2.0**20)]


def test_a_container_without_nvidia_smi_has_what_the_drivers_files_say(machine: FakeMachine) -> None:
    (machine.driver / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\nGCC: 12\n")
    machine.has_driver_files(0, device=False)  # a GPU of the host that the container was not given
    machine.has_driver_files(1)
    assert installed_gpus() == (Gpu("nvidia", "0", "GPU-1", "NVIDIA L4", None, "580.65.06"),)


def test_device_files_alone_are_gpus_of_which_nothing_else_is_known(machine: FakeMachine) -> None:
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (machine.devices / name).touch()
    assert [(gpu.index, gpu.uuid, gpu.memory, gpu.token) for gpu in visible_devices()] == [
        ("0", "nvidia0", None, "0"),
        ("1", "nvidia3", None, "1"),
    ]
    assert slots.gpu_memory() is None


@pytest.mark.parametrize("line", ["exit 9", "echo '[N/A]'", "true"])
def test_an_nvidia_smi_that_fails_says_nothing(machine: FakeMachine, line: str) -> None:
    write_tool(machine.tools, "nvidia-smi", line)
    machine.has_driver_files(0)
    assert (visible_gpus(), slots.gpu_memory()) == (1, None)


def test_one_that_hangs_is_answered_once_in_a_sentence(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpus, "SECONDS", 0.2)
    write_tool(machine.tools, "nvidia-smi", HANGS)
    machine.has_driver_files(0)
    assert slots.gpu_memory() is None
    assert slots.gpu_memory() is None
    logged = capsys.readouterr().err.splitlines()
    assert len(logged) == 1, "once, however often it is asked"
    assert "the driver or one of the GPUs hangs" in logged[0]
    assert "dmesg" in logged[0]
    (found,) = environment()["gpus"]
    assert "does not answer" in found


def test_the_doctor_names_a_driver_that_hangs_and_asks_it_no_more(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "SECONDS", 0.2)
    write_tool(machine.tools, "nvidia-smi", HANGS)
    torch = pytest.importorskip("torch")

    def requested() -> bool:
        raise AssertionError("torch would hang as well")

    monkeypatch.setattr(torch.cuda, "is_available", requested)
    (check,) = gpu_checks.gpu_checks(None)
    assert (check.what, check.level) == ("driver", CheckLevel.FAIL)
    assert "does not answer" in check.found
    assert "dmesg" in check.fix


@pytest.mark.parametrize(
    ("allowed", "tokens"),
    [
        (None, "MIG-c1 MIG-c2 GPU-aa22"), ("", ""), ("NoDevFiles", ""), ("-1", ""), ("0", "MIG-c1"),
        ("1,0", "1 MIG-c1"), ("1,7", "1"), ("7,0", ""), ("1,-1,0", "1"), ("1,1", ""), ("1,GPU-aa22", ""),
        ("0,MIG-c1", ""),
        ("GPU-aa22", "GPU-aa22"), ("GPU-aa2,GPU-aa1", "GPU-aa2 GPU-aa1"), ("GPU-aa", ""), ("GPU-bb", ""),
        ("MIG-c1,MIG-c2", "MIG-c1 MIG-c2"), ("MIG-d", ""), ("MIG-GPU-aa22/1/0", "MIG-GPU-aa22/1/0"),
        ("MIG-GPU-bb/1/0", ""), ("all", ""),
    ],
)  # fmt: skip
def test_devices_are_counted_as_cuda_counts_them(machine: FakeMachine, allowed: str | None, tokens: str) -> None:
    machine.has_nvidia(LISTED)
    variables = {} if allowed is None else {"CUDA_VISIBLE_DEVICES": allowed}
    assert [gpu.token for gpu in visible_devices(environment=variables)] == tokens.split()
    assert visible_devices((), variables) == (), "no GPU is no GPU"


def test_a_container_without_the_hosts_gpus_has_none(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has_driver_files(0, device=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_gpus() == 0
    assert "CUDA_VISIBLE_DEVICES='0', but this machine has no GPU" in hidden_gpus()


@pytest.mark.parametrize(("allowed", "said"), [("", "hides this machine's 2 GPUs"), ("NoDevFiles", "hides"), ("0", "")])
def test_hidden_gpus_are_said(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, allowed: str, said: str) -> None:
    machine.has_nvidia()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    message = hidden_gpus()
    assert said in message
    assert bool(message) == bool(said)


# --- AMD -------------------------------------------------------------------------------------------------------------

AMD_SMI = [
    {
        "gpu": 0,
        "asic": {"market_name": "AMD Instinct MI300X", "asic_serial": "0x2F1C01"},
        "driver": {"version": "6.12"},
    },
    {
        "gpu": 1,
        "asic": {"market_name": "AMD Instinct MI300X", "asic_serial": "0x2F1C00"},
        "driver": {"version": "6.12"},
    },
]
ROCM_SMI = {
    "card0": {"Unique ID": "0x2f1c00", "Card Series": "AMD Instinct MI300X OAM", "Card SKU": "M3000100"},
    "card1": {"Unique ID": "0x2f1c01", "Card series": "AMD Instinct MI300X OAM"},
    "system": {"Driver version": "6.10.5"},
}


def test_amds_gpus_are_the_kernels_with_the_names_of_a_tool(machine: FakeMachine) -> None:
    machine.has_amd(2)
    assert [(gpu.uuid, gpu.name, gpu.driver) for gpu in visible_devices()] == [
        ("GPU-00000000002f1c00", "AMD gfx942", ""),
        ("GPU-00000000002f1c01", "AMD gfx942", ""),
    ], "without a tool"
    assert slots.gpu_memory() == 206141652992
    machine.has_json_tool("rocm-smi", ROCM_SMI)
    assert {(gpu.name, gpu.driver) for gpu in installed_gpus()} == {("AMD Instinct MI300X OAM", "6.10.5")}
    for answer in (AMD_SMI, {"gpu_data": AMD_SMI}):
        machine.has_json_tool("amd-smi", answer)
        assert {(gpu.name, gpu.driver) for gpu in installed_gpus()} == {("AMD Instinct MI300X", "6.12")}
    for sentence in ("ERROR: amdgpu driver is not loaded", [1], None):
        machine.has_json_tool("amd-smi", sentence)
        assert {gpu.driver for gpu in installed_gpus()} == {"6.10.5"}


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({}, "0:0 1:1 2:2"),
        ({"HIP_VISIBLE_DEVICES": "2,0"}, "2:2 0:0"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "1:1"),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "2"}, "2:2"),
        ({"ROCR_VISIBLE_DEVICES": "2,1"}, "2:0 1:1"),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "1"}, "1:1"),
        ({"ROCR_VISIBLE_DEVICES": "GPU-00000000002f1c02"}, "2:0"),
        ({"ROCR_VISIBLE_DEVICES": "7"}, ""),
        ({"HIP_VISIBLE_DEVICES": "-1"}, ""),
    ],
)
def test_rocr_chooses_first_and_hip_numbers_what_is_left(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], chosen: str
) -> None:
    machine.has_amd(3)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert " ".join(f"{gpu.index}:{gpu.token}" for gpu in visible_devices()) == chosen
    assert bool(hidden_gpus()) == (not chosen)
    assert all(f"{name}={value!r}" in hidden_gpus() for name, value in variables.items() if not chosen)


def test_ray_gives_amds_gpus_by_the_one_variable_that_it_knows(
    machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray refuses ROCR_VISIBLE_DEVICES without HIP's; HIP prefers its own variable to CUDA's, which Ray may set."""
    machine.has_amd(3)
    monkeypatch.setenv("ORCHESTRATE_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "2,1")
    with reserved_gpus("a", 1, 1, waits=False, on_wait=lambda _: None) as (held,):
        assert (held.index, os.environ["HIP_VISIBLE_DEVICES"]) == ("2", "0")
        for variable, other in (
            ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
            ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        ):
            gpus.only_visible_in(variable)
            assert (os.environ[variable], other in os.environ) == ("0", False)
            assert [gpu.index for gpu in visible_devices()] == ["2"]
    assert "HIP_VISIBLE_DEVICES" not in os.environ
    assert local_cluster._variable_of_ray() == "CUDA_VISIBLE_DEVICES", "where AMD's library is not installed"


def test_an_amd_gpu_counts_only_for_a_torch_that_uses_it_and_where_its_device_is(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has_amd(2)
    (machine.devices / "dri" / "renderD128").unlink()  # the container was not given the first
    assert [gpu.uuid for gpu in visible_devices()] == ["GPU-00000000002f1c01"]
    monkeypatch.setattr(gpus, "torch_uses_rocm", lambda: False)
    gpus.forget_gpus()
    assert visible_devices() == (), "a laptop's, beside the usual torch"


def test_partitions_of_one_amd_gpu_are_told_apart_by_their_device_files(machine: FakeMachine) -> None:
    machine.has_amd(2)
    for number in (1, 2):
        file = machine.kfd / str(number) / "properties"
        file.write_text("".join(line for line in file.read_text().splitlines(True) if "unique" not in line))
        file.open("a").write("unique_id 7\n")
    assert [gpu.key for gpu in installed_gpus()] == ["renderD128", "renderD136"]


def test_the_doctor_names_gpus_that_torch_does_not_use_and_locks_that_cannot_be_used(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has_amd(2)
    monkeypatch.setattr(gpus, "torch_uses_rocm", lambda: False)
    gpus.forget_gpus()
    (check,) = gpu_checks.each_gpu()
    assert (check.level, check.found) == (CheckLevel.WARN, "2: AMD gfx942; torch is no build for ROCm")
    (machine.folder / "locks").touch()
    monkeypatch.setenv("ORCHESTRATE_GPU_LOCKS", str(machine.folder / "locks"))
    machine.has_nvidia("GPU 0: NVIDIA L4 (UUID: GPU-1)\n")
    locks, card = gpu_checks.each_gpu()
    assert (locks.what, locks.level) == ("gpu locks", CheckLevel.FAIL)
    assert locks.fix.startswith("remove it, or set ORCHESTRATE_GPU_LOCKS")
    assert card.found == "NVIDIA L4, 79.6 GiB, GPU-1"


# --- Apple -----------------------------------------------------------------------------------------------------------


def test_a_mac_has_one_gpu_with_two_thirds_of_its_memory(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(gpus.platform, "machine", lambda: "arm64")
    write_tool(machine.tools, "sysctl", 'case "$2" in hw.memsize) echo 34359738368;; *) echo "Apple M3 Pro";; esac')
    gpus.forget_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (gpu,) = visible_devices()
    assert (gpu.vendor, gpu.name, gpu.memory) == ("apple", "Apple M3 Pro", pytest.approx(2 / 3 * 32 * 2**30))


# --- trials ----------------------------------------------------------------------------------------------------------


def test_a_trial_that_was_promised_a_gpu_and_has_none_fails_with_both_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("torch").cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def opened(_: Path) -> attempt_runner.Session:
        raise AssertionError("it would train on the CPU")

    for promised in (1.0, 0.5):
        open_session = session_factory(opened, slots.Slots(count=1, gpus=promised, threads=1))
        with pytest.raises(GpuMissing, match=rf"promised {promised:g} GPU.*finds none.*CUDA_VISIBLE_DEVICES is '0'"):
            open_session(tmp_path)
