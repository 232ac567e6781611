"""Trials on the device: updates, waits, adapters, 4 bits, checkpoints, memory; a sweep with two trials on a card."""

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.device_waits import DeviceWaits, packed_engine
from tests.support.processes import finished
from tests.support.small_trials import MODEL, finish, take, trial, without_speed
from tests.support.specs import TINY_MODEL
from trainer.config.trial import TrialConfig
from trainer.forward.pair_model import PairModel
from trainer.memory_limits import is_out_of_memory
from trainer.results import RunStatus
from trainer.training_session import TrainingSession

SMALL = {"tokens_per_micro_batch": 128, "pairs_per_update": 8, "learning_rate": 1e-2}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "autocast": {"training": SMALL | {"bf16": True}},
    "bfloat16, stochastic rounding": {"model": MODEL | {"dtype": "bfloat16"}},
    "adapters over bfloat16": {
        "model": MODEL | {"dtype": "bfloat16"},
        "lora": {"r": 4},
        "training": SMALL | {"bf16": True, "gradient_checkpointing": True},
    },
}


def config(kind: str, **more: Any) -> TrialConfig:
    return trial(**({"loss": "dpo", "training": SMALL} | KINDS[kind] | more))


@pytest.mark.parametrize("kind", KINDS)
def test_updates_lower_the_loss_and_wait_once(kind: str, cache: Path, device: torch.device, on_gpu: bool) -> None:
    engine, policy = packed_engine(config(kind), cache)
    assert policy.base.device.type == device.type
    trained = engine.trainable_parameters()
    frozen = {n: p.detach().clone() for n, p in policy.base.named_parameters() if n not in trained}
    assert bool(frozen) is kind.startswith("adapters")
    losses = [engine.step(number)["loss"][0] for number in range(1, 5)]
    assert losses[-1] < losses[0]
    if on_gpu:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine.step(5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "synchronizing" in str(w.message)]
        assert len(waits) == 1, [f"{w.filename}:{w.lineno}" for w in caught]
    else:
        with DeviceWaits() as seen:
            engine.step(5)
        assert seen.places["packed_engine._read"] == 1
    assert all(torch.equal(p, frozen[n]) for n, p in policy.base.named_parameters() if n in frozen)


def test_adapters_over_four_bits(cache: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'prefsweep[quantisation]'")
    given = {"model": MODEL | {"dtype": "bfloat16", "load_in_4bit": True}}
    engine, policy = packed_engine(config("adapters over bfloat16", **given), cache)
    assert policy.base.is_quantized
    losses = [engine.step(number)["loss"][0] for number in range(1, 5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["float32", "bfloat16, stochastic rounding"])
def test_a_trial_continues_from_its_checkpoint(kind: str, cache: Path, tmp_path: Path) -> None:
    """To the bit on a CPU; on a GPU sums have no fixed order, so that it is compared to rounding."""
    session, wanted = TrainingSession(cache), config(kind)
    metrics, result = finish(session.train(wanted, tmp_path / "whole"))
    assert result.status is RunStatus.FINISHED
    take(session.train(wanted, tmp_path / "first"), 4)
    again, ended = finish(session.train(wanted, tmp_path / "second", [tmp_path / "first"]))
    assert ended.status is RunStatus.FINISHED
    for (step, one), (other_step, other) in zip(without_speed(metrics), without_speed(again), strict=True):
        assert step == other_step
        assert one == pytest.approx(other, rel=0.05, abs=0.05)


def test_out_of_memory_is_recognized_and_a_smaller_micro_batch_fits(
    cache: Path, device: torch.device, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a limit that torch enforces; on a CPU the same error, raised for large batches."""
    wide = {"generated": MODEL["generated"] | {"vocab_size": 320, "intermediate_size": 1 << 15}}
    sizes = {"large": 100_000, "small": 64}
    expected = packed_engine(config("float32", model=wide), cache)[0].step(1)["loss"]
    engines = {
        name: packed_engine(config("float32", model=wide, training=SMALL | {"tokens_per_micro_batch": size}), cache)[0]
        for name, size in sizes.items()
    }
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + (300 << 20)
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    else:
        plain = PairModel.backward

        def limited(self: PairModel, pairs: Any, *others: Any) -> Any:
            if pairs.batch.tokens > 200:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return plain(self, pairs, *others)

        monkeypatch.setattr(PairModel, "backward", limited)
    try:
        with pytest.raises(RuntimeError) as raised:
            engines["large"].step(1)
        assert is_out_of_memory(raised.value)
        del raised
        engines.pop("large")
        if on_gpu:
            torch.cuda.empty_cache()
        found = engines["small"].step(1)["loss"]
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == pytest.approx(expected, rel=1e-4)


SWEEP = """
name: four
base:
  model: {{generated: {model}, dtype: bfloat16}}
  data:
    train: {{generated: instructions, rows: 120}}
    eval: {{generated: instructions, split: eval, rows: 16}}
    max_length: 128
  loss: {{kind: simpo}}
  training: {{pairs_per_update: 8, max_steps: 12, eval_steps: 6, learning_rate: 1e-3}}
  lora: {{r: 4}}
  evaluation: {{prompts: 2, samples: 1, max_new_tokens: 4}}
search: {{loss.beta: [1.0, 2.0, 5.0, 10.0]}}
maximize: eval_margins/logp
resources: {{gpus_per_trial: {gpus}}}
budget: {{concurrency: 2}}
"""


@pytest.mark.timeout(600)
def test_a_sweep_of_four_trials_two_on_a_card(tmp_path: Path, on_gpu: bool) -> None:
    for needed in ("ray", "mlflow", "optuna", "tenacity"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    file, root = tmp_path / "four.yaml", tmp_path / "runs"
    file.write_text(SWEEP.format(model=TINY_MODEL, gpus=0.5 if on_gpu else 0))
    more = {"CUDA_VISIBLE_DEVICES": "0"} if on_gpu else {}
    finished(root, "sweep", str(file), **more)
    status = json.loads(finished(root, "status", "four", "--json", **more)[0])
    assert [trial["state"] for trial in status["trials"]] == ["COMPLETE"] * 4
