"""Trials that share a GPU: what does not fit its share is refused before anything starts."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dashboards.terminal.command_output import print_plan
from orchestrator.commands.local_plan import plan_locally
from orchestrator.errors import SpecError
from orchestrator.execution.slots import Machine, Slots, slots_on
from orchestrator.execution.workers.session_factory import GpuMissing, session_factory
from orchestrator.spec.estimates.cost_estimate import GpuAssumptions, check_share, trials_per_process
from orchestrator.spec.estimates.gpu_memory import GB, max_trials_per_gpu, memory
from orchestrator.spec.estimates.input_sizes import model_shape
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.distributed.processes import limit_gpu_memory

TEXT = """
base:
  model: {name_or_path: princeton-nlp/Llama-3-Base-8B-SFT, dtype: bfloat16}
  data: {train: rows.jsonl, max_length: 2048}
  training: {gradient_checkpointing: true, max_steps: 3, pairs_per_update: 2}
  lora: {r: 16}
"""


def test_adapters_on_8b_take_half_of_80_gb_but_not_a_quarter(load_text: Callable[..., SweepSpec]) -> None:
    check_share(load_text(TEXT, "resources.gpus_per_trial=0.5"), 80 * GB)
    alone = "resources.trials_per_process=1"
    with pytest.raises(SpecError) as caught:
        check_share(load_text(TEXT, "resources.gpus_per_trial=0.25", alone), 80 * GB)
    (finding,) = caught.value.problems
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
    machine = GpuAssumptions(gpu_memory=80 * GB)
    quarter = load_text(TEXT, "resources.gpus_per_trial=0.25", "resources.trials_per_process=1")
    with pytest.raises(SpecError, match="too little"):
        plan_locally(quarter, tmp_path, (), machine)
    half = plan_locally(load_text(TEXT, "resources.gpus_per_trial=0.5"), tmp_path, (), machine).estimate
    complete = plan_locally(load_text(TEXT, "resources.gpus_per_trial=1"), tmp_path, (), machine).estimate
    assert half.gpu_description == "0.5 of a GPU of 80 GB"
    assert (half.tokens_per_micro_batch or 0) < (complete.tokens_per_micro_batch or 0)


def test_a_worker_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What torch is told; there is no GPU here to try it on."""
    messages: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", messages.append)

    def opened(cache: Path) -> Any:
        return cache

    assert session_factory(opened, Slots(2, 0.5, 1))(tmp_path) == tmp_path
    assert messages == [0.5]
    assert session_factory(opened, Slots(2, 1.0, 1))(tmp_path) == tmp_path
    assert session_factory(opened, Slots(2, 0.0, 1)) is opened
    assert isinstance(session_factory(opened, Slots(1, 2.0, 1, processes=2)), functools.partial)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GpuMissing, match=r"promised 1 GPU, but torch .* finds none"):
        session_factory(opened, Slots(2, 1.0, 1))(tmp_path)
    limit_gpu_memory(0.5)
    assert messages == [0.5]


