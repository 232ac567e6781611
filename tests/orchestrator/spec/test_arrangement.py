"""What `auto` chooses on machines that are described, not there: by the memory formula alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.local_plan import plan_locally
from orchestrator.execution.slots import Machine, slots_on
from orchestrator.spec.estimates.arrangement import DoesNotFit, NothingFits, arrange_sweep, arranged
from orchestrator.spec.estimates.cost_estimate import GpuAssumptions
from orchestrator.spec.estimates.gpu_layouts import Arrangement, MachineGpus
from orchestrator.spec.estimates.gpu_memory import GB, memory, usable_bytes
from orchestrator.spec.estimates.input_sizes import model_shape
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec, sweep_identity
from orchestrator.spec.sweep_spec import AUTO_TRAINING, GPUS_PER_TRIAL, SweepSpec
from orchestrator.study.sweep_terms import allowed_changes

LOAD = Callable[..., SweepSpec]
EIGHT_B = """
base:
  model: princeton-nlp/Llama-3-Base-8B-SFT
  data: {train: rows.jsonl, max_length: 2048}
  training: {bf16: true, pairs_per_update: 128, max_steps: 3}
"""
RATES = "search: {training.learning_rate: {log_uniform: [1e-6, 1e-5]}}\nsampler: random\nbudget: {trials: 99}\n"
IN_16_BITS = EIGHT_B.replace("model: ", "model: {dtype: bfloat16, name_or_path: ").replace("-SFT", "-SFT}")
ADAPTERS = IN_16_BITS + "  lora: {r: 16}\n"
SMALL = IN_16_BITS.replace("princeton-nlp/Llama-3-Base-8B-SFT", "meta-llama/Llama-3.2-1B-Instruct")
TINY = """
base:
  model: {generated: {}}
  data: {train: rows.jsonl, max_length: 256}
  training: {pairs_per_update: 16, max_steps: 3}
