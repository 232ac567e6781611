"""Which layers of a model get low-rank adapters, and the sentence that says so by name and count."""

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
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.results import ModelError, cannot_load

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from trainer.config.trial import LoraConfig, ModelConfig

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADAPTED = (nn.Linear, nn.Embedding, Conv1D, *_CONVOLUTIONS)
"""Kinds of layers that peft has adapters for."""
_MODEL_CODE = ("transformers.models.", "transformers_modules.")
"""Modules with the code of models; not that of quantized layers."""
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class _Targets:
    """What is to be adapted: what peft is told, and the layers that the configuration asked for, by full names."""

    modules: list[str] | str
    parameters: list[str]
    asked: list[str]


def adapt(model: PreTrainedModel, lora: LoraConfig, revision: str | None = None) -> tuple[PeftModel, str]:
    """Put adapters into the model; return what holds them, and one sentence about what is adapted and what is not.

    `all-linear` means the linear layers that a text passes and that compute with their weight themselves: not those of
    a vision or audio tower, not the output layer, and not those whose weights a state-space mixer hands to a kernel. A
    name means every layer that it ends the name of; it may also be a tensor of experts. The adapters are drawn from
    torch's seed.

    Raises:
        ModelError: A name matches nothing or nothing that can be adapted, or no layer is left.
    """
    layers = _Layers(model)
    targets = _targets(layers, lora)
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
            # of fused experts' ranks, which are found by another name
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            made = cast("PeftModel", get_peft_model(model, requested))
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise ModelError(
                "lora.dropout: adapters on tensors of experts have no dropout; set it to 0, or name other layers in "
                "lora.target_modules"
            ) from error
        raise ModelError(f"these adapters do not fit this model: {error}") from error
    tuner = cast(Any, made.base_model)
    found = layers.notice(list(tuner.targeted_module_names), list(tuner.targeted_parameter_names), targets.asked)
    return made, found


def _targets(layers: _Layers, lora: LoraConfig) -> _Targets:
    if lora.target_modules == "all-linear":
        found = [name for name in layers.linear if layers.why_not(name) is None]
        if not found:
            raise ModelError(
                f"lora.target_modules all-linear: {layers.kind} has no linear layer that adapters can change"
                f"{layers.left_out(layers.linear)}; train it in full (without lora), or name other layers"
            )
        return _Targets("all-linear" if len(found) == len(layers.linear) else found, [], layers.linear)
    modules, parameters, requested, problems = list[str](), list[str](), list[str](), list[str]()
    for target in lora.target_modules:
        named = _ending(target, layers.modules)
        good = [name for name in named if layers.why_not(name) is None]
        tensors = [] if named else _ending(target, layers.tensors)
        if tensors:
            parameters += tensors
        elif good:
            modules += [target] if len(good) == len(named) else good
            requested += named
        elif layers.fused(target):
            modules.append(target)
        elif named:
            nearest = next((name for name in named if layers.of_text(name)), named[0])
            problems.append(f"{target} {layers.why_not(nearest)}")
        else:
            problems.append(layers.unknown(target))
    if problems:
        raise ModelError("; ".join(f"lora.target_modules: {problem}" for problem in problems))
    return _Targets(list(dict.fromkeys(modules)), parameters, list(dict.fromkeys(requested)))


def describe_adapters(config: ModelConfig, lora: LoraConfig, cache: Path, *, trust_remote_code: bool = False) -> str:
    """Return the sentence about an initial model's adapters, from its configuration alone: no weight is read.

    Raises:
        ModelError: These adapters do not fit the model, or its configuration cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.models.model_files import resolve_model_path

    path = resolve_model_path(config, cache)
    try:
        described = AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(no_causal_model(path, error)) from error
    return adapt(model, lora)[1]


def no_causal_model(path: str, reason: Exception) -> str:
    """Return the sentence about a model that transformers does not load as a causal language model."""
    if "Unrecognized configuration class" not in str(reason):
        return cannot_load(f"the model {path}", reason)
    found = re.search(r"configuration class <class '[\w.]*\.(\w+)Config'>", str(reason))
    kind = f"a {found[1]}" if found else "of another kind"
    return (
        f"the model {path} is {kind}, which transformers does not load as a causal language model of text alone: give "
        "a model of text, such as the language model that it was built on"
    )


@contextmanager
def without_peft_warnings() -> Generator[None]:
    """Leave out a deprecation in transformers that peft has not followed yet; a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


