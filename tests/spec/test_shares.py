"""Trials that share a GPU: what does not fit its share is refused before anything starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.commands.planning import plan_here
from orchestrator.engine.cluster import Slots
from orchestrator.engine.opening import for_slots
from orchestrator.errors import SpecError
from orchestrator.spec.cost import Machine
from orchestrator.spec.memory import GB
from orchestrator.spec.shares import check_share
from orchestrator.spec.sweep import SweepSpec
from trainer.world import keep_to_share

TEXT = """
base:
  model: {name_or_path: princeton-nlp/Llama-3-Base-8B-SFT, dtype: bfloat16}
  data: {train: rows.jsonl, max_length: 2048}
  training: {gradient_checkpointing: true, max_steps: 3, pairs_per_update: 2}
  lora: {r: 16}
"""


def test_adapters_on_8b_take_half_of_80_gb_but_not_a_quarter(load_text: Callable[..., SweepSpec]) -> None:
    check_share(load_text(TEXT, "resources.gpus_per_trial=0.5"), 80 * GB)
    with pytest.raises(SpecError) as caught:
        check_share(load_text(TEXT, "resources.gpus_per_trial=0.25"), 80 * GB)
    (finding,) = caught.value.findings
    assert finding.path == "resources.gpus_per_trial"
    assert "0.25 of a GPU of 80 GB" in finding.problem
    assert "it fits with base.model.load_in_4bit: true" in finding.problem


def test_the_dearest_of_the_search_counts(load_text: Callable[..., SweepSpec]) -> None:
    text = TEXT + "search: {lora.r: [16, 4096]}\n"
    with pytest.raises(SpecError, match=r"0\.5 is too little"):
        check_share(load_text(text, "resources.gpus_per_trial=0.5"), 80 * GB)


def test_a_whole_gpu_or_one_that_is_not_known_is_not_judged(load_text: Callable[..., SweepSpec]) -> None:
    for share in ("1", "0", "null"):
        check_share(load_text(TEXT, f"resources.gpus_per_trial={share}"), 1.0)
    check_share(load_text(TEXT, "resources.gpus_per_trial=0.25"), None)


def test_plan_refuses_it_and_reckons_with_the_share(load_text: Callable[..., SweepSpec], tmp_path: Path) -> None:
    machine = Machine(gpu_memory=80 * GB)
    with pytest.raises(SpecError, match="too little"):
        plan_here(load_text(TEXT, "resources.gpus_per_trial=0.25"), tmp_path, (), machine)
    half = plan_here(load_text(TEXT, "resources.gpus_per_trial=0.5"), tmp_path, (), machine).estimate
    whole = plan_here(load_text(TEXT, "resources.gpus_per_trial=1"), tmp_path, (), machine).estimate
    assert half is not None
    assert whole is not None
    assert half.place == "0.5 of a GPU of 80 GB"
    assert (half.tokens_per_micro_batch or 0) < (whole.tokens_per_micro_batch or 0)


def test_a_worker_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What torch is told; there is no GPU here to try it on."""
    said: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", said.append)

    def opened(cache: Path) -> Any:
        return cache

    assert for_slots(opened, Slots(2, 0.5, 1))(tmp_path) == tmp_path
    assert said == [0.5]
    for alone in (Slots(2, 1.0, 1), Slots(2, 0.0, 1)):
        assert for_slots(opened, alone) is opened
    assert isinstance(for_slots(opened, Slots(1, 2.0, 1, processes=2)), functools.partial)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    keep_to_share(0.5)
    assert said == [0.5]
