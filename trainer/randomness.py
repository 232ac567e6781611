"""Sources of randomness of a model in training mode, and how they are switched off.

Every objective compares log-probs of several passes (policy and reference, one update and the next), so a model must
compute the same in training as in evaluation mode. Randomness comes from dropout modules, attributes of other modules
(OPT's `layerdrop`, Mixtral's `jitter_noise`), and configurations that are read at each pass (Falcon's
`hidden_dropout`). `switch_off` sets those to zero. Other sources, such as PhiMoE's sampled experts, are found by
comparing passes: `disable_random_modules`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]
from transformers import PreTrainedConfig, PreTrainedModel

_DROP = "drop"
"""Part of the name of every dropout probability: attention_dropout, attn_pdrop, layerdrop, dropout_rate."""
_JITTER: dict[str, float | None] = {"jitter_noise": 0.0, "input_jitter_noise": 0.0, "moe_jitter_eps": None}
"""Noise on a router's input, and its neutral value: of Mixtral and MiniMax, PhiMoE, DBRX. PhiMoE's
`router_jitter_noise` is not among them: it is the threshold of the sparse mixer and is used in evaluation too.
"""
_OTHER_HEADS = ("classifier", "summary")
"""Prefixes of settings: dropout of heads that a causal LM lacks; not reported."""
_ROUTERS = "output_router_logits"
"""Adds a load-balancing loss to a model's own loss, and fails in generation."""
_RECORD = "_prefsweep_switched_off"
_SEEDS = (0, 1)


class StillRandom(ValueError):
    """A model computes something else in training mode than in evaluation mode, and the cause was not found."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """A value of a configuration that was changed in the loaded model."""

    config: PreTrainedConfig
    name: str
    value: Any
    neutral: Any


@dataclass(slots=True)
class _Record:
    settings: list[_Setting]
    descriptions: dict[str, str]
    """Names of what was switched off, with the configured value."""


def switch_off(model: PreTrainedModel) -> None:
    """Set every known dropout and jitter, and the router's loss, to zero; call once after loading.

    `switched_off` returns what was found. The model's saved configuration keeps its values: see `as_configured`.
    """
    record = _Record([], {})
    for config in _configs(model):
        for name, value in list(vars(config).items()):
            if _is_probability(name, value):
                record.settings.append(_Setting(config, name, value, type(value)(0)))
                if not name.startswith(_OTHER_HEADS):
                    record.descriptions[name] = f"{value:g}"
            elif name == _ROUTERS and value is True:
                record.settings.append(_Setting(config, name, value, False))
                record.descriptions[name] = "true"
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p:
            if f"{module.p:g}" not in record.descriptions.values():
                record.descriptions[type(module).__name__] = f"{module.p:g}"
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_probability(name, value) or (name in _JITTER and isinstance(value, float) and value):
                record.descriptions[name] = f"{value:g}"
                setattr(module, name, _JITTER.get(name, 0.0))
    for setting in record.settings:
        setattr(setting.config, setting.name, setting.neutral)
    setattr(model, _RECORD, record)


def switched_off(model: PreTrainedModel) -> dict[str, str]:
    """Return what `switch_off` found in this model: names and configured values."""
    record: _Record | None = getattr(model, _RECORD, None)
    return {} if record is None else dict(record.descriptions)


@contextmanager
def as_configured(model: PreTrainedModel) -> Generator[None]:
    """Inside the context the model's configuration is the one it was loaded with, for saving."""
    record: _Record | None = getattr(model, _RECORD, None)
    settings = [] if record is None else record.settings
    for setting in settings:
        setattr(setting.config, setting.name, setting.value)
    try:
        yield
    finally:
        for setting in settings:
            setattr(setting.config, setting.name, setting.neutral)


def disable_random_modules(core: PreTrainedModel, run: Callable[[], Tensor], tolerance: float) -> list[str]:
    """Compare passes in training mode with one in evaluation mode, and fix modules that differ in evaluation mode.

    Dropout modules of adapters, which were configured, are left out. The mode of every other module and the caller's
    random state are restored.

    Args:
        core: The model.
        run: One pass over the same tokens.
        tolerance: Relative difference accepted between code paths of training and evaluation.

    Returns:
        The types of the modules that stay in evaluation mode from now on, whatever mode the model is set to.

    Raises:
        StillRandom: The model still differs.
    """
    modes = {module: module.training for module in core.modules()}
    try:
        _set_modes(core, None)
        baseline, again = (_pass(core, run, seed).result for seed in _SEEDS)
        noise = 8 * _distance(again, baseline) + 1e-5

        def differs(kind: type[nn.Module] | None) -> bool:
            _set_modes(core, nn.Module if kind is None else kind)
            first, second = (_pass(core, run, seed) for seed in _SEEDS)
            return (
                first.used_random
                or _distance(second.result, first.result) > noise
                or _distance(first.result, baseline) > max(noise, tolerance)
            )

        if not differs(None):
            return []
        kinds = dict.fromkeys(type(m) for m in core.modules() if not isinstance(m, _DropoutNd))
        found = [kind for kind in kinds if differs(kind)]
        for module in core.modules():
            if type(module) in found:
                modes[module] = False
                setattr(module, "train", MethodType(_stay_in_eval_mode, module))  # noqa: B010 - it has another type
        if differs(None):
            type_names = ", ".join(kind.__name__ for kind in found) or "no single module"
            raise StillRandom(
                f"{type(core).__name__} computes other values in training mode than in evaluation mode, and the cause "
                f"was not found ({type_names}): its log-probs cannot be compared"
            )
        return [kind.__name__ for kind in found]
    finally:
        for module, mode in modes.items():
            module.training = mode


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """`nn.Module.train` of a module that stays in evaluation mode; its children follow `mode`."""
    module.training = False
    for child in module.children():
        child.train(mode)
    return module


def _set_modes(core: nn.Module, kind: type[nn.Module] | None) -> None:
    """Set training mode for modules of exactly this type (nn.Module: all; None: none) that are not fixed."""
    for module in core.modules():
        requested = kind is nn.Module or type(module) is kind
        is_fixed = "train" in vars(module)
        module.training = requested and not is_fixed and not isinstance(module, _DropoutNd)


@dataclass(frozen=True, slots=True)
class _Pass:
    result: Tensor
    used_random: bool
    """Whether random numbers were drawn."""


def _pass(core: PreTrainedModel, run: Callable[[], Tensor], seed: int) -> _Pass:
    devices = [core.device] if core.device.type == "cuda" else []
    python = random.getstate()
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        before = _states(core.device)
        result = run().cpu().double()
        used_random = before != _states(core.device)
    used_random = used_random or python != random.getstate()
    random.setstate(python)
    return _Pass(result, used_random)


def _states(device: torch.device) -> list[bytes]:
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [state.numpy().tobytes() for state in states]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _is_probability(name: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return _DROP in name and number and 0 < value <= 1


def _configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """Yield every configuration that a module reads, and nested ones, each once."""
    seen: set[int] = set()
    waiting: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop(0)
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += vars(config).values()