class _Layers:
    """The modules of a model by what adapters can do with them."""

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

    def why_not(self, name: str) -> str | None:
        """Why adapters on this module would be of no use; None where they are of use."""
        if name in self._head:
            return "is the output head, whose logits are never made; leave it out"
        if not name.startswith(self._text):
            return f"is in {self._part(name)}, which a text does not pass; leave it out"
        if self._computes_otherwise(name):
            kind = type(self.modules[name]).__name__
            return f"is a {kind}, which gives something else than a linear layer does; leave it out"
        if self._read_directly(name):
            return "is in a state-space mixer, whose kernels read its weight and would pass an adapter by; leave it out"
        if isinstance(self.modules[name], _ADAPTED):
            return None
        inner = sorted({child.rpartition(".")[2] for child in _ending_below(name, self.linear)})
        kind = type(self.modules[name]).__name__
        if inner:
            return f"is a {kind}, not a layer; name its linear layers: {', '.join(inner)}"
        return f"is a {kind}, which adapters cannot change"

    def _part(self, name: str) -> str:
        """The part outside of the language model: the first name that leaves the path to it."""
        parts, remaining = name.split("."), self._text.split(".")
        for i, part in enumerate(parts):
            if i >= len(remaining) or part != remaining[i]:
                return ".".join(parts[: i + 1])
        return name

    def _computes_otherwise(self, name: str) -> bool:
        """Whether a linear layer by its type gives something else: PhiMoE's and Llama 4's routers, grouped layers."""
        module = self.modules[name]
        if not isinstance(module, nn.Linear) or not type(module).__module__.startswith(_MODEL_CODE):
            return False
        with torch.random.fork_rng([]):
            try:
                given = deepcopy(module).to("meta").eval()(torch.empty(1, 2, module.in_features, device="meta"))
            except Exception:  # noqa: BLE001 - whatever it raises, it takes no input of a linear layer
                return True
        return not isinstance(given, torch.Tensor) or given.shape != (1, 2, module.out_features)

    def _read_directly(self, name: str) -> bool:
        parent, own = self._owner(name), name.rpartition(".")[2]
        if not hasattr(parent, "A_log"):  # of a state-space mixer
            return False
        try:
            source = inspect.getsource(type(parent))
        except (OSError, TypeError):  # made by no file
            source = ""
        return re.search(rf"\bself\.{re.escape(own)}\.(weight|bias)\b", source) is not None or (
            own == "out_proj" and self._model.config.model_type in _PEFT_REFUSES
        )

    def unknown(self, target: str) -> str:
        """That a name matches nothing, with the nearest one that does."""
        known = sorted({name.rpartition(".")[2] for name in (*self.linear, *self.tensors) if self.of_text(name)})
        near = get_close_matches(target.rpartition(".")[2], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{target} is not in {self.kind}{hint} (linear layers: {', '.join(known)})"

    def of_text(self, name: str) -> bool:
        """Whether this is a part of the language model."""
        return name.startswith(self._text)

    def fused(self, target: str) -> bool:
        """Whether peft knows this as the old name of a part of the experts' tensors."""
        config = PeftLoraConfig(target_modules=[target])
        convert_peft_config_for_transformers(config, model=self._model, conversions=None)
        return bool(config.target_parameters)

    def notice(self, modules: Sequence[str], parameters: Sequence[str], requested: Sequence[str]) -> str:
        """What is adapted, and what is not: of the layers that were asked for, and the tensors of experts."""
        layers = f"{_many(modules, 'layer')} ({_counted(modules)})" if modules else ""
        tensors = f"{_many(parameters, 'tensor')} of experts and routers ({_counted(parameters)})" if parameters else ""
        adapted = " and ".join(filter(None, [layers, tensors]))
        return f"lora adapts {adapted}{self.left_out(requested, {*modules, *parameters})}"

    def left_out(self, requested: Sequence[str], adapted: Set[str] = frozenset()) -> str:
        """What is not adapted, and why, as the rest of a sentence; empty where there is nothing to say."""
        message: list[str] = []
        left = [name for name in requested if name not in adapted]
        outside = Counter(self._part(name) for name in left if not self.of_text(name))
        message += [
            f"{count} layer{'s'[: count - 1]} in {part}, which a text does not pass" for part, count in outside.items()
        ]
        ours = [name for name in left if self.of_text(name)]
        mixers = [name for name in ours if self._read_directly(name)]
        if mixers:
            message.append(f"{_counted(mixers)} of state-space mixers, whose kernels would pass an adapter by")
        otherwise = [name for name in ours if self._computes_otherwise(name)]
        if otherwise:
            kinds = sorted({type(self.modules[name]).__name__ for name in otherwise})
            message.append(
                f"{_counted(otherwise)} of type {', '.join(kinds)}, which give something else than linear layers do"
            )
        if others := [name for name in ours if name not in (*mixers, *otherwise)]:
            message.append(f"{_counted(others)}, as peft takes these names for parts of experts")
        experts = [name for name in self.tensors if name not in adapted]
        if experts:
            every = {name: p.numel() for name, p in self._sizes.items()}
            share = sum(every[name] for name in experts) / sum(every.values())
            message.append(
                f"{_many(experts, 'tensor')} of experts ({_counted(experts)}) with {share:.0%} of the weights; to "
                "adapt them, name them in lora.target_modules"
            )
        return f"; not adapted: {'; '.join(message)}" if message else ""


_PEFT_REFUSES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""Model types whose `out_proj` peft refuses, whatever reads it."""


def _text_prefix(model: PreTrainedModel, modules: dict[str, nn.Module]) -> str:
    """How the names of the language model's modules begin; empty where the model is nothing else."""
    config = cast(Any, model.config)
    if config.get_text_config(decoder=True) is config:
        return ""
    decoder = cast(Any, model).get_decoder()
    found = [name for name, module in modules.items() if module is decoder]
    return f"{found[0]}." if found else ""


def _ending(target: str, names: Iterable[str]) -> list[str]:
    """The names that peft would take this one for."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _ending_below(name: str, names: Iterable[str]) -> list[str]:
    return [each for each in names if each.startswith(f"{name}.")]


def _many(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'s'[: len(names) - 1]}"


def _counted(names: Sequence[str]) -> str:
    """The last parts of these names, each with how often it occurs."""
    counts = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in names)
    shown = [f"{count} {name}" for name, count in sorted(counts.items())]
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more names" if more > 0 else "")
