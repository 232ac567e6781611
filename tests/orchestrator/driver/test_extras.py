"""Packages that only some trials need: a sweep that lacks one is refused before anything starts."""

from collections.abc import Callable

import pytest

from orchestrator.commands.doctor import gpu_checks
from orchestrator.commands.doctor.machine_checks import CheckLevel
from orchestrator.driver import preflight
from orchestrator.driver.preflight import check_extras
from orchestrator.errors import ExitCode, SpecError
from orchestrator.spec.sweep_spec import SweepSpec

TEXT = """
base:
  model: {generated: {}}
  data: {train: {generated: instructions, rows: 24}, max_length: 96}
  training: {max_steps: 3, pairs_per_update: 4}
"""
SFT = "sft={training: {max_steps: 2, pairs_per_update: 4, distributed: zero3}}"
TWO, ZERO3 = "resources.processes_per_trial=2", "training.distributed=zero3"
ASKED = [(TWO, ZERO3), (TWO, "search={training.distributed: [ddp, zero3]}"), (TWO, SFT)]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("sets", ASKED, ids=["base", "searched", "sft"])
def test_zero3_without_deepspeed_is_refused_with_what_to_type(
    sets: tuple[str, ...], load_text: Callable[..., SweepSpec]
) -> None:
    spec = load_text(TEXT, *sets)
    with pytest.raises(SpecError) as caught:
        check_extras(spec)
    assert caught.value.code is ExitCode.USER
    expected = "training.distributed: zero3 needs deepspeed, which is not installed here"
    assert str(caught.value) == f"a: {expected} (pip install 'prefsweep[deepspeed]')"
    (logged,) = [check for check in gpu_checks.gpu_checks(spec) if check.what == "deepspeed"]
    assert logged.level is CheckLevel.FAIL
    assert logged.fix == "pip install 'prefsweep[deepspeed]'"


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("sets", [(TWO,), (ZERO3,), (TWO, "training.distributed=fsdp2")])
def test_nobody_else_needs_it(sets: tuple[str, ...], load_text: Callable[..., SweepSpec]) -> None:
    spec = load_text(TEXT, *sets)
    check_extras(spec)
    assert "deepspeed" not in [check.what for check in gpu_checks.gpu_checks(spec)]


def test_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, load_text: Callable[..., SweepSpec]) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    check_extras(load_text(TEXT, TWO, ZERO3))


def test_an_sft_stage_of_weights_in_bfloat16_is_not_divided(load_text: Callable[..., SweepSpec]) -> None:
    with pytest.raises(SpecError, match=r"sft: zero3 keeps float32 copies"):
        load_text(TEXT, "model.dtype=bfloat16", "base.lora={}", SFT)
