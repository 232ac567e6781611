"""Plans for machines that are not at hand: the GPU table, published sizes, hours and cost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import sweeps
from dashboards.terminal.machines_output import print_machines
from orchestrator.cli.run_commands import plan
from orchestrator.spec.estimates.cost_estimate import GpuAssumptions
from orchestrator.spec.estimates.gpu_memory import GB
from orchestrator.spec.estimates.gpu_table import GPUS, UnknownMachine, parse_machine
from orchestrator.spec.estimates.input_sizes import RowCounts, count_rows, published_tokens
from orchestrator.spec.estimates.machine_plans import MachinePlan, plan_on
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import DataConfig

LLAMA = str(Path(sweeps.__file__).parent / "llama3-8b.yaml")
FULL = """
base:
  model: {name_or_path: princeton-nlp/Llama-3-Base-8B-SFT, dtype: float32}
  data: {train: rows.jsonl, max_length: 2048}
  training: {bf16: true}
search: {training.learning_rate: [3e-7, 5e-7, 1e-6]}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xH100", "8xH100"),
        ("H100", "1xH100"),
        ("NVIDIA H100 80GB HBM3", "1xH100"),
        ("1xRTX4090", "1xRTX4090"),
        ("2 x rtx-4090", "2xRTX4090"),
        ("4xA100-80GB", "4xA100-80GB"),
        ("2xa100:40", "2xA100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "1xA100-80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "1xRTX6000-Ada"),
        ("rtx_pro_6000", "1xRTX-PRO-6000"),
        ("amd instinct mi300x", "1xMI300X"),
        ("GB10", "1xDGX-Spark"),
    ],
)
def test_a_machine_is_named_loosely(text: str, expected: str) -> None:
    assert str(parse_machine(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH10", "did you mean H100 or H100-PCIe or H100-NVL?"),
        ("2xA100", "did you mean A100-40GB or A100-80GB?"),
        ("1xRTX6000", "did you mean RTX6000-Ada or RTX-PRO-6000?"),
        ("L40", "did you mean L40S?"),
        ("banana", "it has RTX3090, RTX4090"),
        ("0xH100", "at least one GPU"),
    ],
)
def test_another_name_is_answered_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(UnknownMachine) as caught:
        parse_machine(text)
    assert repr(text) in str(caught.value)
    assert message in str(caught.value)


def test_the_table_has_no_sparse_peaks_and_a_source_for_each() -> None:
    for gpu in GPUS:
        assert gpu.source
        assert parse_machine(gpu.name).gpu is gpu
        # Dense products in bfloat16: of NVIDIA's cards none does more than 300 FLOP per byte of bandwidth, but those
        # with slow memory.
        assert gpu.tflops * 1e12 / (gpu.bandwidth * GB) < 500, f"{gpu.name}: a peak with sparsity?"
        if gpu.name != "DGX-Spark":  # shared with its CPU
            assert gpu.memory_gb * GB <= gpu.memory <= 1.08 * gpu.memory_gb * GB


@pytest.fixture
def on(load_text: Callable[..., SweepSpec]) -> Callable[..., MachinePlan]:
    def made(machine: str, *overrides: str, **assumed: Any) -> MachinePlan:
        rows = RowCounts(12_800, 200, exact=True)
        spec = load_text(FULL, *overrides)
        assumptions = GpuAssumptions(tokens_per_pair=1000, **assumed)
        return plan_on(spec, parse_machine(machine), Path("runs"), rows, tracking="", assumptions=assumptions)

    return made


def test_full_training_of_8b_is_spread_over_gpus(on: Callable[..., MachinePlan]) -> None:
    made = on("8xH100", price=2.0)
    assert made.arrangement is not None
    assert (made.arrangement.gpus_per_trial, made.arrangement.trials.distributed) == (4, "fsdp2")
    assert made.plan is not None
    assert made.plan.concurrency == 2
    assert made.plan.estimate is not None
    each = made.plan.estimate.gpu_hours_per_trial
    assert each is not None
    assert made.hours == pytest.approx(2 * each / 4), "three trials, two at a time"
    assert made.gpu_hours == pytest.approx(8 * 2 * each / 4), "idle GPUs are paid for too"
    assert made.cost == pytest.approx(2.0 * 8 * 2 * each / 4)
    memory = made.arrangement.memory
    assert memory is not None
    assert made.plan.estimate.memory.total == memory <= 0.9 * made.machine.gpu.memory
    larger = on("8xB200")
    assert larger.arrangement is not None
    assert (larger.arrangement.gpus_per_trial, larger.arrangement.trials_at_a_time) == (1, 3)
    assert larger.hours is not None
    assert made.hours is not None
    assert larger.hours < made.hours


