"""`nvidia-smi` that answers, is missing, or hangs: each is answered."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import nvidia_smi
from orchestrator.commands.doctor import gpu_checks
from orchestrator.commands.doctor.machine_checks import CheckLevel
from orchestrator.execution import slots
from orchestrator.tracking.run_metadata import environment

Says = Callable[[str], None]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Says]:
    """A machine with one GPU whose nvidia-smi runs this line of shell."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(nvidia_smi, "SECONDS", 0.2)
    nvidia_smi.smallest_memory.cache_clear()

    def say(line: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)

    yield say
    nvidia_smi.smallest_memory.cache_clear()


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
