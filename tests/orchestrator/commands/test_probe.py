"""`plan --probe` on a tiny model: measured beside the formula, and the plan's times corrected by it."""

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.commands import local_plan
from orchestrator.commands.local_plan import ProbeFailed, plan_locally
from orchestrator.spec.estimates.cost_estimate import GpuAssumptions
from orchestrator.spec.estimates.input_sizes import KNOWN_SHAPES
from orchestrator.spec.estimates.measured_update import MeasuredUpdate, compare_with_formula, wall_clock
from orchestrator.spec.loading.loader import load_spec_text
from trainer.config.trial import TrialConfig

TEXT = """
name: tiny
base:
  model: {generated: {vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}}
  data:
    train: {generated: instructions, rows: 64}
    eval: {generated: instructions, split: eval, rows: 8}
    max_length: 96
  loss: {kind: dpo}
  training: {pairs_per_update: 8, num_train_epochs: 1}
search: {training.learning_rate: [1e-4, 1e-3], loss.beta: [0.1]}
maximize: eval_accuracies/logp
"""


def test_measured_and_by_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    file = tmp_path / "tiny.yaml"
    file.write_text(TEXT)
    assert main(["plan", str(file), "--probe", "--json", "--tflops", "0.05"]) == 0
    made = json.loads(capsys.readouterr().out)
    probe, by_formula = made["probe"], made["estimate"]
    found = probe["measured"]
    assert (found["device"], found["processes"], found["pairs"]) == ("CPU", 1, 8)
    assert 8 * 10 < found["tokens"] < 8 * 2 * 96
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 0
    assert probe["formula_seconds"] > 0
    assert probe["formula_bytes"] > 0
    ratio = found["seconds"] / probe["formula_seconds"]
    for figure in ("gpu_hours_per_trial", "gpu_hours"):
        assert probe["corrected"][figure] == pytest.approx(by_formula[figure] * ratio)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cache"]


GPU_WORDS = ("GPU", "FLOP", "bf16", "bfloat16", "by formula", "head-room")
ON_CPU = ("--set", "resources.gpus_per_trial=0")