def test_what_does_not_fit_says_what_would(on: Callable[..., MachinePlan]) -> None:
    made = on("1xRTX4090")
    assert (made.arrangement, made.plan, made.hours, made.cost) == (None, None, None, None)
    row = made.as_json()
    assert row["fits"] is False
    assert "152 GB" in row["problem"]
    assert "base.lora={}" in row["hint"]
    assert on("1xRTX4090", "base.lora={}", "base.model.load_in_4bit=true", "base.model.dtype=bfloat16").plan is not None


def test_the_table_takes_80_columns(on: Callable[..., MachinePlan], capsys: pytest.CaptureFixture[str]) -> None:
    machines = ("1xRTX4090", "8xRTX-PRO-6000", "8xA100-80GB", "1xDGX-Spark")
    print_machines("a", [on(machine, price=1234.5) for machine in machines], "orchestrate sweep a.yaml")
    lines = capsys.readouterr().out.splitlines()
    table = lines[: 3 + len(machines)]
    assert max(len(line.rstrip()) for line in table) <= 80, table
    assert [line.split()[0] for line in table[3:]] == list(machines)
    assert any("orchestrate sweep a.yaml --set" in line for line in lines)


@pytest.mark.usefixtures("home")
def test_one_machine_has_the_whole_plan_and_several_a_table() -> None:
    one = CliRunner().invoke(plan, [LLAMA, "--on", "8xH100"])
    assert one.exit_code == 0
    for text in ("concurrent trials", "61,135 (published, not counted here)", "30% of 989", "8xH100"):
        assert text in one.output
    several = CliRunner().invoke(plan, [LLAMA, "--on", "8xH100", "--on", "1xL4", "--price", "2", "--json"])
    row, other = json.loads(several.stdout)["machines"]
    assert (row["machine"], row["gpus_per_trial"], row["trials_at_a_time"]) == ("8xH100", 4, 2)
    assert row["cost"] == pytest.approx(2 * row["gpu_hours"])
    assert row["plan"]["published"][0].startswith("HuggingFaceH4/ultrafeedback_binarized")
    assert (other["machine"], other["fits"], other["plan"]) == ("1xL4", False, None)


@pytest.mark.usefixtures("home")
def test_options_that_are_no_machine_are_all_named() -> None:
    wrong = CliRunner().invoke(plan, [LLAMA, "--on", "3xfoo", "--on", "2xA100"])
    assert wrong.exit_code == 2
    assert "'3xfoo'" in wrong.output
    assert "'2xA100'" in wrong.output
    both = CliRunner().invoke(plan, [LLAMA, "--on", "H100", "--gpu-memory", "24"])
    assert both.exit_code == 2
    assert "leave out --gpu-memory" in both.output


def test_a_data_set_at_hand_is_counted_and_another_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    name = "HuggingFaceH4/ultrafeedback_binarized"
    data = DataConfig.model_validate(
        {"train": {"dataset": name, "split": "train_prefs"}, "eval": {"dataset": name, "split": "test_prefs"}}
    )
    assert (count_rows(data).train, count_rows(data).published) == (None, ())
    found = count_rows(data, use_published=True)
    assert (found.train, found.eval, found.exact) == (61_135, 2_000, False)
    assert found.published[0].startswith(f"{name} (rows: its card")
    folder = tmp_path / "HuggingFaceH4___ultrafeedback_binarized" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    splits = {"train_prefs": {"num_examples": 10}, "test_prefs": {"num_examples": 3}}
    (folder / "dataset_info.json").write_text(json.dumps({"splits": splits}))
    assert count_rows(data, use_published=True) == RowCounts(10, 3, exact=True)
    tokens = published_tokens(data)
    assert tokens is not None
    assert tokens.per_pair == 980
    short = published_tokens(data.model_copy(update={"max_length": 256}))
    assert short is not None
    assert short.per_pair == 512
    assert published_tokens(DataConfig.model_validate({"train": "rows.jsonl"})) is None
