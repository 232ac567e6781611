"""The plan's memory by formula against what torch allocates at the peak of an update, for small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from orchestrator.spec.memory import memory
from orchestrator.spec.sizes import shape_of
from trainer.config import TrialConfig
from trainer.run import engine_for
from trainer.stock import Stock, examiner
from trainer.training.engine import Material
from trainer.world import Patience, World

SIZE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
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
    world = World()
    patience = Patience(world, lambda: False)
    stock = Stock(cache, world, trust_remote_code=False)
    prepared, tokenizer = stock.prepared(config.data, config.model)
    live = stock.live(config.model)
    live.begin(config.lora, config.training)
    looking = examiner(config, live, prepared, tokenizer, world, patience)
    engine = engine_for(config, Material(live, looking.model, prepared.train, None, world, patience), tokenizer, cache)
    engine.update(1)  # makes the moments
    held = sum(p.untyped_storage().nbytes() for p in live.base.parameters())
    held += sum(moment.untyped_storage().nbytes() for moment in engine.state().values() if moment.dim() > 0)
    assert all(p.grad is None for p in live.base.parameters()), "what is held has no gradients in it"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        totals = engine.update(2)
    engine.close()
    now = peak = 0
    recorded: Any = seen.profiler
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return held + peak, round(totals["tokens_per_second"][0])


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
    ],
)
def test_the_formula_is_never_below_the_measured_peak_and_not_far_above(config: TrialConfig, tmp_path: Path) -> None:
    found, tokens = measured(config, tmp_path)
    shape = shape_of(config.model)
    assert shape is not None
    assert 0.8 < found / memory(config, shape, tokens).total <= 1.0
