"""The plan's memory by formula against what torch allocates at the peak of an update, for small models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from orchestrator.spec.estimates.gpu_memory import memory
from orchestrator.spec.estimates.input_sizes import model_shape
from trainer import memory_limits
from trainer.config.trial import TrialConfig
from trainer.distributed.processes import CancelToken, ProcessGroup
from trainer.models.model_files import resolve_model_path
from trainer.resource_cache import ResourceCache, make_evaluator
from trainer.training.engine import TrainingInputs
from trainer.training.optimizer import Optimizer
from trainer.training_session import create_engine

SIZE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
MOVING: dict[str, Any] = {"kind": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 1}
AUTOCAST, CHECKPOINTED = {"bf16": True}, {"gradient_checkpointing": True}


def trial(model: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **more: Any) -> TrialConfig:
    """One micro-batch an update."""
    update = {"pairs_per_update": 16, "max_steps": 2, "tokens_per_micro_batch": 1 << 16}
    given = {
        "model": {"generated": SIZE | {"num_hidden_layers": 5}} | (model or {}),
        "data": {
            "train": {"generated": "instructions", "rows": 40},
            "eval": {"generated": "instructions", "split": "eval", "rows": 4},
            "max_length": 128,
        },
        "training": update | (training or {}),
    }
    return TrialConfig.model_validate(given | more)


def measured(config: TrialConfig, cache: Path) -> tuple[int, int]:
    """Bytes at the peak of the second update, and the tokens that it computed."""
    process_group = ProcessGroup()
    patience = CancelToken(process_group, lambda: False)
    resources = ResourceCache(cache, process_group, trust_remote_code=False)
    prepared, tokenizer = resources.load_data(config.data, config.model)
    live = resources.load_model(config.model)
    live.prepare_for_trial(config.lora, config.training)
    evaluator = make_evaluator(config, live, prepared, tokenizer, process_group, patience)
    engine = create_engine(
        config,
        TrainingInputs(live, evaluator.pair_model, prepared.train, None, process_group, patience),
        tokenizer,
        cache,
    )
    engine.step(1)  # makes the moments
    held_trial = sum(p.untyped_storage().nbytes() for p in live.base.parameters())
    held_trial += sum(moment.untyped_storage().nbytes() for moment in engine.state_dict().values() if moment.dim() > 0)
    assert all(p.grad is None for p in live.base.parameters()), "what is held has no gradients in it"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        totals = engine.step(2)
    engine.close()
    passes = 2 if config.loss.moves_reference else 1  # that of the reference has the same tokens
    return held_trial + peak_of(seen), round(totals["tokens_per_second"][0]) // passes


def peak_of(seen: profile) -> int:
    """Bytes allocated at most at a time, beyond those before."""
    now = peak = 0
    recorded: Any = seen.profiler
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(trial(), id="full"),
        pytest.param(trial(training=CHECKPOINTED), id="full, checkpointed"),
        pytest.param(trial(training=AUTOCAST), id="full, autocast"),
        pytest.param(trial(training=AUTOCAST | CHECKPOINTED), id="full, autocast, checkpointed"),
        pytest.param(trial(BF16), id="full in bfloat16"),
        pytest.param(trial(lora={}), id="adapters"),
        pytest.param(trial(lora={}, training=CHECKPOINTED), id="adapters, checkpointed"),
        pytest.param(trial(BF16, AUTOCAST, lora={}), id="adapters on bfloat16, autocast"),
        pytest.param(trial({"generated": SIZE | {"num_hidden_layers": 10}}), id="twice the layers"),
        pytest.param(trial(training={"pairs_per_update": 4}), id="a quarter of the pairs"),
        pytest.param(trial(loss=MOVING), id="a reference that moves"),
        pytest.param(trial(BF16, AUTOCAST, loss=MOVING, lora={"r": 64}), id="adapters, a reference that moves"),
    ],
)
def test_the_formula_is_never_below_the_measured_peak_and_not_far_above(config: TrialConfig, tmp_path: Path) -> None:
    found, tokens = measured(config, tmp_path)
    shape = model_shape(config.model)
    assert shape is not None
    assert 0.8 < found / memory(config, shape, tokens).total <= 1.0


WIDE: dict[str, Any] = {"generated": SIZE | {"vocab_size": 131_072, "hidden_size": 64, "num_hidden_layers": 2}}
GEMMA, WIDER = WIDE["generated"] | {"architecture": "gemma2"}, WIDE["generated"] | {"vocab_size": 256_000}
SEVERAL = {"tokens_per_micro_batch": 200}
"""Micro-batches in an update."""
ROUNDED: dict[str, Any] = {"stochastic_rounding": True} | SEVERAL
NEAREST: dict[str, Any] = {"stochastic_rounding": False} | SEVERAL


@pytest.fixture
def narrow_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds as small beside these models as the real ones beside real models."""
    monkeypatch.setattr(memory_limits, "LOGITS_BYTES", dict.fromkeys(("cpu", "cuda"), 1 << 20))
    monkeypatch.setattr(memory_limits, "LONG_LOGITS_BYTES", dict.fromkeys(("cpu", "cuda"), 1 << 20))
    monkeypatch.setattr(memory_limits, "GRADIENT_CHUNK_ELEMENTS", 1 << 20)
    monkeypatch.setattr(memory_limits, "ROUNDING_CHUNK_ELEMENTS", 1 << 20)


