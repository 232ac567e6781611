"""Fused and compiled layers: equal results, other models untouched, and what is refused."""

import copy
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from tests.support.trl_oracle import gradients, make_pairs, tiny_model, totals_of, worst
from trainer.config.loss_config import SimpoLoss
from trainer.config.trial import FUSED_ARCHITECTURES, ModelConfig
from trainer.forward.pair_model import PairModel
from trainer.models import layer_kernels
from trainer.models.layer_kernels import compile_layers, drop_compiled_layers, fuse_layers, has_fused_layers
from trainer.results import ModelError

LIGER = ModelConfig(name_or_path="any", kernels="liger")
CPU = torch.device("cpu")


class PlainNorm(nn.Module):
    """liger-kernel's interface in torch: what it computes, its place and its arguments."""

    def __init__(self, size: int, in_place: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        patch(self, in_place=in_place)

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        weight = self.weight + self.offset
        return (normal * weight.float()).to(states.dtype)


def patch(
    module: Any, offset: float = 0.0, eps: float = 1e-6, casting_mode: str = "llama", in_place: bool = True
) -> None:
    module.offset, module.casting_mode = offset, casting_mode
    module.variance_epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or eps
    assert in_place is False
    module.forward = PlainNorm.forward.__get__(module)


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    used.add("rotary")

    def turn(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, -1)
        return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return turn(query), turn(key)


class SwiGlu:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        used.add("SwiGLU")
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Phi3SwiGlu:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        used.add("SwiGLU")
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(functional.silu(gate) * up)


class GeGlu:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        used.add("GEGLU")
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


used: set[str] = set()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's arithmetic under liger-kernel's names, because its kernels run on GPUs only (tests/gpu has them)."""
    modules = {
        "liger_kernel": {},
        "liger_kernel.transformers": {},
        "liger_kernel.transformers.monkey_patch": {"_patch_rms_norm_module": patch},
        "liger_kernel.transformers.rope": {"liger_rotary_pos_emb": rotate},
        "liger_kernel.transformers.rms_norm": {"LigerRMSNorm": PlainNorm},
        "liger_kernel.transformers.swiglu": {"LigerSwiGLUMLP": SwiGlu, "LigerPhi3SwiGLUMLP": Phi3SwiGlu},
        "liger_kernel.transformers.geglu": {"LigerGEGLUMLP": GeGlu},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(layer_kernels, "find_spec", lambda name: name)
    probe = layer_kernels._unsupported_reason
    probe.cache_clear()
    used.clear()
    yield
    probe.cache_clear()


def update(model: PreTrainedModel, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    pairs = make_pairs(4, seed=seed)
    model.zero_grad()
    loss = SimpoLoss(beta=2.0, gamma=1.0)
    terms = PairModel(model).backward(pairs, loss, None, totals_of(pairs), torch.Tensor.backward)
    return float(terms.loss), gradients(model)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("architecture", sorted(FUSED_ARCHITECTURES))
def test_every_fused_function_takes_the_place_of_its_layer(architecture: str) -> None:
    model = tiny_model(architecture)
    loss, right = update(model)
    fused = copy.deepcopy(model)
    assert fuse_layers(fused, LIGER, CPU)
    assert used >= {"rotary", "SwiGLU", "GEGLU"}  # the probe
    used.clear()
    copied = copy.deepcopy(fused)  # as trials that share one process make it
    for each in (fused, copied):
        assert has_fused_layers(each)
        assert any("norm" in name for name, module in each.named_modules() if "forward" in vars(module))
        found, gradient = update(each)
        assert found == pytest.approx(loss, rel=1e-5)
        assert worst(gradient, right) < 1e-5
    assert used == {"rotary", "GEGLU" if architecture.startswith("gemma") else "SwiGLU"}
    used.clear()
    assert update(model)[0] == loss
    assert not used
    assert not has_fused_layers(model)


@pytest.mark.usefixtures("stand_in")
def test_auto_is_for_gpus_and_compiled_layers_have_no_fused_ones() -> None:
    model = tiny_model()
    assert not fuse_layers(model, ModelConfig(name_or_path="any"), CPU)
    assert not fuse_layers(model, ModelConfig(name_or_path="any", compile=True), torch.device("cuda"))
    with pytest.raises(ValidationError, match="either compile: true or kernels: liger"):
        ModelConfig(name_or_path="any", compile=True, kernels="liger")


@pytest.mark.usefixtures("stand_in")
def test_functions_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(GeGlu, "forward", lambda self, x: self.down_proj(self.gate_proj(x) * self.up_proj(x)))
    model = tiny_model()
    with pytest.raises(ModelError, match=r"GEGLU differs by .* in float32"):
        fuse_layers(model, LIGER, CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr(layer_kernels, "_unsupported_reason", lambda device: "no C compiler")
    assert not fuse_layers(model, ModelConfig(name_or_path="any"), cuda)
    assert "liger-kernel is installed and does not run (no C compiler)" in caplog.text
    assert not has_fused_layers(model)


def test_a_missing_package_and_an_unknown_architecture_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_kernels, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed: pip install 'prefsweep\[liger\]'"):
        fuse_layers(tiny_model(), LIGER, CPU)
    assert not fuse_layers(tiny_model(), ModelConfig(name_or_path="any"), torch.device("cuda"))
    monkeypatch.setattr(layer_kernels, "find_spec", lambda name: name)
    with pytest.raises(ModelError, match=r"models of type gpt2 are not among gemma, .*; write auto or none"):
        fuse_layers(tiny_model("gpt2"), LIGER, CPU)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_are_equal_for_varying_lengths(backend: str) -> None:
    """One set of graphs for all batches: each has another plan and another length."""
    from torch._dynamo.utils import counters

    if backend == "inductor" and (reason := no_compiler()):
        pytest.skip(reason)
    model = tiny_model()
    expected = [update(model, seed) for seed in range(4)]
    counters.clear()
    compile_layers(model, backend)
    for seed, (loss, right) in enumerate(expected):
        found, gradient = update(model, seed)
        assert found == pytest.approx(loss, rel=1e-5)
        assert worst(gradient, right) < 1e-5
        if seed == 1:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs > 0
    drop_compiled_layers(model)
    assert update(model, 0)[0] == expected[0][0]


def no_compiler() -> str | None:
    import shutil

    return None if any(map(shutil.which, ("g++", "c++", "clang++"))) else "no C++ compiler"
