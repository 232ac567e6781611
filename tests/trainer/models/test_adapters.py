"""What adapters change, by name and count: of state-space models, beside a vision tower, of experts as tensors."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3Config, LlavaConfig, PreTrainedModel

from tests.support.exports import compared
from tests.support.small_trials import finish, trial
from trainer.config.trial import LoraConfig, ModelConfig, TrainingConfig, TrialConfig
from trainer.models import policy_model
from trainer.models.adapters import adapt, describe_adapters
from trainer.models.model_files import resolve_model_path
from trainer.results import ModelError
from trainer.training_session import TrainingSession

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
STATE = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def described(kind: str) -> Any:
    """The configuration of a tiny model of this kind."""
    match kind:
        case "gemma3":
            return Gemma3Config(text_config=SMALL | {"head_dim": 16}, vision_config=VISION, mm_tokens_per_image=4)  # pyright: ignore[reportCallIssue]
        case "mamba" | "falcon_mamba":
            return AutoConfig.for_model(kind, **STATE)
        case "mamba2":
            return AutoConfig.for_model(kind, **STATE, num_heads=4, head_dim=16, n_groups=1)
        case "jamba":
            every = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
            return AutoConfig.for_model(
                kind, **SMALL, **every, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False
            )
        case "mixtral" | "phimoe":
            return AutoConfig.for_model(kind, **SMALL, num_local_experts=4, num_experts_per_tok=2)
        case "gpt_oss":
            return AutoConfig.for_model(kind, **SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=16)
        case "dots1":
            experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            shared = {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
            return AutoConfig.for_model(kind, **SMALL, **experts, **shared, head_dim=16)
        case "qwen3_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            return AutoConfig.for_model(kind, **SMALL, **experts, head_dim=16)
        case _:
            return AutoConfig.for_model(kind, **SMALL)


def on_meta(kind: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(described(kind))


def start_model(kind: str, cache: Path, to: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(described(kind), dtype=torch.float32).save_pretrained(to)
    AutoTokenizer.from_pretrained(resolve_model_path(trial().model, cache)).save_pretrained(to)
    return to


ADAPTED = {
    "llama": "lora adapts 14 layers (2 down_proj, 2 gate_proj, 2 k_proj, 2 o_proj, 2 q_proj, 2 up_proj, 2 v_proj)",
    "mamba": (
        "lora adapts 2 layers (2 in_proj); not adapted: 2 dt_proj, 2 out_proj, 2 x_proj of state-space mixers, whose "
        "kernels ignore adapters"
    ),
    "mamba2": (
        "lora adapts 2 layers (2 in_proj); not adapted: 2 out_proj of state-space mixers, whose kernels ignore adapters"
    ),
    "gemma3": (
        "lora adapts 14 layers (2 down_proj, 2 gate_proj, 2 k_proj, 2 o_proj, 2 q_proj, 2 up_proj, 2 v_proj); not "
        "adapted: 15 layers in model.vision_tower, which text does not pass through"
    ),
    "mixtral": (
        "lora adapts 8 layers (2 k_proj, 2 o_proj, 2 q_proj, 2 v_proj) and 6 tensors of experts and routers (2 "
        "down_proj, 2 gate, 2 gate_up_proj)"
    ),
    "gpt_oss": (
        "lora adapts 8 layers (2 k_proj, 2 o_proj, 2 q_proj, 2 v_proj); not adapted: 4 tensors of experts (2 "
        "down_proj, 2 gate_up_proj) with 62% of the weights; to adapt them, name them in lora.target_modules"
    ),
    "dots1": (
        "lora adapts 8 layers (2 k_proj, 2 o_proj, 2 q_proj, 2 v_proj) and 3 tensors of experts and routers (1 "
        "down_proj, 1 gate, 1 gate_up_proj); not adapted: 2 down_proj, 2 gate_proj, 2 up_proj, because peft takes "
        "these names for parts of experts"
    ),
    "phimoe": (
        "lora adapts 8 layers (2 k_proj, 2 o_proj, 2 q_proj, 2 v_proj); not adapted: 2 router of type "
        "PhimoeTopKRouter, which do not return what linear layers do; 4 tensors of experts (2 down_proj, 2 "
        "gate_up_proj) with 63% of the weights; to adapt them, name them in lora.target_modules"
    ),
    "jamba": (
        "lora adapts 10 layers (1 down_proj, 1 gate_proj, 1 in_proj, 1 k_proj, 1 o_proj, 1 out_proj, 1 q_proj, 1 "
        "up_proj, 1 v_proj, 1 x_proj); not adapted: 1 dt_proj of state-space mixers, whose kernels ignore adapters; 2 "
        "tensors of experts (1 down_proj, 1 gate_up_proj) with 24% of the weights; to adapt them, name them in "
        "lora.target_modules"
    ),
}


@pytest.mark.parametrize(("kind", "said"), ADAPTED.items())
def test_all_linear_says_what_it_adapts_and_what_not(kind: str, said: str) -> None:
    assert adapt(on_meta(kind), LoraConfig())[1] == said


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("llama", ("q_prj", "v_proj"), r"q_prj is not in LlamaForCausalLM; did you mean q_proj\? \(linear layers: d"),
        ("llama", ("lm_head",), "lm_head is the output layer, which cannot be adapted"),
        ("llama", ("mlp",), "mlp is a LlamaMLP, not a layer; name its linear layers: down_proj, gate_proj, up_proj"),
        ("llama", ("norm",), "norm is a LlamaRMSNorm, which adapters cannot change"),
        ("mamba", ("out_proj",), "out_proj is in a state-space mixer, whose kernels read its weight"),
        ("gemma3", ("out_proj",), "out_proj is in model.vision_tower, which text does not pass through"),
        ("gemma3", ("mlp",), "mlp is a Gemma3MLP"),
        ("phimoe", ("router",), "router is a PhimoeTopKRouter, which does not return what a linear layer does"),
    ],
)
def test_names_that_mean_nothing_here_are_refused_in_words(kind: str, names: tuple[str, ...], message: str) -> None:
    """One that matches nothing beside one that does is refused too: peft would leave it out in silence."""
    with pytest.raises(ModelError, match=f"lora.target_modules: {message}") as refused:
        adapt(on_meta(kind), LoraConfig(target_modules=names))
    assert "PEFT" not in str(refused.value)


def test_names_reach_the_language_model_only() -> None:
    """`q_proj` is a layer of the vision tower too."""
    made, notice = adapt(on_meta("gemma3"), LoraConfig(target_modules=("q_proj", "v_proj")))
    assert len(adapted(made)) == 4
    assert all(name.startswith("model.language_model.") for name in adapted(made))
    assert notice.endswith("not adapted: 4 layers in model.vision_tower, which text does not pass through")


def test_experts_are_adapted_without_dropout_only() -> None:
    with pytest.raises(ModelError, match=r"lora\.dropout: adapters on tensors of experts have no dropout; set it to 0"):
        adapt(on_meta("mixtral"), LoraConfig(target_modules=("experts.down_proj",), dropout=0.1))


CASES = {
    "mamba": ("mamba", "all-linear"),
    "hybrid": ("jamba", "all-linear"),
    "vision": ("gemma3", "all-linear"),
    "vision, by name": ("gemma3", ["q_proj", "up_proj"]),
    "attention beside experts": ("qwen3_moe", "all-linear"),
    "experts": ("mixtral", ["q_proj", "experts.gate_up_proj", "experts.down_proj"]),
    "experts alone": ("qwen3_moe", ["experts.down_proj"]),
}
SLOW = ("hybrid", "vision", "experts alone")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES]
)
def test_what_is_said_is_what_is_trained_kept_and_exported(case: str, cache: Path, tmp_path: Path) -> None:
    kind, targets = CASES[case]
    path = start_model(kind, cache, tmp_path / "start")
    config: TrialConfig = trial(
        model={"name_or_path": str(path)}, lora={"r": 4, "target_modules": targets}, training={"learning_rate": 3e-2}
    )
    assert config.lora is not None
    made, _ = adapt(on_meta(kind), config.lora)
    session = TrainingSession(cache)
    metrics, _ = finish(session.train(config, tmp_path / "run"))
    losses = [point.metrics["eval_nll_loss"] for point in metrics if "eval_nll_loss" in point.metrics]
    assert max(abs(loss - losses[0]) for loss in losses) > 1e-3
    stored = torch_names(tmp_path / "run/model/adapter_model.safetensors")
    assert {re.sub(r"(\.base_layer)*$", "", name) for name in stored} == adapted(made)
    again, _ = finish(session.train(config, tmp_path / "again"))  # the same model, its adapters taken off before
    assert again[-1].metrics["eval_nll_loss"] == metrics[-1].metrics["eval_nll_loss"]
    for merge in (False, True):
        logged = compared(tmp_path / "run", config, cache, tmp_path / f"out {merge}", merge=merge)
        assert "held-out pairs" in logged[-1]


def adapted(made: PeftModel) -> set[str]:
    """Names of the modules with adapters on themselves or on a tensor of theirs."""
    tuner: Any = made.base_model
    return {*tuner.targeted_module_names, *(name.rpartition(".")[0] for name in tuner.targeted_parameter_names)}


def torch_names(file: Path) -> set[str]:
    """Names of the adapted modules in a file of adapters."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:  # pyright: ignore[reportUnknownVariableType]
        names = list(opened.keys())
    return {re.sub(r"^base_model\.model\.|\.lora_\w+(\.weight)?$", "", name) for name in names}


def test_it_is_said_once_however_many_trials(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_model, "_logged", set())
    config = ModelConfig(name_or_path=str(start_model("mixtral", cache, tmp_path)))
    model = policy_model.PolicyModel(policy_model.load_model(config, str(tmp_path), torch.device("cpu")), config, "id")
    with caplog.at_level(logging.INFO, "trainer.models.policy_model"):
        for seed in range(3):
            model.reset()
            model.prepare_for_trial(LoraConfig(), TrainingConfig(seed=seed))
    assert [r.message for r in caplog.records] == [describe_adapters(config, LoraConfig(), cache)]


def test_a_model_that_is_no_text_model_is_refused_in_words(cache: Path, tmp_path: Path) -> None:
    described = LlavaConfig(
        text_config={"model_type": "llama", **SMALL}, vision_config={"model_type": "clip_vision_model", **VISION}
    )  # pyright: ignore[reportCallIssue]
    described.save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match="is a Llava, which transformers does not load as a causal language model"):
        describe_adapters(config, LoraConfig(), cache)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="is a Llava, which transformers does not load"):
        policy_model.load_model(config, str(tmp_path), torch.device("cpu"))
