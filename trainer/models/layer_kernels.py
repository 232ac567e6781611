"""Faster layers of a loaded model: liger-kernel's fused norms, rotary embeddings and MLPs, or torch.compile.

Both change results by rounding only and are no part of what identifies a result. Fused functions are bound to the
modules of one model; no class of transformers is changed, so that other models of the process are not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trainer.config.trial import FUSED_ARCHITECTURES, LIGER_MISSING, ModelConfig, unknown_architecture
from trainer.results import ModelError

_log = logging.getLogger(__name__)

_GEMMA = frozenset({"gemma", "gemma2", "gemma3_text"})
_MARK = "prefsweep_fused_layers"
_ROTARY = "apply_rotary_pos_emb"


def fuse_layers(model: PreTrainedModel, config: ModelConfig, device: torch.device) -> bool:
    """Replace norms, rotary embeddings and MLPs by liger-kernel's, as `config.kernels` says. Return whether it did.

    `auto` replaces them on a GPU where the package is installed, knows the architecture and runs; a package that does
    not run is reported. Raises ModelError if `liger` was asked for and cannot be used.
    """
    if config.kernels == "none" or (config.kernels == "auto" and (device.type != "cuda" or config.compile)):
        return False
    if find_spec("liger_kernel") is None:
        if config.kernels == "auto":
            return False
        raise ModelError(LIGER_MISSING)
    kind = model.config.get_text_config().model_type
    reason = _unsupported_reason(device) if kind in FUSED_ARCHITECTURES else unknown_architecture(kind)
    if reason is None:
        _bind(model, kind)
        vars(model)[_MARK] = True
        _log.info("norms, rotary embeddings and MLPs run on liger-kernel's functions")
        return True
    if config.kernels == "liger":
        raise ModelError(f"model.kernels: liger cannot be used: {reason}")
    if kind in FUSED_ARCHITECTURES:
        _log.warning("liger-kernel is installed and does not run (%s); transformers' own layers are used", reason)
    return False


def has_fused_layers(model: nn.Module) -> bool:
    """Return whether `fuse_layers` replaced layers of this model."""
    return _MARK in vars(model)


class _Liger:
    """The functions of liger-kernel; `forward` methods take the place of a module's own."""

    def __init__(self) -> None:
        def module(name: str) -> Any:
            return import_module(f"liger_kernel.transformers.{name}")

        swiglu: Any = module("swiglu")
        self.swiglu: Callable[..., Tensor] = swiglu.LigerSwiGLUMLP.forward
        self.fused_swiglu: Callable[..., Tensor] = swiglu.LigerPhi3SwiGLUMLP.forward  # of one matrix for gate and up
        self.geglu: Callable[..., Tensor] = module("geglu").LigerGEGLUMLP.forward
        self.rotary: Callable[..., tuple[Tensor, Tensor]] = module("rope").liger_rotary_pos_emb
        self.norm: Callable[..., nn.Module] = module("rms_norm").LigerRMSNorm
        self.replace_norm: Callable[..., None] = module("monkey_patch")._patch_rms_norm_module


def _bind(model: PreTrainedModel, kind: str) -> None:
    liger, config = _Liger(), model.config.get_text_config()
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    gated = {"silu": liger.swiglu, "gelu_pytorch_tanh": liger.geglu}.get(activation)
    # Gemma multiplies by 1 + weight in float32. In place would overwrite gradients that a residual still needs where a
    # norm follows a sublayer.
    norm: dict[str, Any] = {"offset": 1.0, "casting_mode": "gemma"} if kind in _GEMMA else {"casting_mode": "llama"}
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            liger.replace_norm(module, in_place=False, **norm)
        elif name.endswith("MLP") and hasattr(module, "gate_up_proj") and activation == "silu":
            _set_forward(module, liger.fused_swiglu)
        elif name.endswith("MLP") and hasattr(module, "gate_proj") and gated is not None:
            _set_forward(module, gated)
        elif name.endswith("Attention"):
            _replace_rotary(module, liger.rotary)


def _set_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    vars(module)["forward"] = MethodType(function, module)


