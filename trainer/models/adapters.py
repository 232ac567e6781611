"""Choose the layers that get LoRA adapters, and describe the choice by layer names and counts."""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config.model_folder import check_model_files
from trainer.results import ModelError, cannot_load_message

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from trainer.config.trial import LoraConfig, ModelConfig

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADAPTED = (nn.Linear, nn.Embedding, Conv1D, *_CONVOLUTIONS)
"""Kinds of layers for which peft has adapters."""
_MODEL_CODE = ("transformers.models.", "transformers_modules.")
"""Modules with the code of models; not that of quantized layers."""
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class _Targets:
    """peft's arguments for the layers to adapt, and the layers that the configuration asked for, by full names."""

    modules: list[str] | str
    parameters: list[str]
    requested: list[str]


def adapt(model: PreTrainedModel, lora: LoraConfig, revision: str | None = None) -> tuple[PeftModel, str]:
    """Add LoRA adapters to the model. Return the PEFT model and one sentence about what is adapted and what is not.

    `all-linear` means the linear layers of the language model whose forward pass is called: not those of a vision or
    audio tower, not the output layer, and not those whose weights a state-space mixer passes to a kernel. A name
    selects every layer whose name ends with it; it may also be a tensor of experts. Adapters are initialized from
    torch's seed.

    Raises:
        ModelError: A name matches no layer or none that can be adapted, or no layer is left.
    """
    layers = _Layers(model)
    targets = _targets(layers, lora)
    from peft import LoraConfig as PeftLoraConfig  # peft takes a second to load, and only adapters need it
    from peft import get_peft_model

    requested = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        with without_peft_warnings():
            # about fused experts' ranks, which peft finds under another name
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            adapted = cast("PeftModel", get_peft_model(model, requested))
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise ModelError(
                "lora.dropout: adapters on tensors of experts have no dropout; set it to 0, or name other layers in "
                "lora.target_modules"
            ) from error
        raise ModelError(f"these adapters do not fit this model: {error}") from error
    tuner = cast(Any, adapted.base_model)
    found = layers.describe(list(tuner.targeted_module_names), list(tuner.targeted_parameter_names), targets.requested)
    return adapted, found


def _targets(layers: _Layers, lora: LoraConfig) -> _Targets:
    if lora.target_modules == "all-linear":
        found = [name for name in layers.linear if layers.unadaptable_reason(name) is None]
        if not found:
            raise ModelError(
                f"lora.target_modules all-linear: {layers.kind} has no linear layer that adapters can change"
                f"{layers.describe_left_out(layers.linear)}; train it in full (without lora), or name other layers"
            )
        return _Targets("all-linear" if len(found) == len(layers.linear) else found, [], layers.linear)
    modules, parameters, requested, problems = list[str](), list[str](), list[str](), list[str]()
    for target in lora.target_modules:
        named = _matching_names(target, layers.modules)
        good = [name for name in named if layers.unadaptable_reason(name) is None]
        tensors = [] if named else _matching_names(target, layers.tensors)
        if tensors:
            parameters += tensors
        elif good:
            modules += [target] if len(good) == len(named) else good
            requested += named
        elif layers.is_fused_name(target):
            modules.append(target)
        elif named:
            nearest = next((name for name in named if layers.is_in_language_model(name)), named[0])
            problems.append(f"{target} {layers.unadaptable_reason(nearest)}")
        else:
            problems.append(layers.unknown_target_message(target))
    if problems:
        raise ModelError("; ".join(f"lora.target_modules: {problem}" for problem in problems))
    return _Targets(list(dict.fromkeys(modules)), parameters, list(dict.fromkeys(requested)))


