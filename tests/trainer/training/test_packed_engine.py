"""An update of the packed engine: what it waits for, and what it prepares while a GPU computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.device_waits import DeviceWaits, packed_engine
from tests.support.small_trials import MODEL, trial
from trainer.environment import computes_float32
from trainer.objectives.pair_logps import MetricSums

SMALL = {"tokens_per_micro_batch": 128, "pairs_per_update": 8}
TRIALS: dict[str, dict[str, Any]] = {
    "simpo": {},
    "dpo": {"loss": "dpo"},
    "pairs of an update are compared": {"loss": {"kind": "dpo", "loss_type": "aot"}},
    "sft": {"loss": "sft"},
    "adapters under autocast": {"lora": {"r": 2}, "training": SMALL | {"bf16": True}},
    "padded": {"model": MODEL | {"attention": "separate"}},
    "stochastic rounding, activations computed again": {
        "model": MODEL | {"dtype": "bfloat16"},
        "training": SMALL | {"gradient_checkpointing": True},
    },
}


@pytest.mark.parametrize("name", TRIALS)
def test_the_host_waits_for_the_device_once_an_update(cache: Path, name: str) -> None:
    engine, _ = packed_engine(trial(**({"training": SMALL} | TRIALS[name])), cache)
    engine.step(1)  # attention and products are tried once
    with DeviceWaits() as waits:
        engine.step(2)
    places = dict(waits.places)
    places.pop("chunked_logps.backward", None)  # on a CPU only: a GPU multiplies without looking
    places.pop("pair_model._check_reference", None)  # log-probs on the host
    if name == "padded":
        # transformers looks whether anything is padded at all when it makes its mask.
        assert places.pop("architecture.hidden_states") > 0
    assert places == {"packed_engine._read": 1}


def test_a_wait_is_seen() -> None:
    with DeviceWaits() as waits:
        computes_float32(torch.device("cpu"))
    assert waits.places["environment.computes_float32"] >= 3  # two copies, one answer


def test_updates_that_were_laid_out_ahead_are_those_of_a_fresh_engine(cache: Path) -> None:
    """A resumed trial has nothing laid out; a trial that continues has its next micro-batch."""
    config = trial("dpo", training=SMALL)
    whole, policy = packed_engine(config, cache)
    expected: list[MetricSums] = []
    for number in (1, 2, 3):
        if number == 3:
            saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
            weights = {name: p.detach().clone() for name, p in whole.trainable_parameters().items()}
        expected.append(whole.step(number))
    resumed, other = packed_engine(config, cache)
    with torch.no_grad():
        for name, parameter in resumed.trainable_parameters().items():
            parameter.copy_(weights[name])
    resumed.load_state_dict(saved)
    assert without_time(resumed.step(3)) == without_time(expected[2])
    assert all(torch.equal(a, b) for a, b in zip(policy.base.parameters(), other.base.parameters(), strict=True))


def without_time(sums: MetricSums) -> MetricSums:
    return {name: value for name, value in sums.items() if not name.endswith("per_second")}