def _replace_rotary(attention: nn.Module, fused: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Have this module's forward call `fused` where it calls its file's `apply_rotary_pos_emb`."""
    plain = type(attention).forward
    if not isinstance(plain, FunctionType) or _ROTARY not in plain.__code__.co_names:
        return

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if cos.shape[-1] != query.shape[-1]:  # only a part of each head is rotated
            return plain.__globals__[_ROTARY](query, key, cos, sin)
        return fused(query, key, cos, sin)

    names = plain.__globals__ | {_ROTARY: rotate}
    copied = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    copied.__kwdefaults__ = plain.__kwdefaults__
    _set_forward(attention, copied)


@lru_cache(maxsize=8)
def _unsupported_reason(device: torch.device) -> str | None:
    """Return why liger-kernel's functions do not run here, or differ from torch's, forward and backward; else None.

    They are compiled when they are first called, which needs Triton and a C compiler.
    """
    try:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            for name, (found, expected) in _probes(device, dtype).items():
                off = float((found.float() - expected.float()).norm() / expected.float().norm())
                if not off <= tolerance:
                    return f"{name} differs by {off:.1e} in {str(dtype).removeprefix('torch.')}"
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # noqa: BLE001  (Triton's errors have no common class)
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _probes(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return results and gradients of each function, liger-kernel's and torch's, by name."""
    liger, generator = _Liger(), torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    class Gated:
        """An MLP with trivial projections, so that only its product is compared. The kernels overwrite their inputs."""

        def gate_proj(self, states: Tensor) -> Tensor:
            return states * 2

        def up_proj(self, states: Tensor) -> Tensor:
            return states + 1

        def down_proj(self, states: Tensor) -> Tensor:
            return states * 1

    def swiglu(states: Tensor) -> Tensor:
        return functional.silu(states * 2) * (states + 1)

    def geglu(states: Tensor) -> Tensor:
        return functional.gelu(states * 2, approximate="tanh") * (states + 1)

    def rms(states: Tensor) -> Tensor:
        wide = states.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(states.dtype)

    def rotated(query: Tensor, key: Tensor) -> Tensor:
        def turn(states: Tensor) -> Tensor:
            first, second = states.chunk(2, -1)
            return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

        return turn(query) + turn(key).repeat(1, 2, 1, 1)

    def fused_rotated(query: Tensor, key: Tensor) -> Tensor:
        query, key = liger.rotary(query, key, cos, sin)
        return query + key.repeat(1, 2, 1, 1)

    angles = draw(1, 5, 16).float().repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norm = liger.norm(32, in_place=False).to(device, dtype)
    pairs: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "RMSNorm": (norm, rms, (draw(1, 5, 32),)),
        "SwiGLU": (partial(liger.swiglu, Gated()), swiglu, (draw(1, 5, 32),)),
        "GEGLU": (partial(liger.geglu, Gated()), geglu, (draw(1, 5, 32),)),
        "rotary": (fused_rotated, rotated, (draw(1, 4, 5, 32), draw(1, 2, 5, 32))),
    }
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (fused, plain, inputs) in pairs.items():
        outcomes: list[Tensor] = []
        for function in (fused, plain):
            variables = [each.clone().requires_grad_() for each in inputs]
            with torch.enable_grad():
                out = function(*variables)
                grads = torch.autograd.grad(out.float().square().sum(), variables)
            outcomes.append(torch.cat([each.detach().flatten() for each in (out, *grads)]))
        results[name] = outcomes[0], outcomes[1]
    return results


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile each layer for varying lengths; it is traced when it is first called. Raises ModelError without layers.

    `backend`: torch.compile's.
    """
    layers = _layers(model)
    if not layers:
        raise ModelError(f"model.compile: {type(model).__name__} does not declare its layers; set it to false")
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def drop_compiled_layers(model: PreTrainedModel) -> None:
    """Undo `compile_layers`."""
    for layer in _layers(model):
        layer._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    names = set(model._no_split_modules or ())  # pyright: ignore[reportPrivateUsage]
    return [module for module in model.modules() if type(module).__name__ in names]
