"""The live model: loaded once, put back to its start between trials, with or without low-rank adapters.

One loaded model under several live ones, each with modules and adapters of its own: memory of one base, not of K.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trainer.config.trial import LoraConfig, ModelConfig, TrainingConfig
from trainer.distributed.deepspeed_zero3 import CannotDivide, Zero3
from trainer.distributed.fsdp import CannotShard, gathered, is_sharded, shard
from trainer.models.adapters import adapt, no_causal_model
from trainer.models.initial_weights import StartWeights, named_tensors
from trainer.randomness import switch_off
from trainer.results import ModelError

_log = logging.getLogger(__name__)
_said: set[str] = set()
"""What this process has told about adapters: each once, however many trials have them."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    config: ModelConfig,
    place: str,
    device: torch.device | None,
    *,
    trust_remote_code: bool = False,
    as_stored: bool = False,
) -> PreTrainedModel:
    """The start model on `device` in `config.dtype`, dropout off, from `place`: a folder or a hub name.

    as_stored: in the dtype of its files instead.

    Without a device it stays as it was read, mapped from its files on the CPU: to be cut into slices.

    Only safetensors are read, and code from a model's folder is run only when `trust_remote_code` says so. ModelError
    with a sentence for what cannot be loaded, or only in part.
    """
    _check_folder(Path(place))
    wanted: dict[str, Any] = {"dtype": "auto" if as_stored else _DTYPES[config.dtype]}
    if config.load_in_4bit:
        wanted |= {"quantization_config": four_bits(), "device_map": {"": device}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            revision=config.revision,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **wanted,
        )
    except (OSError, ValueError, SafetensorError) as why:
        raise ModelError(no_causal_model(place, why)) from why
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if missing := sorted(info["missing_keys"]) + sorted(str(m) for m in info["mismatched_keys"]):
        raise ModelError(
            f"the model {place} is incomplete: {len(missing)} weights are missing or of another shape, "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    if device is not None and not config.load_in_4bit:
        _own(model)
        model.to(device)  # pyright: ignore[reportArgumentType]
    switch_off(model)
    return model


def _own(model: nn.Module) -> None:
    """Move weights out of the memory-mapped file into aligned memory, where products are fast and always the same.

    Contiguous, as the moments are that a checkpoint brings back, and as the optimiser cuts them into parts.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _check_folder(place: Path) -> None:
    if not place.is_dir():
        return
    if (place / "adapter_config.json").exists():
        raise ModelError(f"{place} holds adapters, not a whole model; merge them into their base first")
    if not any(place.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in place.glob("*.bin"))) or "none"
        raise ModelError(
            f"{place} holds no .safetensors weights (others found: {found}); weights in pickle form can run code when "
            "opened and are refused: save the model again with save_pretrained"
        )


def four_bits() -> BitsAndBytesConfig:
    """Return how weights are kept in 4 bits; ModelError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.load_in_4bit needs bitsandbytes, which is not installed: pip install 'prefsweep[quantisation]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


class LiveModel:
    """One loaded model that serves one trial after the other, each from the same start weights to the bit."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ModelConfig,
        identity: str,
        files: Sequence[Path] = (),
        *,
        over: object = None,
    ) -> None:
        """files: the safetensors files that the weights came from, which `StartWeights` maps instead of copying.

        over: whose weights these are, where other live models of this process have the same ones: then only adapters
        can be trained.
        """
        self.base, self.config, self.identity, self._files = model, config, identity, tuple(files)
        self._over = over
        self._adapted: PeftModel | None = None
        self.zero: Zero3 | None = None
        """Where DeepSpeed divides the model: what takes its backward passes and steps."""
        self._start: StartWeights | None = None
        self._touched = False

    def rest(self) -> bool:
        """Take adapters off and put the start weights back; True when weights had to be copied."""
        if self._adapted is not None:
            self.base = self._adapted.unload()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            self._adapted = None
        copied = self._touched and self._start is not None
        if self._touched and self._start is not None:
            self._start.put_back(self.base)
        self._touched = False
        self.base.activation_checkpointing_disable()
        self.base.requires_grad_(False)
        self.base.zero_grad(set_to_none=True)
        self.base.eval()
        return copied

    def begin(self, lora: LoraConfig | None, training: TrainingConfig, *, once: bool = False) -> PreTrainedModel:
        """From rest: the model a trial trains, in training mode; with `lora` its adapters are drawn from the seed.

        What is trained has requires_grad, all else has not; `once`: no other trial follows, so the start weights are
        not kept. ModelError where this model cannot be trained so.
        """
        if lora is None:
            self._begin_full(keep=not once)
        else:
            self._begin_adapters(lora, training.seed)
        if training.gradient_checkpointing:
            if not self.base.supports_gradient_checkpointing:
                raise ModelError(f"{type(self.base).__name__} has no gradient checkpointing")
            self.base.activation_checkpointing_enable({"use_reentrant": False})
        self.base.train()
        return self.base

    def _begin_full(self, *, keep: bool) -> None:
        if self.config.load_in_4bit:
            raise ModelError("a model in 4 bits can only be trained with `lora`")
        if self._over is not None:
            raise ModelError("several trials share this model's weights, so it can only be trained with `lora`")
        if keep and self._start is None:
            # Taken at the first full fine-tuning: adapters never change the base.
            self._start = StartWeights(self.base, self._files)
        self._touched = True
        self.base.requires_grad_(True)

    def _begin_adapters(self, lora: LoraConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self._adapted, notice = adapt(self.base, lora, self.config.revision)
        if notice not in _said:
            _log.info("%s", notice)
            _said.add(notice)

    def shard(self, training: TrainingConfig, device: torch.device) -> None:
        """After `begin`: keep this process's slice of every weight. Such a model serves one trial and is dropped."""
        try:
            if training.distributed == "zero3":
                self.zero = Zero3(self.base, training)
                self.base.to(device)  # pyright: ignore[reportArgumentType]  what is left: buffers
            else:
                shard(self.base, device)
        except (CannotShard, CannotDivide) as why:
            raise ModelError(f"training.distributed {training.distributed}: {why}") from why

    @property
    def module(self) -> nn.Module:
        """What is called to train: the model, or what divides it."""
        return self.base if self.zero is None else cast(nn.Module, self.zero.engine)

    def end(self) -> None:
        """No trial follows with this model."""
        if self.zero is not None:
            self.zero.end()
            self.zero = None

    @property
    def to_save(self) -> PreTrainedModel | PeftModel:
        """What a finished trial saves: the whole model, or its adapters."""
        return self.base if self._adapted is None else self._adapted

    def whole(self, *, keep: bool) -> dict[str, torch.Tensor] | None:
        """Of a sharded model the tensors that `to_save` saves, put together, in the processes that `keep` them."""
        if not is_sharded(self.base):
            return None
        if self._adapted is not None:
            return gathered({f"base_model.model.{name}": p for name, p in self.trained().items()}, keep=keep)
        saved = self.base.state_dict().keys()  # a tied weight has two names there, and not every buffer has one
        return gathered({n: t for n, t in named_tensors(self.base) if n in saved}, keep=keep)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters being trained, by name."""
        return {name: p for name, p in self.base.named_parameters() if p.requires_grad}


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