search: {training.learning_rate: [1e-6, 2e-6, 3e-6, 4e-6]}
"""


def gpus(*sizes: float | None, cpus: float = 64) -> MachineGpus:
    return MachineGpus(tuple(None if size is None else size * GB for size in sizes), cpus)


def on(spec: SweepSpec, *machines: MachineGpus) -> Arrangement:
    found = arrange_sweep(spec, machines)
    assert isinstance(found, Arrangement), found
    return found


def test_without_gpus_everything_is_as_the_defaults_were(load_text: LOAD) -> None:
    spec = load_text(EIGHT_B)
    found = on(spec, gpus())
    assert (found.gpus_per_trial, found.trials_per_process, found.memory) == (0.0, 1, None)
    chosen, _ = arranged(spec, [gpus()])
    assert (chosen.base, chosen.resources, chosen.auto) == (spec.base, spec.resources, ())
    training = chosen.base.training
    assert (training.distributed, training.gradient_checkpointing, training.tokens_per_micro_batch) == (
        "ddp", False, 8192,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "machines", "gpus_per_trial", "distributed", "checkpointing", "at_a_time"),
    [
        (EIGHT_B, [gpus(*[80] * 4)], 4, "fsdp2", True, 1),
        (EIGHT_B, [gpus(*[80] * 8)], 4, "fsdp2", True, 2),
        (EIGHT_B, [gpus(*[80] * 4), gpus(*[80] * 8)], 4, "fsdp2", True, 3),
        (EIGHT_B, [gpus(192)], 1, "ddp", True, 1),
        (EIGHT_B, [gpus(*[192] * 2)], 1, "ddp", True, 2),
        (EIGHT_B, [gpus(288)], 1, "ddp", False, 1),
        (ADAPTERS, [gpus(80)], 1, "ddp", False, 1),
        (ADAPTERS, [gpus(*[48] * 8)], 1, "ddp", True, 8),
        (SMALL, [gpus(24)], 1, "ddp", True, 1),
    ],
)
def test_the_fewest_gpus_that_hold_a_trial(
    load_text: LOAD,
    text: str,
    machines: list[MachineGpus],
    gpus_per_trial: float,
    distributed: str,
    checkpointing: bool,
    at_a_time: int,
) -> None:
    spec = load_text(text + RATES)
    found = on(spec, *machines)
    chosen = (found.gpus_per_trial, found.trials.distributed, found.trials.gradient_checkpointing)
    assert chosen == (gpus_per_trial, distributed, checkpointing)
    assert found.trials_at_a_time == at_a_time
    assert_right(spec, found, machines)


def assert_right(spec: SweepSpec, found: Arrangement, machines: list[MachineGpus]) -> None:
    """It fits, half the GPUs and the next larger micro-batch do not, and the slots are those that were named."""
    assert found.memory is not None
    assert found.capacity is not None
    assert found.memory <= usable_bytes(found.capacity)
    chosen, _ = arranged(spec, machines)
    shape = model_shape(spec.base.model)
    assert shape is not None
    tokens = found.trials.tokens_per_micro_batch
    assert memory(chosen.base, shape, tokens, found.processes).total == found.memory
    if tokens < 1 << 15:
        assert memory(chosen.base, shape, 2 * tokens, found.processes).total > usable_bytes(found.capacity)
    if found.processes > 1:
        fewer = memory(chosen.base, shape, 4096, found.processes // 2).total
        assert fewer > usable_bytes(found.capacity)
    described = [Machine(machine.cpus, len(machine.memory)) for machine in machines]
    assert slots_on(chosen, described).count == found.trials_at_a_time


def test_small_trials_share_a_gpu_within_its_memory_the_trials_and_the_cores(load_text: LOAD) -> None:
    spec = load_text(TINY)
    found = on(spec, gpus(80))
    assert (found.gpus_per_trial, found.trials_at_a_time, found.trials.gradient_checkpointing) == (0.25, 4, False)
    assert found.trials.tokens_per_micro_batch == 8192, "an update has no more tokens"
    assert on(spec, gpus(80, 80)).gpus_per_trial == 0.5
    assert on(spec, gpus(*[80] * 8)).gpus_per_trial == 1
    assert on(spec, gpus(80, cpus=2)).gpus_per_trial == 0.5
    assert on(spec, gpus(16)).gpus_per_trial == 0.5, "CUDA itself takes memory in each process"
    assert on(load_text(TINY, "budget.concurrency=2"), gpus(80)).gpus_per_trial == 0.5
    learning = load_text(TINY.replace("[1e-6, 2e-6, 3e-6, 4e-6]", "{log_uniform: [1e-6, 1e-5]}"),
        "sampler=tpe", "budget.trials=16")  # fmt: skip
    assert on(learning, gpus(80)).gpus_per_trial == 0.5, "an eighth of the trials at a time, so that the sampler learns"


def test_adapters_take_turns_over_one_model_where_more_are_asked_for_than_fit(load_text: LOAD) -> None:
    four = load_text(ADAPTERS + RATES)
    assert on(four, gpus(80)).gpus_per_trial == 1
    asked = on(load_text(dump_spec(four), "budget.concurrency=4"), gpus(80))
    assert (asked.gpus_per_trial, asked.trials_per_process, asked.trials_at_a_time) == (0.25, 4, 4)


@pytest.mark.parametrize(
    ("explicit", "expected"),
    [
        (["resources.gpus_per_trial=0.5"], (0.5, 1, 2)),
        (["resources.trials_per_process=4"], (0.25, 4, 4)),
        (["resources.trials_per_process=4", "resources.gpus_per_trial=null"], (0.25, 4, 4)),
        (["resources.processes_per_trial=2"], (2, 1, 0)),
    ],
)
def test_explicit_shares_and_processes_stay(
    load_text: LOAD, explicit: list[str], expected: tuple[float, int, int]
) -> None:
    spec = load_text(ADAPTERS + RATES, *explicit)
    found = on(spec, gpus(80))
    assert (found.gpus_per_trial, found.trials_per_process, found.trials_at_a_time) == expected
    assert found.memory is not None
    assert found.capacity is not None
    assert found.memory <= usable_bytes(found.capacity)


def test_of_mixed_gpus_the_smallest_counts(load_text: LOAD) -> None:
    found = on(load_text(ADAPTERS), gpus(80, 48))
    assert found.capacity == 48 * GB
    assert any("the smallest GPU counts" in reason for reason in found.reasons)
    refused = arrange_sweep(load_text(EIGHT_B), [gpus(80, 80, 80, 24)])
    assert isinstance(refused, NothingFits)


def test_gpus_or_models_of_unknown_size_get_the_defaults(load_text: LOAD) -> None:
    unknown = load_text("base: {model: org/x, data: {train: rows.jsonl}}")
    for spec, machine in ((load_text(EIGHT_B), gpus(None, None)), (unknown, gpus(80))):
        found = on(spec, machine)
        assert (found.gpus_per_trial, found.memory) == (1.0, None)
        assert "unknown" in str(found)
        assert arranged(spec, [machine])[0].base == spec.base


EXPLICIT: list[tuple[str, Any]] = [
    ("resources.gpus_per_trial", 8),
    ("resources.gpus_per_trial", 4),
    ("base.training.distributed", "fsdp2"),
    ("base.training.gradient_checkpointing", True),
    ("base.training.tokens_per_micro_batch", 4096),
    ("base.training.tokens_per_micro_batch", 6000),
]


@pytest.mark.parametrize("chosen", range(1, 1 << len(EXPLICIT)))
def test_an_explicit_value_wins_in_every_combination(load_text: LOAD, chosen: int) -> None:
    given = dict(pair for index, pair in enumerate(EXPLICIT) if chosen & 1 << index)
    spec = load_text(EIGHT_B, *(f"{path.removeprefix('base.')}={json.dumps(value)}" for path, value in given.items()))
    assert {GPUS_PER_TRIAL, *(f"base.{path}" for path in AUTO_TRAINING)} - set(spec.auto) == given.keys()
    found = on(spec, gpus(*[80] * 8))
    resolved, _ = arranged(spec, [gpus(*[80] * 8)])
    written = resolved.written()
    for path, value in given.items():
        section, _, rest = path.partition(".")
        at = written[section]
        for part in rest.split("."):
            at = at[part]
        assert at == value, path
    assert found.memory is not None
    assert found.memory <= usable_bytes(80 * GB)
    assert resolved.resources.gpus_per_trial == given.get(GPUS_PER_TRIAL, 4)


@pytest.mark.parametrize("setting", ["training.gradient_checkpointing=false", "training.distributed=ddp"])
def test_an_explicit_value_that_keeps_trials_from_fitting_is_named(load_text: LOAD, setting: str) -> None:
    found = arrange_sweep(load_text(EIGHT_B, setting, "resources.gpus_per_trial=4"), [gpus(*[80] * 4)])
    assert isinstance(found, NothingFits)
    assert found.change == (f"base.{setting.partition('=')[0]}=auto",)


def test_searched_settings_are_not_chosen(load_text: LOAD) -> None:
    spec = load_text(ADAPTERS + "search: {training.gradient_checkpointing: [true, false]}\n")
    assert "base.training.gradient_checkpointing" not in spec.auto
    found = on(spec, gpus(80))
    resolved, _ = arranged(spec, [gpus(80)])
    assert resolved.search == spec.search
    assert found.trials.tokens_per_micro_batch <= on(load_text(ADAPTERS), gpus(80)).trials.tokens_per_micro_batch


def test_the_dearest_of_the_search_and_of_enqueued_trials_counts(load_text: LOAD) -> None:
    highest = on(load_text(ADAPTERS, "lora.r=1024"), gpus(80)).memory
    assert on(load_text(ADAPTERS), gpus(80)).memory != highest
    for more in ("search: {lora.r: [16, 1024]}\n", "enqueue: [{lora.r: 1024}]\n"):
        assert on(load_text(ADAPTERS + more), gpus(80)).memory == highest


def test_the_sft_stage_has_settings_of_its_own_and_must_fit_too(load_text: LOAD) -> None:
    stage = "sft: {training: {bf16: true, max_steps: 2}}\n"
    assert on(load_text(ADAPTERS), gpus(*[80] * 8)).gpus_per_trial == 1
    found = on(load_text(ADAPTERS + stage), gpus(*[80] * 8))
    assert found.gpus_per_trial == 2
    assert found.sft is not None
    assert (found.sft.gradient_checkpointing, found.trials.gradient_checkpointing) == (True, False)
    resolved, _ = arranged(load_text(ADAPTERS + stage), [gpus(*[80] * 8)])
    assert resolved.sft is not None
    assert resolved.sft.training.gradient_checkpointing
    alone = arrange_sweep(load_text(ADAPTERS + stage), [gpus(80)])
    assert isinstance(alone, NothingFits)
    assert "SFT stage" in alone.problem


def test_four_bits_and_trls_trainers_stay_on_one_gpu(load_text: LOAD) -> None:
    four = on(load_text(ADAPTERS, "model.load_in_4bit=true"), gpus(*[24] * 8))
    assert (four.gpus_per_trial, four.trials.distributed) == (1, "ddp")
    trl = load_text(SMALL, "engine=trl", "model.dtype=float32")
    assert "base.training.tokens_per_micro_batch" not in trl.auto, "it sets the batches of TRL's trainers"
    assert on(trl, gpus(*[80] * 8)).gpus_per_trial == 1


@pytest.mark.parametrize(
    ("text", "machine", "change", "needed"),
    [
        (EIGHT_B, gpus(80), ("base.lora={}",), 4),
        (EIGHT_B, gpus(80, 80), ("base.model.dtype=bfloat16",), 4),
        (EIGHT_B, gpus(24), ("base.lora={}", "base.model.load_in_4bit=true"), None),
        (EIGHT_B, gpus(2), (), None),
    ],
)
def test_where_nothing_fits_the_smallest_change_is_named(
    load_text: LOAD, text: str, machine: MachineGpus, change: tuple[str, ...], needed: int | None
) -> None:
    spec = load_text(text)
    found = arrange_sweep(spec, [machine])
    assert isinstance(found, NothingFits)
    assert (found.change, found.gpus_needed) == (change, needed)
    with pytest.raises(DoesNotFit) as refused:
        arranged(spec, [machine])
    assert found.problem in str(refused.value)
    if not change:
        assert "no setting makes it fit" in str(refused.value)
        return
    assert isinstance(arrange_sweep(load_text(text, *change), [machine]), Arrangement), "the options do what they say"
    hint = found.hint("orchestrate sweep a.yaml")
    assert "orchestrate sweep a.yaml --set " in hint
    if needed is not None:
        size = machine.memory[0]
        assert isinstance(arrange_sweep(spec, [MachineGpus((size,) * needed)]), Arrangement)
        assert f"{needed} such GPUs" in hint
        assert "--set" not in found.hint(is_new=False), "what is begun cannot be changed so"


def test_plan_shows_the_choice_and_its_reasons(load_text: LOAD, tmp_path: Path) -> None:
    few = "training.pairs_per_update=2"
    made = plan_locally(load_text(ADAPTERS, few), tmp_path, (), GpuAssumptions(gpu_memory=80 * GB))
    assert made.arrangement is not None
    assert made.estimate is not None
    assert made.estimate.memory.total == made.arrangement.memory
    shown = made.as_json()["arrangement"]
    assert shown["gpus_per_trial"] == 1
    assert shown["reasons"] == made.arrangement.reasons != ()
    refused = plan_locally(
        load_text(EIGHT_B, few), tmp_path, (), GpuAssumptions(gpu_memory=80 * GB), command="orchestrate sweep a.yaml"
    )
    assert refused.arrangement is None
    (notice,) = [text for text in refused.notices if "by formula" in text]
    assert "orchestrate sweep a.yaml --set 'base.lora={}'" in notice


# --- in the file -----------------------------------------------------------------------------------------------------


def test_the_word_and_nothing_mean_the_same_and_survive_the_written_file(load_text: LOAD) -> None:
    spec = load_text(EIGHT_B)
    words = "training: {bf16: true, gradient_checkpointing: auto, distributed: auto, tokens_per_micro_batch: auto,"
    assert load_text(EIGHT_B.replace("training: {bf16: true,", words) + "resources: {gpus_per_trial: auto}\n") == spec
    assert spec.auto == (GPUS_PER_TRIAL, *(f"base.{path}" for path in AUTO_TRAINING))
    text = dump_spec(spec)
    assert text.count(": auto\n") == 7, "model.attention, model.kernels and trials_per_process have the word too"
    assert load_spec_text(text, Path("/")) == load_spec_text(text, Path("/"), is_new=False) == spec
    assert SweepSpec.from_stored(spec.model_dump_json()) == spec
    assert load_spec_text(dump_spec(spec, brief=True), Path("/")) == spec


def test_an_explicit_default_stays_explicit(load_text: LOAD) -> None:
    spec = load_text(EIGHT_B, "training.gradient_checkpointing=false", "resources.gpus_per_trial=null")
    assert not {GPUS_PER_TRIAL, "base.training.gradient_checkpointing"} & set(spec.auto)
    for brief in (False, True):
        assert load_spec_text(dump_spec(spec, brief=brief), Path("/")) == spec


def test_shared_anchors_are_not_changed(load_text: LOAD) -> None:
    text = EIGHT_B.replace("training: {bf16: true,", "training: &shared {gradient_checkpointing: auto, bf16: true,")
    spec = load_text(text + "sft: {training: *shared}\n")
    assert {"base.training.gradient_checkpointing", "sft.training.gradient_checkpointing"} <= set(spec.auto)


def test_a_sweep_of_before_there_was_auto_is_the_same_sweep_with_its_values(load_text: LOAD) -> None:
    spec = load_text(EIGHT_B)
    stored = json.loads(spec.model_dump_json())
    del stored["auto"]
    before = SweepSpec.from_stored(json.dumps(stored))
    assert before.auto == ()
    assert json.loads(before.model_dump_json()) == stored, "its stored text stays as it is"
    assert sweep_identity(before) == sweep_identity(spec), "`sweep --continue` with the file resumes it"
    assert arranged(before, [gpus(80)]) == (before, None)
    again = load_spec_text(dump_spec(before), Path("/"))
    assert again == before
    changed = load_spec_text(dump_spec(before), Path("/"), ["resources.gpus_per_trial=auto"])
    assert [str(change) for change in allowed_changes(before, changed)] == ['resources.gpus_per_trial: null -> "auto"']