def describe_adapters(config: ModelConfig, lora: LoraConfig, cache: Path, *, trust_remote_code: bool = False) -> str:
    """Return the sentence about an initial model's adapters from its configuration, without reading weights.

    Raises:
        ModelError: These adapters do not fit the model, or its configuration cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.models.model_files import resolve_model_path

    path = resolve_model_path(config, cache)
    check_model_files(path, config.revision)
    try:
        described = AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(not_causal_message(path, error)) from error
    return adapt(model, lora)[1]


def not_causal_message(path: str, reason: Exception) -> str:
    """Return the error message for a model that transformers does not load as a causal language model."""
    if "Unrecognized configuration class" not in str(reason):
        return cannot_load_message(f"the model {path}", reason)
    found = re.search(r"configuration class <class '[\w.]*\.(\w+)Config'>", str(reason))
    kind = f"a {found[1]}" if found else "of another kind"
    return (
        f"the model {path} is {kind}, which transformers does not load as a causal language model; use "
        "a text-only model, such as its language model"
    )


@contextmanager
def without_peft_warnings() -> Generator[None]:
    """Suppress the deprecation warning of transformers that peft's own code causes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


class _Layers:
    """The modules of a model, grouped by whether they can be adapted."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self.kind = model, type(model).__name__
        self._sizes = dict(model.named_parameters())
        self.modules: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if name}
        head = model.get_output_embeddings()
        self._head = {name for name, module in self.modules.items() if module is head}
        self.linear = [
            name
            for name, module in self.modules.items()
            if isinstance(module, (nn.Linear, Conv1D)) and name not in self._head
        ]
        self._text = _text_prefix(model, self.modules)
        self.tensors = [
            name
            for name, parameter in self._sizes.items()
            if parameter.ndim == 3  # [experts, in, out] or [experts, out, in]
            and not isinstance(self._owner(name), _CONVOLUTIONS)
            and name.startswith(self._text)
        ]

    def _owner(self, name: str) -> nn.Module:
        return self.modules.get(name.rpartition(".")[0], self._model)

    def unadaptable_reason(self, name: str) -> str | None:
        """Return why adapters on this module would have no effect; None if they have one."""
        if name in self._head:
            return "is the output layer, which cannot be adapted; leave it out"
        if not name.startswith(self._text):
            return f"is in {self._part(name)}, which text does not pass through; leave it out"
        if self._computes_otherwise(name):
            kind = type(self.modules[name]).__name__
            return f"is a {kind}, which does not return what a linear layer does; leave it out"
        if self._is_read_by_kernel(name):
            return "is in a state-space mixer, whose kernels read its weight directly and ignore adapters; leave it out"
        if isinstance(self.modules[name], _ADAPTED):
            return None
        inner = sorted({child.rpartition(".")[2] for child in _names_below(name, self.linear)})
        kind = type(self.modules[name]).__name__
        if inner:
            return f"is a {kind}, not a layer; name its linear layers: {', '.join(inner)}"
        return f"is a {kind}, which adapters cannot change"

    def _part(self, name: str) -> str:
        """Return the part of the model outside of the language model that contains this module."""
        parts, remaining = name.split("."), self._text.split(".")
        for index, part in enumerate(parts):
            if index >= len(remaining) or part != remaining[index]:
                return ".".join(parts[: index + 1])
        return name

    def _computes_otherwise(self, name: str) -> bool:
        """Return whether a subclass of Linear returns something else, as PhiMoE's and Llama 4's routers do."""
        module = self.modules[name]
        if not isinstance(module, nn.Linear) or not type(module).__module__.startswith(_MODEL_CODE):
            return False
        with torch.random.fork_rng([]):
            try:
                output = deepcopy(module).to("meta").eval()(torch.empty(1, 2, module.in_features, device="meta"))
            except Exception:  # noqa: BLE001 - any error means that it does not take a linear layer's input
                return True
        return not isinstance(output, torch.Tensor) or output.shape != (1, 2, module.out_features)

    def _is_read_by_kernel(self, name: str) -> bool:
        parent, own = self._owner(name), name.rpartition(".")[2]
        if not hasattr(parent, "A_log"):  # of a state-space mixer
            return False
        try:
            source = inspect.getsource(type(parent))
        except (OSError, TypeError):  # a class without a source file
            source = ""
        return re.search(rf"\bself\.{re.escape(own)}\.(weight|bias)\b", source) is not None or (
            own == "out_proj" and self._model.config.model_type in _PEFT_REFUSES
        )

    def unknown_target_message(self, target: str) -> str:
        """Return the error message for a name that matches nothing, with the closest name that does."""
        names = sorted(
            {name.rpartition(".")[2] for name in (*self.linear, *self.tensors) if self.is_in_language_model(name)}
        )
        near = get_close_matches(target.rpartition(".")[2], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{target} is not in {self.kind}{hint} (linear layers: {', '.join(names)})"

    def is_in_language_model(self, name: str) -> bool:
        """Return whether this module belongs to the language model."""
        return name.startswith(self._text)

    def is_fused_name(self, target: str) -> bool:
        """Return whether peft maps this name to a part of a tensor of experts."""
        from peft import LoraConfig as PeftLoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        config = PeftLoraConfig(target_modules=[target])
        convert_peft_config_for_transformers(config, model=self._model, conversions=None)
        return bool(config.target_parameters)

    def describe(self, modules: Sequence[str], parameters: Sequence[str], requested: Sequence[str]) -> str:
        """Describe what is adapted, and which of the requested layers and tensors of experts are not."""
        layers = f"{_count_text(modules, 'layer')} ({_counts_by_name(modules)})" if modules else ""
        tensors = (
            f"{_count_text(parameters, 'tensor')} of experts and routers ({_counts_by_name(parameters)})"
            if parameters
            else ""
        )
        adapted = " and ".join(filter(None, [layers, tensors]))
        return f"lora adapts {adapted}{self.describe_left_out(requested, {*modules, *parameters})}"

    def describe_left_out(self, requested: Sequence[str], adapted: Set[str] = frozenset()) -> str:
        """Return what is not adapted, and why, as the rest of a sentence; "" if everything is."""
        parts: list[str] = []
        left = [name for name in requested if name not in adapted]
        outside = Counter(self._part(name) for name in left if not self.is_in_language_model(name))
        parts += [
            f"{count} layer{'s'[: count - 1]} in {part}, which text does not pass through"
            for part, count in outside.items()
        ]
        of_text = [name for name in left if self.is_in_language_model(name)]
        mixers = [name for name in of_text if self._is_read_by_kernel(name)]
        if mixers:
            parts.append(f"{_counts_by_name(mixers)} of state-space mixers, whose kernels ignore adapters")
        otherwise = [name for name in of_text if self._computes_otherwise(name)]
        if otherwise:
            kinds = sorted({type(self.modules[name]).__name__ for name in otherwise})
            parts.append(
                f"{_counts_by_name(otherwise)} of type {', '.join(kinds)}, which do not return what linear layers do"
            )
        if others := [name for name in of_text if name not in (*mixers, *otherwise)]:
            parts.append(f"{_counts_by_name(others)}, because peft takes these names for parts of experts")
        experts = [name for name in self.tensors if name not in adapted]
        if experts:
            sizes = {name: p.numel() for name, p in self._sizes.items()}
            share = sum(sizes[name] for name in experts) / sum(sizes.values())
            parts.append(
                f"{_count_text(experts, 'tensor')} of experts ({_counts_by_name(experts)}) with {share:.0%} of the "
                "weights; to adapt them, name them in lora.target_modules"
            )
        return f"; not adapted: {'; '.join(parts)}" if parts else ""


_PEFT_REFUSES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""Model types whose `out_proj` peft always refuses to adapt."""


def _text_prefix(model: PreTrainedModel, modules: dict[str, nn.Module]) -> str:
    """Return the prefix of the language model's module names; "" if the model is only a language model."""
    config = cast(Any, model.config)
    if config.get_text_config(decoder=True) is config:
        return ""
    decoder = cast(Any, model).get_decoder()
    found = [name for name, module in modules.items() if module is decoder]
    return f"{found[0]}." if found else ""


def _matching_names(target: str, names: Iterable[str]) -> list[str]:
    """Return the names that peft matches with this target."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _names_below(name: str, names: Iterable[str]) -> list[str]:
    return [each for each in names if each.startswith(f"{name}.")]


def _count_text(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s'[: len(names) - 1]}"


def _counts_by_name(names: Sequence[str]) -> str:
    """Return the last parts of these names, each with its count."""
    counts = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in names)
    shown = [f"{count} {name}" for name, count in sorted(counts.items())]
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more names" if more > 0 else "")