@pytest.mark.usefixtures("narrow_limits")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(trial(WIDE), id="full, one micro-batch"),
        pytest.param(trial(WIDE, SEVERAL), id="full"),
        pytest.param(trial(WIDE, SEVERAL | {"max_grad_norm": 1e-6}), id="full, clipped"),
        pytest.param(trial(WIDE, AUTOCAST | SEVERAL), id="full, autocast"),
        pytest.param(trial(WIDE | BF16, ROUNDED), id="full in bfloat16, stochastic rounding"),
        pytest.param(trial(WIDE | BF16, NEAREST), id="full in bfloat16"),
        pytest.param(trial({"generated": GEMMA} | BF16, ROUNDED), id="softcap in bfloat16"),
        pytest.param(trial({"generated": GEMMA}, SEVERAL), id="softcap in float32"),
        pytest.param(trial({"generated": WIDER} | BF16, ROUNDED), id="256,000 tokens"),
        pytest.param(trial(WIDE | BF16, SEVERAL, lora={}), id="adapters on bfloat16"),
    ],
)
def test_with_a_large_vocabulary_the_formula_holds_too(config: TrialConfig, tmp_path: Path) -> None:
    found, tokens = measured(config, tmp_path)
    shape = model_shape(config.model)
    assert shape is not None
    assert 0.8 < found / memory(config, shape, tokens).total <= 1.0


@pytest.mark.usefixtures("narrow_limits")
@pytest.mark.parametrize(
    ("dtype", "training"),
    [
        pytest.param({}, SEVERAL, id="full"),
        pytest.param({}, AUTOCAST | SEVERAL, id="autocast"),
        pytest.param(BF16, ROUNDED, id="bfloat16"),
    ],
)
def test_with_an_output_layer_of_its_own_the_formula_holds_too(
    dtype: dict[str, Any], training: dict[str, Any], tmp_path: Path
) -> None:
    made = resolve_model_path(trial(WIDE).model, tmp_path / "cache")
    config = AutoConfig.from_pretrained(made)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(made).save_pretrained(tmp_path / "untied")
    trained = trial({"generated": None, "name_or_path": str(tmp_path / "untied")} | dtype, training)
    shape = model_shape(trained.model)
    assert not shape.tied
    found, tokens = measured(trained, tmp_path / "cache")
    assert 0.8 < found / memory(trained, shape, tokens).total <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_no_more_memory_for_a_larger_weight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping and AdamW, plain or with stochastic rounding: at most 10 bytes for each element of one part."""
    monkeypatch.setattr(memory_limits, "ROUNDING_CHUNK_ELEMENTS", 1 << 16)
    rounded = dtype is torch.bfloat16
    training = trial(training={"stochastic_rounding": rounded, "max_grad_norm": 1e-3}).training
    peaks: list[int] = []
    for rows in (1 << 9, 1 << 12):
        net = torch.nn.Linear(1 << 10, rows, bias=False, dtype=dtype)
        optimizer = Optimizer(net, dict(net.named_parameters()), training)
        for _ in range(2):  # the first step makes the moments
            net.weight.grad = torch.ones_like(net.weight)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                optimizer.clip_gradients()
                optimizer.step(1.0)
        peaks.append(peak_of(seen))
    part = 10 * (memory_limits.ROUNDING_CHUNK_ELEMENTS + 64) if rounded else 0
    assert max(peaks) < part + 4096
