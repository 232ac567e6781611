"""Parameter groups of the optimizer: weights decay, norms and biases do not, as in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

# As transformers' Trainer.get_decay_parameter_names (5.23).
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def parameter_groups(
    model: nn.Module, trained: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """The trained parameters of `model` by name as an optimizer's groups: those that decay, then the others."""
    decaying = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained.items() if n in decaying], "weight_decay": weight_decay},
        {"params": [p for n, p in trained.items() if n not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
