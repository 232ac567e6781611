"""One loaded model under several live ones, each with modules and adapters of its own: memory of one base, not of K."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trainer.config import ModelConfig
from trainer.models.live import LiveModel


class SharedBase:
    """A model as it was loaded, at rest, whose weights nobody may change: trials train adapters over them."""

    def __init__(self, model: PreTrainedModel, config: ModelConfig, identity: str, files: Sequence[Path]) -> None:
        """As of `LiveModel`. The weights are frozen here."""
        self._model, self._config, self._identity, self._files = model, config, identity, tuple(files)
        model.requires_grad_(False)
        model.eval()

    def another(self) -> LiveModel:
        """A live model over these very weights; its modules and buffers are its own."""
        tree = copy.deepcopy(self._model, _kept(self._model))
        return LiveModel(tree, self._config, self._identity, self._files, over=self)


def _kept(model: nn.Module) -> dict[int, Any]:
    """What a deep copy takes as it is: the parameters, and what bitsandbytes keeps beside those in 4 bits."""
    kept: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            kept[id(parameter)] = parameter
            if (scales := getattr(parameter, "quant_state", None)) is not None:
                kept[id(scales)] = scales
    return kept
