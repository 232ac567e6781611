"""Sources of randomness of a model in training mode, and how they are switched off.

Every objective compares log-probs of several passes (policy with reference, one update with the next), so a model in
training must compute the same as in evaluation mode. Architectures keep their randomness in dropout modules, in numbers
of other modules (OPT's `layerdrop`, Mixtral's `jitter_noise`), and in configurations that are read at each pass
(Falcon's `hidden_dropout`). `switch_off` sets those to zero. What is left, for instance PhiMoE's sampled experts, is
found by comparing passes: `hold_at_rest`.
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
"""Noise on a router's input, and its value that means none: of Mixtral and MiniMax, PhiMoE, DBRX. Not PhiMoE's
`router_jitter_noise`, which is the threshold of its sparse mixer and counts at rest too."""
_ELSEWHERE = ("classifier", "summary")
"""Probabilities of output layers that a causal language model has not."""
_ROUTERS = "output_router_logits"
"""Adds a load-balancing loss to a model's own loss, and fails in generation."""
_RECORD = "_prefsweep_switched_off"
_SEEDS = (0, 1)


class StillRandom(ValueError):
    """A model computes something else in training mode than at rest, and what makes it so was not found."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """A value of a configuration that was changed in the loaded model."""

    config: PreTrainedConfig
    name: str
    value: Any
    now: Any


@dataclass(slots=True)
class _Record:
    settings: list[_Setting]
    named: dict[str, str]
    """What was switched off, by name, with its value."""


def switch_off(model: PreTrainedModel) -> None:
    """Put every dropout and jitter that is known here to nothing, and the router's loss; once, after loading.

    `switched_off` names what was found. The model's saved configuration keeps its values: see `as_configured`.
    """
    record = _Record([], {})
    for config in _configs(model):
        for name, value in list(vars(config).items()):
            if _is_probability(name, value):
                record.settings.append(_Setting(config, name, value, type(value)(0)))
                if not name.startswith(_ELSEWHERE):
                    record.named[name] = f"{value:g}"
            elif name == _ROUTERS and value is True:
                record.settings.append(_Setting(config, name, value, False))
                record.named[name] = "true"
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p:
            if f"{module.p:g}" not in record.named.values():
                record.named[type(module).__name__] = f"{module.p:g}"
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_probability(name, value) or (name in _JITTER and isinstance(value, float) and value):
                record.named[name] = f"{value:g}"
                setattr(module, name, _JITTER.get(name, 0.0))
    for setting in record.settings:
        setattr(setting.config, setting.name, setting.now)
    setattr(model, _RECORD, record)


def switched_off(model: PreTrainedModel) -> dict[str, str]:
    """What `switch_off` found in this model: names with their values, as configured."""
    record: _Record | None = getattr(model, _RECORD, None)
    return {} if record is None else dict(record.named)


@contextmanager
def as_configured(model: PreTrainedModel) -> Generator[None]:
    """Until this ends the model's configuration is the one it was loaded with: to save it."""
    record: _Record | None = getattr(model, _RECORD, None)
    settings = [] if record is None else record.settings
    for setting in settings:
        setattr(setting.config, setting.name, setting.value)
    try:
        yield
    finally:
        for setting in settings:
            setattr(setting.config, setting.name, setting.now)


def hold_at_rest(core: PreTrainedModel, run: Callable[[], Tensor], tolerance: float) -> list[str]:
    """Compare passes in training mode with one at rest, and hold modules at rest whose passes differ.

    run: one pass over the same tokens; its result may differ by `tolerance` (relative) between code for training and
    for evaluation. Modules that adapters brought, with a dropout that was asked for, are left out. Returns the types of
    the modules that stay in evaluation mode from now on, whatever mode the model is put into. StillRandom where that
    does not help. The mode of every module, and the random numbers of the caller, are left as they were.
    """
    modes = {module: module.training for module in core.modules()}
    try:
        _set_modes(core, None)
        rest, again = (_pass(core, run, seed).result for seed in _SEEDS)
        noise = 8 * _distance(again, rest) + 1e-5

        def differs(kind: type[nn.Module] | None) -> bool:
            _set_modes(core, nn.Module if kind is None else kind)
            first, second = (_pass(core, run, seed) for seed in _SEEDS)
            return (
                first.drew
                or _distance(second.result, first.result) > noise
                or _distance(first.result, rest) > max(noise, tolerance)
            )

        if not differs(None):
            return []
        kinds = dict.fromkeys(type(m) for m in core.modules() if not isinstance(m, _DropoutNd))
        found = [kind for kind in kinds if differs(kind)]
        for module in core.modules():
            if type(module) in found:
                modes[module] = False
                setattr(module, "train", MethodType(_stay_at_rest, module))  # noqa: B010 - it has another type
        if differs(None):
            named = ", ".join(kind.__name__ for kind in found) or "none of its modules alone"
            raise StillRandom(
                f"{type(core).__name__} computes something else in training mode than at rest, from pass to pass or "
                f"always, and what makes it so was not found ({named}): its log-probs cannot be compared"
            )
        return [kind.__name__ for kind in found]
    finally:
        for module, mode in modes.items():
            module.training = mode


def _stay_at_rest(module: nn.Module, mode: bool = True) -> nn.Module:
    """`nn.Module.train` of a module that stays in evaluation mode; what is inside of it does not."""
    module.training = False
    for child in module.children():
        child.train(mode)
    return module


def _set_modes(core: nn.Module, kind: type[nn.Module] | None) -> None:
    """Training mode for modules of this very type (nn.Module: all; None: none) that are not held at rest."""
    for module in core.modules():
        requested = kind is nn.Module or type(module) is kind
        current = "train" in vars(module)
        module.training = requested and not current and not isinstance(module, _DropoutNd)


@dataclass(frozen=True, slots=True)
class _Pass:
    result: Tensor
    drew: bool
    """Whether random numbers were drawn."""


def _pass(core: PreTrainedModel, run: Callable[[], Tensor], seed: int) -> _Pass:
    devices = [core.device] if core.device.type == "cuda" else []
    python = random.getstate()
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        before = _states(core.device)
        result = run().double()
        drew = before != _states(core.device)
    drew = drew or python != random.getstate()
    random.setstate(python)
    return _Pass(result, drew)


def _states(device: torch.device) -> list[bytes]:
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [state.numpy().tobytes() for state in states]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _is_probability(name: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return _DROP in name and number and 0 < value <= 1


def _configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """Every configuration that a module reads, and those inside of them; each once."""
    seen: set[int] = set()
    waiting: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop(0)
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += vars(config).values()
