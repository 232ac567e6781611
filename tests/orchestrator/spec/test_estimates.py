"""The formulas of a plan: sizes against transformers, memory against the figures for Llama-3-8B (by formula too)."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.estimates.cost_estimate import GpuAssumptions, estimate_cost
from orchestrator.spec.estimates.gpu_memory import GB, max_micro_batch_tokens, memory, suggest_change
from orchestrator.spec.estimates.input_sizes import KNOWN_SHAPES, ModelShape, model_shape, shape_from_config
from trainer.config.trial import GeneratedModel, LoraConfig, ModelConfig, TrialConfig

LLAMA = KNOWN_SHAPES["princeton-nlp/Llama-3-Base-8B-SFT"]
PAIR = 2 * 2048


def trial(model: dict[str, Any] | None = None, **more: Any) -> TrialConfig:
    name = {"name_or_path": "princeton-nlp/Llama-3-Base-8B-SFT"}
    data = {"train": "rows.jsonl", "max_length": 2048}
    return TrialConfig.model_validate({"model": name | (model or {}), "data": data, **more})


CHECKPOINTED = {"bf16": True, "gradient_checkpointing": True}
BF16 = {"dtype": "bfloat16"}


def test_published_numbers_of_parameters() -> None:
    """As their cards say, in billions."""
    found = {name.rpartition("/")[2]: round(shape.parameters / 1e9, 2) for name, shape in KNOWN_SHAPES.items()}
    assert found == {
        "Llama-3-Base-8B-SFT": 8.03,
        "Meta-Llama-3-8B-Instruct": 8.03,
        "zephyr-7b-sft-full": 7.24,
        "Mistral-7B-Instruct-v0.2": 7.24,
        "gemma-2-9b-it": 9.24,
        "Llama-3.2-1B-Instruct": 1.24,
        "Llama-3.2-3B-Instruct": 3.21,
        "Qwen3-0.6B": 0.60,
        "Qwen3-1.7B": 1.72,
        "Qwen3-4B": 4.02,
        "gemma-3-1b-it": 1.00,
        "gemma-3-4b-it": 4.30,
        "SmolLM3-3B": 3.08,
        "Qwen2.5-14B-Instruct": 14.77,
        "Llama-3.1-70B-Instruct": 70.55,
    }


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3"])
def test_parameters_are_exactly_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.models.adapters import adapt

    small = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **small, num_key_value_heads=2, vocab_size=70, head_dim=12, pad_token_id=0)
    shape = shape_from_config(config.to_dict())
    assert shape is not None
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == model.num_parameters()
    adapted = adapt(model, LoraConfig(r=3))[0]
    assert shape.adapters(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_vision_tower_counts_and_gets_no_adapters() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.models.adapters import adapt

    small = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = small | {"num_key_value_heads": 2, "vocab_size": 70, "head_dim": 12, "pad_token_id": 0}
    vision = small | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    shape = shape_from_config(config.to_dict())
    assert shape is not None
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == model.num_parameters()
    assert shape.tower == sum(p.numel() for n, p in model.named_parameters() if "language_model" not in n)
    adapted = adapt(model, LoraConfig(r=3))[0]
    assert shape.adapters(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_generated_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from trainer.synthetic.tiny_models import generate_model

    described = GeneratedModel(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    shape = model_shape(ModelConfig(generated=described))
    made = AutoModelForCausalLM.from_pretrained(generate_model(described, tmp_path))
    assert shape.parameters == made.num_parameters()


def test_weights_gradients_and_optimiser_of_8b() -> None:
    """128, 96 and 64 GB for full fine-tuning; 16.1 and 0.67 for adapters."""

    def held_trial(config: TrialConfig) -> float:
        found = memory(config, LLAMA, PAIR)
        return (found.weights + found.gradients + found.optimizer) / GB

    assert held_trial(trial(training=CHECKPOINTED)) == pytest.approx(128.5, rel=0.01)
    assert held_trial(trial(BF16, training=CHECKPOINTED)) == pytest.approx(96, rel=0.01)
    nearest = CHECKPOINTED | {"stochastic_rounding": False}
    assert held_trial(trial(BF16, training=nearest)) == pytest.approx(64, rel=0.01)
    assert memory(trial(BF16, training=nearest), LLAMA, PAIR).weights == pytest.approx(16.1 * GB, rel=0.01)
    assert LLAMA.adapters(16) == 41_943_040
    assert held_trial(trial(BF16, lora={})) == pytest.approx(16.06 + 0.67, rel=0.01)


def test_activations_and_head_of_8b() -> None:
    found = memory(trial(BF16, lora={}, training=CHECKPOINTED), LLAMA, PAIR)
    inputs = 32 * PAIR * 2 * 4096
    assert inputs == pytest.approx(1.1 * GB, rel=0.05)
    assert 0.6 * GB < found.activations - inputs < 1.5 * GB, "one live layer, its norms in float32 and its gradients"
    assert found.total < 24 * GB
    theirs = memory(trial(BF16, lora={}, engine="trl", training=CHECKPOINTED), LLAMA, PAIR)
    assert theirs.head == pytest.approx(6.3 * GB, rel=0.01)
    assert found.head < theirs.head


def test_four_bits_are_about_a_quarter() -> None:
    complete = memory(trial(BF16, lora={}), LLAMA, PAIR).weights
    quarter = memory(trial(BF16 | {"load_in_4bit": True}, lora={}), LLAMA, PAIR).weights
    assert 0.25 * complete < quarter < 0.4 * complete  # the embedding and the head stay as they are


def test_slices_are_a_share_of_weights_gradients_and_moments() -> None:
    """8B in full on 8 GPUs: 128.5 / 8 GB on each, and what is whole at a time; copied, all of it on each."""
    cut = CHECKPOINTED | {"distributed": "fsdp2"}
    found, complete = memory(trial(training=cut), LLAMA, PAIR, 8), memory(trial(training=CHECKPOINTED), LLAMA, PAIR, 8)
    assert (complete.weights + complete.gradients + complete.optimizer) / GB == pytest.approx(128.5, rel=0.01)
    assert (found.weights + found.gradients + found.optimizer) / GB == pytest.approx(128.5 / 8, rel=0.01)
    layer, ends = LLAMA.linear_parameters // 32, 2 * 4096 * 128256
    assert found.together == pytest.approx(2 * 4 * (2 * layer + ends), rel=0.01)
    assert (found.activations, found.head, found.copies) == (complete.activations, complete.head, 0)
    assert memory(trial(training=cut), LLAMA, PAIR) == memory(trial(training=CHECKPOINTED), LLAMA, PAIR)
    assert max_micro_batch_tokens(trial(training=cut), LLAMA, 80 * GB, 8) is not None
    assert suggest_change(trial(training=CHECKPOINTED), LLAMA, 80 * GB, 8) == "base.training.distributed: fsdp2"


def test_beside_the_published_figure() -> None:
    """SimPO of Llama-3-Base on 8 H100s, ZeRO-3: 69 GB a GPU, all that the allocator had reserved. The formula counts
    what is needed, of the same weights in slices with whole logits.
    """
    cut = CHECKPOINTED | {"distributed": "fsdp2"}
    needed = memory(trial(training=cut).model_copy(update={"engine": "trl"}), LLAMA, 4 * 2048, 8).total / GB
    assert 0.6 * 69 < needed < 69
    assert memory(trial(training=cut), LLAMA, 4 * 2048, 8).total / GB < 0.85 * needed


def test_what_fits() -> None:
    full, adapters = trial(training=CHECKPOINTED), trial(BF16, lora={}, training=CHECKPOINTED)
    assert max_micro_batch_tokens(full, LLAMA, 80 * GB) is None
    assert suggest_change(full, LLAMA, 80 * GB) == "base.model.dtype: bfloat16, base.lora: {}"
    assert suggest_change(full, LLAMA, 2 * GB) is None
    fits = max_micro_batch_tokens(adapters, LLAMA, 80 * GB)
    assert fits is not None
    assert memory(adapters, LLAMA, fits).total <= 72 * GB < memory(adapters, LLAMA, 2 * fits).total


def test_time_and_cost_are_the_flops() -> None:
    shape = ModelShape(64, 2, 4, 4, 16, 128, 100)
    machine = GpuAssumptions(tflops=1.0, efficiency=0.5, price=2.0, tokens_per_pair=1)
    config = trial(training={"pairs_per_update": 10, "eval_steps": 5})
    made = estimate_cost([config], [20], shape, machine, 3, eval_pairs=7)
    weights = shape.linear_parameters + 6400
    forward = 2 * weights + 2 * 64
    expected = 20 * 10 * 3 * forward + 7 * 5 * forward
    assert made.flops_per_trial == pytest.approx(expected)
    assert made.gpu_hours == pytest.approx(3 * expected / 0.5e12 / 3600)
    assert made.cost == pytest.approx(2.0 * (made.gpu_hours or 0))
    assert made.warnings == ()


def test_a_reference_that_moves_is_a_forward_pass_an_update_and_weights_of_its_own() -> None:
    shape = ModelShape(64, 2, 4, 4, 16, 128, 100)
    machine = GpuAssumptions(tflops=1.0, efficiency=0.5, tokens_per_pair=1)
    training = {"pairs_per_update": 10, "eval_steps": 5}
    still, moving = (trial(training=training, loss={"kind": "dpo", "sync_ref_model": moves}) for moves in (False, True))
    one, two = (estimate_cost([config], [20], shape, machine, 3, eval_pairs=None) for config in (still, moving))
    forward = 2 * (shape.linear_parameters + 6400) + 2 * 64
    assert (two.flops_per_trial or 0) - (one.flops_per_trial or 0) == pytest.approx(20 * 10 * forward)
    # Without a pass over all training pairs before the first trial.
    assert (two.gpu_hours or 0) == pytest.approx(3 * (two.gpu_hours_per_trial or 0))
    assert (one.gpu_hours or 0) > 3 * (one.gpu_hours_per_trial or 0)
    assert two.memory.weights == 2 * one.memory.weights
    assert two.memory.optimizer == one.memory.optimizer


def test_kto_is_a_forward_pass_more_of_updates_evaluations_and_the_reference() -> None:
    shape = ModelShape(64, 2, 4, 4, 16, 128, 100)
    machine = GpuAssumptions(tflops=1.0, efficiency=0.5, tokens_per_pair=1)
    training = {"pairs_per_update": 10, "eval_steps": 5}
    forward, speed = 2 * (shape.linear_parameters + 6400) + 2 * 64, 0.5e12 * 3600
    for loss_type, passes in (("apo_zero_unpaired", 1), ("kto", 2)):
        config = trial(training=training, loss={"kind": "kto", "loss_type": loss_type})
        made = estimate_cost([config], [20], shape, machine, 3, eval_pairs=7)
        expected = 20 * 10 * (2 + passes) * forward + passes * 7 * 5 * forward
        assert made.flops_per_trial == pytest.approx(expected)
        once = passes * 20 * 10 * forward / config.training.num_train_epochs
        assert (made.gpu_hours or 0) == pytest.approx((3 * expected + once) / speed)


def test_what_does_not_fit_is_said_with_what_does() -> None:
    config = trial(training=CHECKPOINTED)
    made = estimate_cost([config], [], LLAMA, GpuAssumptions(gpu_memory=80 * GB), 3, eval_pairs=None)
    assert made.tokens_per_micro_batch is None
    assert (made.gpu_hours, made.cost) == (None, None)
    assert "it fits with base.model.dtype: bfloat16, base.lora: {}" in made.warnings[0]


def test_a_model_that_is_not_here_is_unknown() -> None:
    assert model_shape(ModelConfig(name_or_path="nobody/nothing")) is None
    assert shape_from_config({"model_type": "mamba", "num_attention_heads": 1}) is None
