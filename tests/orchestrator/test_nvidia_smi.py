"""`nvidia-smi` that answers, is missing, or hangs: each is answered."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import nvidia_smi
from orchestrator.commands.doctor import gpu_checks
from orchestrator.commands.doctor.machine_checks import CheckLevel
from orchestrator.execution import slots
from orchestrator.execution.workers import attempt_runner
from orchestrator.execution.workers.session_factory import GpuMissing, session_factory
from orchestrator.tracking.run_metadata import environment

Says = Callable[[str], None]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Says]:
    """A machine with one GPU whose nvidia-smi runs this line of shell."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(nvidia_smi, "SECONDS", 0.2)
    for asked_once in (nvidia_smi.smallest_memory, nvidia_smi.installed_gpus):
        asked_once.cache_clear()

    def say(line: str) -> None:
        program = tmp_path / "nvidia-smi"
        listed = "echo 'GPU 0: Card (UUID: GPU-1)'; exit" if "sleep" not in line else "exit"
        program.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then {listed}; fi\n{line}\n')
        program.chmod(0o755)

    proc = tmp_path / "gpus" / "0000:01:00.0"
    proc.mkdir(parents=True)
    (proc / "information").write_text("Model: \t Card\nGPU UUID: \t GPU-1\nDevice Minor: \t 0\n")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(nvidia_smi, "_DRIVER", tmp_path / "gpus")
    monkeypatch.setattr(nvidia_smi, "_DEVICES", tmp_path)
    yield say
    for asked_once in (nvidia_smi.smallest_memory, nvidia_smi.installed_gpus):
        asked_once.cache_clear()


def test_the_memory_of_the_smallest_gpu(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_smi, "SECONDS", 60.0)
    says("printf '81559 MiB\\n40960 MiB\\n'")
    assert slots.gpu_memory() == 40960 * 2.0**20


@pytest.mark.parametrize("line", ["exit 9", "echo '[N/A]'", "true"])
def test_an_nvidia_smi_that_fails_says_nothing(says: Says, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_smi, "SECONDS", 60.0)
    says(line)
    assert slots.gpu_memory() is None


def test_one_that_hangs_is_answered_once_in_a_sentence(says: Says, capsys: pytest.CaptureFixture[str]) -> None:
    says("exec sleep 600")
    with pytest.raises(nvidia_smi.NvidiaSmiHangs, match="does not answer"):
        nvidia_smi.query_gpus("name")
    assert slots.gpu_memory() is None
    assert slots.gpu_memory() is None
    logged = capsys.readouterr().err.splitlines()
    assert len(logged) == 1, "once, however often it is asked"
    assert "the driver or one of the GPUs hangs" in logged[0]
    assert "dmesg" in logged[0]


def test_the_doctor_names_a_driver_that_hangs_and_asks_it_no_more(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    says("exec sleep 600")
    torch = pytest.importorskip("torch")

    def requested() -> bool:
        raise AssertionError("torch would hang as well")

    monkeypatch.setattr(torch.cuda, "is_available", requested)
    (check,) = gpu_checks.gpu_checks(None)
    assert (check.what, check.level) == ("driver", CheckLevel.FAIL)
    assert "does not answer" in check.found
    assert "dmesg" in check.fix


def test_the_environment_of_a_sweep_says_so(says: Says) -> None:
    says("exec sleep 600")
    (found,) = environment()["gpus"]
    assert "does not answer" in found


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa11)
  MIG 3g.40gb     Device  0: (UUID: MIG-c1)
  MIG 3g.40gb     Device  1: (UUID: MIG-c2)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aa22)
"""


@pytest.mark.parametrize(
    ("allowed", "count"),
    [
        (None, 2), ("", 0), ("NoDevFiles", 0), ("-1", 0), ("0", 1), ("1,0", 2), ("0,7", 1), ("7,0", 0), ("0,-1,1", 1),
        ("0,0", 0), ("GPU-aa11", 1), ("GPU-aa1,GPU-aa2", 2), ("GPU-aa", 0), ("GPU-bb", 0), ("MIG-c1,MIG-c2", 2),
        ("MIG-d", 0), ("MIG-GPU-aa22/1/0", 1), ("MIG-GPU-bb/1/0", 0), ("all", 0),
    ],
)  # fmt: skip
def test_devices_are_counted_as_cuda_counts_them(allowed: str | None, count: int) -> None:
    installed = tuple(nvidia_smi._parse_list(LISTED))  # pyright: ignore[reportPrivateUsage]
    assert nvidia_smi.count_visible(allowed, installed) == count
    if allowed is not None:
        assert nvidia_smi.count_visible(allowed, ()) == 0, "no GPU is no GPU"


def test_a_container_without_the_hosts_gpus_has_none(says: Says, tmp_path: Path) -> None:
    says("exec sleep 600")
    (tmp_path / "nvidia0").unlink()
    assert nvidia_smi.visible_gpus() == 0
    assert "no GPU" in nvidia_smi.hidden_gpus()


@pytest.mark.parametrize(("allowed", "said"), [("", "hides this machine's 1 GPUs"), ("NoDevFiles", "hides"), ("0", "")])
def test_hidden_gpus_are_said(says: Says, monkeypatch: pytest.MonkeyPatch, allowed: str, said: str) -> None:
    says("true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    message = nvidia_smi.hidden_gpus()
    assert said in message
    assert bool(message) == bool(said)


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