def test_each_further_trial_in_a_process_takes_its_adapters_and_moments(load_text: Callable[..., SweepSpec]) -> None:
    """SPEED.md's 0.5 GB: 41.9 million weights of 12 bytes."""
    config = load_text(TEXT).base
    shape = model_shape(config.model)
    one, two = (memory(config, shape, 4096, trials=n).total for n in (1, 2))
    assert two - one == 12 * shape.adapters(16)
    assert two - one == pytest.approx(0.50 * GB, rel=0.01)
    copies, over_one = max_trials_per_gpu(config, shape, 80 * GB)
    assert (copies, over_one) == (3, int((0.9 * 80 * GB - memory(config, shape, 4096).total) // (two - one)) + 1)
    assert max_trials_per_gpu(config, shape, 10 * GB) == (0, 0)


@pytest.mark.parametrize(("share", "trials"), [(1, 1), (0.5, 1), (0.25, 2), (0.125, 4), (0.0625, 8)])
def test_as_few_share_a_process_as_let_all_fit_the_gpu(
    share: float, trials: int, load_text: Callable[..., SweepSpec]
) -> None:
    spec = load_text(TEXT, f"resources.gpus_per_trial={share}")
    assert trials_per_process(spec, 80 * GB) == trials
    check_share(spec, 80 * GB)
    assert trials_per_process(spec, 8000 * GB) == 1
    assert trials_per_process(spec, None) == 1, "no GPU, or one that is not known"
    slots = slots_on(spec, [Machine(16, 1)], gpu_memory=80 * GB)
    assert (slots.count, slots.trials_per_process, slots.shared_processes) == (
        round(1 / share),
        trials,
        round(1 / share) // trials,
    )
    assert slots.gpu_fraction == (share * trials if share * trials < 1 else None)


def test_what_fits_no_process_at_all_is_refused_as_ever(load_text: Callable[..., SweepSpec]) -> None:
    spec = load_text(TEXT, "resources.gpus_per_trial=0.25")
    assert trials_per_process(spec, 8 * GB) == 1
    with pytest.raises(SpecError, match=r"0\.25 is too little"):
        check_share(spec, 8 * GB)
    with pytest.raises(SpecError, match=r"200 is too many: by formula one pair with 199 more trials"):
        check_share(load_text(TEXT, "resources.trials_per_process=200"), 80 * GB)


@pytest.mark.parametrize(
    "change", ["base.lora=null", "base.engine=trl", "search={model.dtype: [float32, bfloat16]}", "base.model=org/model"]
)
def test_auto_leaves_each_its_process_where_they_cannot_share_one(
    change: str, load_text: Callable[..., SweepSpec]
) -> None:
    assert trials_per_process(load_text(TEXT, "resources.gpus_per_trial=0.125", change), 80 * GB) == 1


def test_every_reason_against_it_is_said_at_once(load_text: Callable[..., SweepSpec]) -> None:
    text = """
base: {model: org/model, data: {train: rows.jsonl}, engine: trl}
search: {model.revision: [v1, v2]}
enqueue: [{model.revision: v3}]
resources: {trials_per_process: 4}
"""
    with pytest.raises(SpecError) as caught:
        load_text(text)
    found = {finding.problem: finding for finding in caught.value.problems}
    assert list(found) == [
        f"4 trials cannot train over one frozen model: {reason}"
        for reason in (
            "lora: trials without it change the model's own weights",
            "engine: TRL's trainers run one trial per process",
            "model.revision: its values are different models",
            "enqueue: one of its trials has another model",
        )
    ]
    assert {finding.path for finding in found.values()} == {"resources.trials_per_process"}
    assert {finding.hint for finding in found.values()} == {"write 1 or auto"}
    assert all(finding.where.endswith(":5") for finding in found.values())


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("{trials_per_process: 2, processes_per_trial: 2}", "a trial of several processes cannot share them"),
        ("{trials_per_process: 4, gpus_per_trial: 0.5}", "a process has one GPU; write gpus_per_trial 0.25"),
        ("{trials_per_process: 0}", "must be at least 1, not 0"),
        ("{trials_per_process: autp}", "must be one of auto"),
    ],
)
def test_numbers_that_make_no_process(wanted: str, said: str, load_text: Callable[..., SweepSpec]) -> None:
    with pytest.raises(SpecError, match=re.escape(said)):
        load_text(TEXT + f"resources: {wanted}\n")


def test_the_slots_of_processes_that_are_shared(load_text: Callable[..., SweepSpec]) -> None:
    four = load_text(TEXT, "resources.trials_per_process=4")
    assert slots_on(four, [Machine(8, 0)]) == Slots(8, 0.0, 4, trials_per_process=4, fitting=8)
    on_gpus = slots_on(four, [Machine(8, 2)], gpu_memory=80 * GB)
    assert (on_gpus.count, on_gpus.gpus, on_gpus.shared_processes, on_gpus.process_resources["GPU"]) == (
        8,
        0.25,
        2,
        1.0,
    )
    assert on_gpus.bundles == [{"CPU": 0.0, "slot": 1.0}]
    joined = slots_on(four, [Machine(8, 1), Machine(3, 1)], is_shared_cluster=True)
    assert (joined.count, joined.process_resources) == (4, {"CPU": 3.96, "GPU": 1.0})
    assert joined.bundles == [{"CPU": 0.0001}]
    few = slots_on(load_text(TEXT, "resources.trials_per_process=4", "budget.concurrency=1"), [Machine(8, 0)])
    assert (few.count, few.trials_per_process) == (1, 1)
    with pytest.raises(SpecError, match="4 trials in one process need 4 CPUs and 0 GPUs; this machine has 2 CPUs"):
        slots_on(four, [Machine(2, 0)])


def test_the_plan_says_how_many_fit_both_ways(
    load_text: Callable[..., SweepSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = GpuAssumptions(gpu_memory=80 * GB)
    made = plan_locally(load_text(TEXT, "resources.gpus_per_trial=0.25"), tmp_path, (), machine)
    assert made.estimate.gpu_description == "0.5 of a GPU of 80 GB for 2 trials"
    assert made.estimate.trials_on_a_gpu == (3, 99)
    print_plan(made)
    assert "3 with one model each, 99 sharing one frozen base model" in " ".join(capsys.readouterr().out.split())
    assert plan_locally(load_text(TEXT, "base.lora=null"), tmp_path, (), machine).estimate.trials_on_a_gpu is None


def test_how_trials_are_put_into_processes_is_no_part_of_them(load_text: Callable[..., SweepSpec]) -> None:
    one, four = load_text(TEXT), load_text(TEXT, "resources.trials_per_process=4")
    assert one.base.canonical_params() == four.base.canonical_params()
    assert one.resources != four.resources
