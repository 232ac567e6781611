"""`PolicyModel`: the trained model, loaded once and reset between trials, with or without LoRA.

`SharedBaseModel` creates several policy models, each with its own adapters, over one set of base weights.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trainer.config.model_folder import check_whole_model
from trainer.config.trial import LoraConfig, ModelConfig, TrainingConfig
from trainer.distributed.fsdp import CannotShard, gather_full, is_sharded, shard
from trainer.models.adapters import adapt, not_causal_message, without_peft_warnings
from trainer.models.initial_weights import InitialWeights, named_tensors
from trainer.models.layer_kernels import compile_layers, drop_compiled_layers
from trainer.randomness import switch_off
from trainer.results import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

_log = logging.getLogger(__name__)
_logged: set[str] = set()
"""Sentences about adapters that this process has logged: each is logged once."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    config: ModelConfig,
    path: str,
    device: torch.device | None,
    *,
    trust_remote_code: bool = False,
    as_stored: bool = False,
) -> PreTrainedModel:
    """Load the initial model with dropout off.

    Args:
        config: The model section of a trial.
        path: Folder or hub name, as of `resolve_model_path`.
        device: Target device; None leaves the weights mapped from the files on the CPU, to be sharded.
        trust_remote_code: Whether Python code that comes with the model may run.
        as_stored: Keep the dtype of the files instead of `config.dtype`.

    Raises:
        ModelError: The model cannot be loaded, or only in part. Only safetensors are read.
    """
    check_whole_model(path, config.revision)
    options: dict[str, Any] = {"dtype": "auto" if as_stored else _DTYPES[config.dtype]}
    if config.load_in_4bit:
        options |= {"quantization_config": quantization_config(), "device_map": {"": device}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(not_causal_message(path, error)) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if missing := sorted(info["missing_keys"]) + sorted(str(m) for m in info["mismatched_keys"]):
        raise ModelError(
            f"the model {path} is incomplete: {len(missing)} weights are missing or of another shape, "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    if device is not None and not config.load_in_4bit:
        _copy_to_memory(model)
        model.to(device)  # pyright: ignore[reportArgumentType]
    switch_off(model)
    return model


def _copy_to_memory(model: nn.Module) -> None:
    """Copy weights out of the memory-mapped file into aligned memory, where matrix products are fast and repeatable.

    Contiguous, like the optimizer's moments restored from a checkpoint.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def quantization_config() -> BitsAndBytesConfig:
    """Return the quantization settings for 4-bit weights (NF4). Raises ModelError if bitsandbytes is not installed."""
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


class PolicyModel:
    """A loaded model that serves one trial after the other, each from the same initial weights, bit for bit."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ModelConfig,
        fingerprint: str,
        files: Sequence[Path] = (),
        *,
        shared_base: object = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: The model from `load_model`.
            config: Its configuration.
            fingerprint: As of `model_fingerprint`.
            files: Its safetensors files, which `InitialWeights` maps instead of copying.
            shared_base: The owner of the weights if other policy models share them; then only adapters can be trained.
        """
        self.base, self.config, self.fingerprint, self._files = model, config, fingerprint, tuple(files)
        self._shared_base = shared_base
        self._adapted: PeftModel | None = None
        self._initial_weights: InitialWeights | None = None
        self._is_modified = self._was_restored = False

    @property
    def can_become_initial(self) -> bool:
        """Whether `become_initial` is possible: adapters, or initial weights that were kept."""
        return self._adapted is not None or self._initial_weights is not None

    def become_initial(self) -> None:
        """Turn `base` into the initial model in place, until `reset`: adapters off, or the initial weights copied back.

        Copying overwrites the trained weights. Only where `can_become_initial`.
        """
        if self._adapted is not None:
            with without_peft_warnings():
                cast(Any, self._adapted.base_model).disable_adapter_layers()
        elif self._initial_weights is not None and self._is_modified:
            self._initial_weights.restore(self.base)
            self._is_modified, self._was_restored = False, True

    def reset(self) -> bool:
        """Remove adapters and restore the initial weights. Return whether weights had to be copied since the last."""
        if self._adapted is not None:
            self.base = self._adapted.unload()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            self._adapted = None
        copied = self._was_restored
        if self._is_modified and self._initial_weights is not None:
            self._initial_weights.restore(self.base)
            copied = True
        self._is_modified = self._was_restored = False
        if self.config.compile:
            drop_compiled_layers(self.base)
        self.base.activation_checkpointing_disable()
        self.base.requires_grad_(False)
        self.base.zero_grad(set_to_none=True)
        self.base.eval()
        return copied

    def prepare_for_trial(
        self, lora: LoraConfig | None, training: TrainingConfig, *, single_use: bool = False
    ) -> PreTrainedModel:
        """Return the model to train, in training mode; LoRA adapters are initialized from the seed.

        Only trainable parameters have requires_grad. `single_use`: no other trial follows, so a copy of the initial
        weights is not kept. Raises ModelError if this model cannot be trained this way.
        """
        if lora is None:
            self._prepare_full(keep_copy=not single_use)
        else:
            self._prepare_adapters(lora, training.seed)
        if training.gradient_checkpointing:
            if not self.base.supports_gradient_checkpointing:
                raise ModelError(
                    f"training.gradient_checkpointing: {type(self.base).__name__} does not support it; set it to false"
                )
            self.base.activation_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            compile_layers(self.base)
        self.base.train()
        return self.base

    def _prepare_full(self, *, keep_copy: bool) -> None:
        if self.config.load_in_4bit:
            raise ModelError("a model in 4 bits can only be trained with `lora`")
        if self._shared_base is not None:
            raise ModelError("several trials share this model's weights, so it can only be trained with `lora`")
        if keep_copy and self._initial_weights is None:
            # Created at the first full fine-tuning: adapters never change the base.
            self._initial_weights = InitialWeights(self.base, self._files)
        self._is_modified = True
        self.base.requires_grad_(True)

    def _prepare_adapters(self, lora: LoraConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self._adapted, notice = adapt(self.base, lora, self.config.revision)
        if notice not in _logged:
            _log.info("%s", notice)
            _logged.add(notice)

    def shard(self, device: torch.device) -> None:
        """Shard every weight over the processes, after `prepare_for_trial`.

        A sharded model serves one trial and is then dropped.
        """
        try:
            shard(self.base, device)
        except CannotShard as error:
            raise ModelError(f"training.distributed fsdp2: {error}") from error

    @property
    def model_to_save(self) -> PreTrainedModel | PeftModel:
        """The model that a finished trial saves: the full model, or its adapters."""
        return self.base if self._adapted is None else self._adapted

    def gather(self, *, on_this_process: bool) -> dict[str, torch.Tensor] | None:
        """Return the full tensors of `model_to_save` where `on_this_process`; None if the model is not sharded."""
        if not is_sharded(self.base):
            return None
        if self._adapted is not None:
            return gather_full(
                {f"base_model.model.{name}": p for name, p in self.trainable_parameters().items()},
                on_this_process=on_this_process,
            )
        saved = self.base.state_dict().keys()  # tied weights have two names there, and some buffers none
        return gather_full({n: t for n, t in named_tensors(self.base) if n in saved}, on_this_process=on_this_process)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: p for name, p in self.base.named_parameters() if p.requires_grad}


class SharedBaseModel:
    """A loaded model with frozen weights, over which several trials train adapters."""

    def __init__(self, model: PreTrainedModel, config: ModelConfig, fingerprint: str, files: Sequence[Path]) -> None:
        """Freeze the weights. Arguments are those of `PolicyModel`."""
        self._model, self._config, self._fingerprint, self._files = model, config, fingerprint, tuple(files)
        model.requires_grad_(False)
        model.eval()

    def new_policy(self) -> PolicyModel:
        """Return a policy model that shares these weights; its modules and buffers are its own."""
        tree = copy.deepcopy(self._model, _shared_tensors(self._model))
        return PolicyModel(tree, self._config, self._fingerprint, self._files, shared_base=self)


def _shared_tensors(model: nn.Module) -> dict[int, Any]:
    """Return the objects that a deep copy must share: parameters, and the quantization state of 4-bit ones."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            shared[id(parameter)] = parameter
            if (scales := getattr(parameter, "quant_state", None)) is not None:
                shared[id(scales)] = scales
    return shared
