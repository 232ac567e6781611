"""Hidden states of a batch from an unmodified transformers model, whatever it is wrapped in, whole or in slices."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from trainer.forward.attention import NAME, register
from trainer.forward.layout import Batch
from trainer.forward.rotary import RotarySwitch
from trainer.sharding import is_sharded
from trainer.zero3 import inside


def core_model(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM inside DistributedDataParallel, DeepSpeed and adapters. Anything else: TypeError."""
    inner = model.module if isinstance(model, DistributedDataParallel) else inside(model)
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"{type(inner).__name__} is not a transformers model")
    if inner.config.is_encoder_decoder:
        raise TypeError(f"{type(inner).__name__} is an encoder-decoder model; only causal language models are trained")
    return inner


def body_of(core: PreTrainedModel) -> PreTrainedModel | None:
    """The model without its output layer; a few types (Llama 4) have it under another name than their prefix says."""
    found = (core.base_model, getattr(core, "model", None))
    return next((body for body in found if isinstance(body, PreTrainedModel) and body is not core), None)


@contextmanager
def attending(core: PreTrainedModel, batch: Batch, rotary: RotarySwitch | None = None) -> Generator[None]:
    """While this lasts the model attends as the layout wants; backward belongs in it, since it may compute again.

    rotary: the model's, where its frequencies depend on lengths; the batch was then laid out with its `key`.
    """
    if rotary is not None:
        assert batch.rotary is not None, "laid out without the model's key"
        with rotary.by_sequence(batch.rotary), attending(core, batch):
            yield
        return
    if batch.plan is None:
        yield
        return
    register()
    before = core.config._attn_implementation or "eager"  # pyright: ignore[reportPrivateUsage]
    core.set_attn_implementation(NAME)
    try:
        yield
    finally:
        core.set_attn_implementation(before)


def hidden_states(model: nn.Module, core: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states of every position, flattened: [positions, hidden size]. Call it within `attending`."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.plan is None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        inputs["pair_plan"] = batch.plan
    body = body_of(core)
    assert body is not None, "find_head has refused it"
    if isinstance(model, DistributedDataParallel):
        # Its own forward must run, since it arms the gradient reduction; what it wraps gives the body's result.
        with _answering(model.module, body.forward):
            states = model(**inputs).last_hidden_state
    elif is_sharded(core):
        # Its own forward must run here too. FSDP2 puts the weights together that are of no layer, those of the output
        # layer as well; DeepSpeed counts the passes, and has hooks on the body.
        with _answering(core, body.forward if isinstance(core, FSDPModule) else body.__call__):
            states = model(**inputs).last_hidden_state
    else:
        states = body(**inputs).last_hidden_state
    return states.flatten(0, 1)


@contextmanager
def _answering(module: nn.Module, answer: Callable[..., Any]) -> Generator[None]:
    """`module(...)` gives what `answer(...)` gives, until this ends."""
    before = vars(module).get("forward")
    module.forward = answer
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
