"""Merge LoRA adapters into the weights of their base model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from trainer.config.trial import ModelConfig
from trainer.models.adapters import without_peft_warnings
from trainer.models.policy_model import load_model
from trainer.results import ModelError


class BaseGone(ModelError):
    """The folder of the base model does not exist."""

    def __init__(self, path: str) -> None:
        super().__init__(f"the base model {path} of these adapters was not found")


def present_base(source: Path, model: ModelConfig | None, cache: Path | None) -> str:
    """Return the base model of the adapters in `source`: a hub name, or its folder where it is now.

    A base in the `cache` of a runs folder that was moved or copied is that in the present cache; another one that is
    gone is the `model` with which the trial is configured now.
    """
    adapter_config: dict[str, Any] = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    stored = str(adapter_config["base_model_name_or_path"])
    path = Path(stored)
    if not path.is_absolute():
        return stored
    if cache is not None and cache.name in path.parts and not path.is_relative_to(cache):
        inside = path.parts[len(path.parts) - path.parts[::-1].index(cache.name) :]
        if cache.joinpath(*inside).is_dir():
            return str(cache.joinpath(*inside))
    if not path.is_dir() and model is not None and model.name_or_path is not None and "sft" not in path.parts:
        return model.name_or_path
    return stored


def load_base(
    source: Path, model: ModelConfig | None, *, base: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the base model of the adapters in `source` on the CPU, in the dtype that was used in training.

    Args:
        source: A folder with `adapter_config.json`.
        model: How the base was loaded for training; by default the dtype of its files.
        base: Where the base is; by default as stored with the adapters.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ModelError: The base cannot be loaded (BaseGone if its folder does not exist).
    """
    adapter_config: dict[str, Any] = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    path = base or str(adapter_config["base_model_name_or_path"])
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise BaseGone(path)
    own: dict[str, Any] = {} if model is None else {"dtype": model.dtype, "load_in_4bit": model.load_in_4bit}
    config = ModelConfig(name_or_path=path, revision=adapter_config.get("revision"), **own)
    return load_model(config, path, torch.device("cpu"), trust_remote_code=trust_remote_code, as_stored=model is None)


def merge_adapters(
    source: Path, model: ModelConfig | None, *, base: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the base model of the adapters in `source` with the adapters merged, in the dtype of training.

    A weight shared by two layers, of which only one is adapted, is stored for each. Weights in 4 bits are dequantized
    to their values in training. Arguments and errors are those of `load_base`.
    """
    loaded = load_base(source, model, base=base, trust_remote_code=trust_remote_code)
    if model is not None and model.load_in_4bit:
        loaded = _dequantize(loaded, torch.float32 if model.dtype == "float32" else torch.bfloat16)
    shared = _shared_weights(loaded)
    with without_peft_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # the weights are separated below
        warnings.filterwarnings("ignore", message=".*no longer tied.*")
        adapted = cast(Any, PeftModel).from_pretrained(loaded, str(source))
        separated = _separate(loaded, shared)
        merged_model = cast(PreTrainedModel, adapted.merge_and_unload())
    if separated:
        for config in {id(c): c for c in (merged_model.config, merged_model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        merged_model._tied_weights_keys = None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        merged_model.all_tied_weights_keys = {}
    return merged_model


def _dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    plain = cast(PreTrainedModel, cast(Any, model).dequantize())
    return cast(PreTrainedModel, cast(Any, plain).to(dtype))


def _shared_weights(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return every parameter that several modules share, as its modules and its name in each."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
    return [found for found in owners.values() if len(found) > 1]


def _separate(model: nn.Module, shared: list[list[tuple[nn.Module, str]]]) -> bool:
    """Give each module its own copy of a shared weight if one of them is adapted. Return whether one was."""
    wrapped: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            wrapped.add(id(module.get_base_layer()))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped.add(id(module.original_module))
    separated = False
    for owners in shared:
        if not any(id(module) in wrapped for module, _ in owners):
            continue
        separated = True
        for module, name in owners[1:]:
            old = cast(nn.Parameter, getattr(module, name))
            setattr(module, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    return separated