def test_on_a_cpu_the_plan_has_no_word_of_gpus_and_says_in_one_line_how_to_measure_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    file = tmp_path / "tiny.yaml"
    file.write_text(TEXT)
    assert main(["plan", str(file), *ON_CPU]) == 0
    said = capsys.readouterr().out
    assert [word for word in GPU_WORDS if word in said] == []
    (line,) = [line for line in said.splitlines() if "--probe" in line]
    assert main(["plan", str(file), *ON_CPU, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["device"], made["estimate"], made["probe"], made["wall_clock"]) == ("CPU", None, None, None)
    assert line.strip().removeprefix("note: ") in made["notices"]
    assert f"{made['parameters']:,}" in said
    assert main(["plan", str(file), *ON_CPU, "--gpu-memory", "80"]) == 0
    assert "GPU-hours of the sweep" in capsys.readouterr().out, "figures of GPUs for whoever names one"


def test_the_time_on_this_machine_has_updates_evaluations_slots_and_the_sft_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    file = tmp_path / "tiny.yaml"
    file.write_text(TEXT + "sft: {training: {max_steps: 5, pairs_per_update: 4}}\n")
    assert main(["plan", str(file), *ON_CPU, "--probe", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    found, time = made["probe"]["measured"], made["wall_clock"]
    assert (found["train_pairs"], found["eval_pairs"]) == (64, 8)
    assert (made["probe"]["formula_seconds"], made["probe"]["formula_bytes"]) == (None, None)
    assert min(found["scoring_seconds"], found["answer_seconds"], time["sft_seconds"]) > 0
    # 64 pairs by 8 are 8 updates, each with an evaluation, of which the last has completions too.
    evaluation = 8 * found["scoring_seconds"]
    assert time["trial_seconds"] == pytest.approx(8 * (found["seconds"] + evaluation + found["answer_seconds"]))
    assert time["shared_seconds"] == pytest.approx(
        evaluation + found["answer_seconds"] + 64 * found["scoring_seconds"]
    ), "evaluation of the initial model, and DPO's reference of every training pair"
    rounds = -(-made["trials"] // time["trials_at_a_time"])
    assert time["sweep_seconds"] == pytest.approx(
        time["sft_seconds"] + time["shared_seconds"] + rounds * time["trial_seconds"]
    )


def test_the_longest_trial_and_the_slots_set_the_time_of_a_sweep() -> None:
    config = {"model": {"name_or_path": "m/m"}, "data": {"train": "rows.jsonl"}, "loss": {"kind": "simpo"}}
    short, long = (
        TrialConfig.model_validate(
            config | {"training": {"pairs_per_update": 10, "max_steps": steps, "eval_steps": 20}}
        )
        for steps in (20, 50)
    )
    measured = MeasuredUpdate("CPU", 1, 10, 100, 2.0, 1, 8192, 0.5, 4.0, 1000, 6)
    for slots, rounds in ((1, 5), (2, 3), (8, 1)):
        found = wall_clock([short, long], measured, None, trials=5, slots=slots)
        assert found.trial_seconds == 50 * 2.0 + 3 * (6 * 0.5 + 4.0)
        assert found.shared_seconds == 6 * 0.5 + 4.0
        assert (found.sweep_seconds, found.sft_seconds) == (7.0 + rounds * found.trial_seconds, None)
    assert wall_clock([short], measured, None, trials=None, slots=2).sweep_seconds is None


def test_what_the_trainer_cannot_use_is_told_in_its_words(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 20)
    text = TEXT.replace("{generated: instructions, rows: 64}", f"'{rows}'\n    apply_template: false")
    with pytest.raises(ProbeFailed, match="rows"):
        plan_locally(load_spec_text(text, tmp_path), tmp_path / "runs", (), probe=True)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    spec = load_spec_text(TEXT, tmp_path, ["resources.processes_per_trial=2", "base.training.distributed=fsdp2"])
    made = plan_locally(spec, tmp_path / "runs", (), probe=True).probe
    assert (made.measured.processes, made.measured.pairs) == (2, 8)


def test_on_a_gpu_the_micro_batch_is_corrected_too() -> None:
    """With figures of a GPU that is not here: the measured peak is a quarter above the formula's."""
    shape = KNOWN_SHAPES["princeton-nlp/Llama-3-Base-8B-SFT"]
    config = TrialConfig.model_validate(
        {
            "model": {"name_or_path": "princeton-nlp/Llama-3-Base-8B-SFT", "dtype": "bfloat16"},
            "data": {"train": "rows.jsonl", "max_length": 2048},
            "training": {"gradient_checkpointing": True},
            "lora": {},
        }
    )
    from orchestrator.spec.estimates.cost_estimate import estimate_cost
    from orchestrator.spec.estimates.gpu_memory import memory

    machine = GpuAssumptions(gpu_memory=40e9, price=2.0)
    made = estimate_cost([config], [100], shape, machine, 4, eval_pairs=100)
    held_trial = memory(config, shape, 8192).total
    update = MeasuredUpdate("NVIDIA H100", 1, 128, 300_000, 20.0, round(1.25 * held_trial), 8192)
    probe = compare_with_formula(update, config, shape, machine, made)
    assert (probe.corrected.tokens_per_micro_batch or 0) < (made.tokens_per_micro_batch or 0)
    slower = 20.0 / (probe.formula_seconds or 0)
    assert probe.corrected.gpu_hours == pytest.approx(slower * (made.gpu_hours or 0))
    assert probe.corrected.cost == pytest.approx(2.0 * (probe.corrected.gpu_hours or 0))


@pytest.mark.parametrize(
    ("hidden", "flags", "overrides", "offered"),
    [
        (256, "fma avx512_bf16", [], True),
        (256, "fma amx_bf16 amx_tile", [], True),
        (256, "fma avx512f", [], False),
        (32, "fma avx512_bf16", [], False),
        (256, "fma avx512_bf16", ["base.training.bf16=true"], False),
        (256, "fma avx512_bf16", ["base.model.dtype=bfloat16"], False),
    ],
)
def test_bfloat16_is_offered_where_the_processor_multiplies_in_it_and_the_model_is_large_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: int, flags: str, overrides: list[str], offered: bool
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(local_plan, "CPU_INFO", info)
    spec = load_spec_text(TEXT.replace("hidden_size: 32", f"hidden_size: {hidden}"), tmp_path, overrides)
    notices = plan_locally(spec, tmp_path / "runs", []).notices
    assert any("base.training.bf16=true" in notice and "another precision" in notice for notice in notices) == offered
