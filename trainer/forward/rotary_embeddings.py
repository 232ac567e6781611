"""Rotary embeddings that depend on the longest sequence of a batch, computed for each sequence's own length.

transformers switches LongRoPE (Phi-3, PhiMoE) from short to long factors, and scales dynamic NTK, by the largest
position of a whole batch, and dynamic scaling persists for later batches. A pair's log-probs would then depend on the
other pairs of the batch and on `tokens_per_micro_batch`. While a batch of `PairModel` is computed, such modules are
called once for each group of sequences with equal frequencies, as if each sequence were alone.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_DYNAMIC, _LONGROPE = "dynamic", "longrope"


@dataclass(frozen=True, slots=True)
class RotaryPlan:
    """The rotary frequencies of each position of a batch."""

    longest: tuple[int, ...]
    """Tokens of the longest sequence of each group of sequences with equal frequencies."""
    which: Tensor
    """[rows, length] group of the sequence that a position belongs to."""


class RotarySwitch:
    """The rotary modules of a model whose frequencies depend on length. Sequences of equal `key` have equal
    frequencies.
    """

    def __init__(self, modules: Sequence[nn.Module], limits: Sequence[int], dynamic: bool) -> None:
        self._modules, self._limits, self._dynamic = tuple(modules), tuple(sorted(limits)), dynamic

    @property
    def limit(self) -> int:
        """Number of tokens up to which all sequences have the same frequencies."""
        return self._limits[0]

    @classmethod
    def of(cls, model: nn.Module) -> RotarySwitch | None:
        """Return the switch of a model, wrapped or not; None if its frequencies are fixed."""
        found = [(module, kinds) for module in model.modules() if (kinds := _switching(module))]
        limits = [_limit(module, layers, kind) for module, kinds in found for layers, kind in kinds]
        dynamic = any(_DYNAMIC in kind for _, kinds in found for _, kind in kinds)
        return cls([module for module, _ in found], limits, dynamic) if found else None

    def key(self, tokens: int) -> int:
        """Return what determines a sequence's frequencies: its side of the switch, or its length."""
        if self._dynamic:
            return 0 if tokens <= self.limit else tokens
        return sum(tokens > limit for limit in self._limits)

    def reset(self) -> None:
        """Restore the modules to their state after loading."""
        for module in self._modules:
            _reset(module)

    @contextmanager
    def by_sequence(self, plan: RotaryPlan) -> Generator[None]:
        """Inside the context the modules compute each sequence of the batch as if it were alone."""
        self.reset()
        if max(plan.longest) > self.limit:
            for module in self._modules:
                vars(module)["forward"] = partial(_forward, module, plan)
        try:
            yield
        finally:
            for module in self._modules:
                vars(module).pop("forward", None)
            self.reset()


def _forward(
    module: nn.Module, plan: RotaryPlan, states: Tensor, position_ids: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, ...] | Tensor:
    """Compute the module's result for each group alone, and select by position."""
    where = position_ids.expand_as(plan.which)
    full: list[Tensor] | None = None
    is_tensor = False
    for group, longest in enumerate(plan.longest):
        _reset(module)
        positions = torch.arange(longest, device=position_ids.device)[None]
        table = type(module).forward(module, states, positions, *others, **options)
        is_tensor = isinstance(table, Tensor)
        parts = [each[0][where.clamp(max=longest - 1)] for each in ((table,) if is_tensor else table)]
        if full is None:
            full = parts
            continue
        in_group = plan.which == group
        full = [
            torch.where(in_group.view(*in_group.shape, *(1,) * (part.dim() - 2)), part, before)
            for part, before in zip(parts, full, strict=True)
        ]
    assert full is not None, "a batch has at least one sequence"
    return full[0] if is_tensor else tuple(full)


def _switching(module: nn.Module) -> list[tuple[str | None, str]]:
    """Return (layer type or None, kind) of each rotary embedding in this module whose frequencies depend on length."""
    kind = getattr(module, "rope_type", None)
    kinds: dict[str | None, Any] = kind if isinstance(kind, dict) else {None: kind}
    return [
        (layers, each)
        for layers, each in kinds.items()
        if isinstance(each, str)
        and (_DYNAMIC in each or each == _LONGROPE)
        and all(hasattr(module, f"{_prefix(layers)}{name}") for name in ("inv_freq", "original_inv_freq"))
    ]


def _prefix(layers: str | None) -> str:
    return "" if layers is None else f"{layers}_"


def _limit(module: Any, layers: str | None, kind: str) -> int:
    if _DYNAMIC in kind:
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    return int((parameters if layers is None else parameters[layers])["original_max_position_embeddings"])


def _reset(module: nn.Module) -> None:
    """Restore the module to its state after loading."""
    of_module: Any = module
    for layers, kind in _switching(module):
        prefix = _prefix(layers)
        original: Tensor = getattr(module, f"{prefix}original_inv_freq")
        current: Tensor = getattr(module, f"{prefix}inv_freq")
        module.register_buffer(f"{prefix}inv_freq", original.to(current.device, copy=True), persistent=False)
        if _DYNAMIC in kind:
            setattr(module, f"{prefix}max_seq_len_cached", of_module.original_max_seq_len)
