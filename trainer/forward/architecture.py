"""Properties of a model architecture: its output layer, its hidden states, and whether pairs can share a prompt.

Each is checked on the model, never assumed. Hidden states come from an unmodified transformers model, wrapped or not,
whole or sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from trainer.distributed.fsdp import is_sharded, reshard
from trainer.forward.chunked_logps import ChunkSize, Head, sequence_logps
from trainer.forward.packed_attention import ATTENTION_NAME, CannotAttend, is_refusal, register
from trainer.forward.packing import Batch, TokenArray, pack_pairs, pad_pairs
from trainer.forward.rotary_embeddings import RotarySwitch
from trainer.randomness import hold_at_rest


def core_model(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM inside DistributedDataParallel and adapters. Anything else: TypeError."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"{type(inner).__name__} is not a transformers model")
    if inner.config.is_encoder_decoder:
        raise TypeError(f"{type(inner).__name__} is an encoder-decoder model; only causal language models are trained")
    return inner


def backbone_of(core: PreTrainedModel) -> PreTrainedModel | None:
    """The model without its output layer; a few types (Llama 4) have it under another name than their prefix says."""
    found = (core.base_model, getattr(core, "model", None))
    return next((body for body in found if isinstance(body, PreTrainedModel) and body is not core), None)


@contextmanager
def use_attention(core: PreTrainedModel, batch: Batch, rotary: RotarySwitch | None = None) -> Generator[None]:
    """While this lasts the model attends as the layout wants; backward belongs in it, since it may compute again.

    rotary: the model's, where its frequencies depend on lengths; the batch was then laid out with its `key`.
    """
    if rotary is not None:
        assert batch.rotary is not None, "laid out without the model's key"
        with rotary.by_sequence(batch.rotary), use_attention(core, batch):
            yield
        return
    if batch.plan is None:
        yield
        return
    register()
    before = core.config._attn_implementation or "eager"  # pyright: ignore[reportPrivateUsage]
    core.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        core.set_attn_implementation(before)


def hidden_states(model: nn.Module, core: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states of every position, flattened: [positions, hidden size]. Call it within `use_attention`."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.plan is None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        inputs["pair_plan"] = batch.plan
    body = backbone_of(core)
    assert body is not None, "find_head has refused it"
    if isinstance(model, DistributedDataParallel):
        # Its own forward must run, since it arms the gradient reduction; what it wraps gives the body's result.
        with _patched_forward(model.module, body.forward):
            states = model(**inputs).last_hidden_state
    elif is_sharded(core):
        # Its own forward must run here too: FSDP2 then gathers the weights outside of the layers, the output layer's
        # among them.
        with _patched_forward(core, body.forward):
            states = model(**inputs).last_hidden_state
    else:
        states = body(**inputs).last_hidden_state
    return states.flatten(0, 1)


@contextmanager
def _patched_forward(module: nn.Module, replacement: Callable[..., Any]) -> Generator[None]:
    """`module(...)` gives what `replacement(...)` gives, until this ends."""
    before = vars(module).get("forward")
    module.forward = replacement
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


VERIFIED_ARCHITECTURES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"}
)
"""Model types whose packed and separate results are compared by the tests; others are compared when they are loaded."""
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})


class UnsupportedHead(ValueError):
    """The model's output layer is not one whose log-probs can be computed in chunks."""


def find_head(core: PreTrainedModel) -> Head:
    """The output layer, as parameters. UnsupportedHead where it is adapted, quantized or does something unknown."""
    if backbone_of(core) is None:
        raise UnsupportedHead(f"{type(core).__name__} has no body apart from its output layer")
    layer = core.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise UnsupportedHead(
            f"the output layer is a {type(layer).__name__}, not a plain linear layer: leave it out of the adapters "
            "and of quantisation"
        )
    config = core.config.get_text_config()
    scale = getattr(core, "logit_scale", None) or getattr(config, "logit_scale", None) or 1.0
    divided = getattr(config, "logits_scaling", None) or 1.0
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), float(scale) / divided)


def check_head(core: PreTrainedModel, head: Head) -> None:
    """Compare the head's log-probs with the model's own on a few tokens, for types that the tests do not cover."""
    if core.config.get_text_config().model_type in VERIFIED_ARCHITECTURES:
        return
    batch = pad_pairs(_probe_pairs(core)).to(head.weight.device)
    with torch.no_grad(), _at_rest(core):
        hidden = hidden_states(core, core, batch)
        ours = sequence_logps(hidden, batch, find_head(core), ChunkSize(64, 64))
        logits = core(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        every = logits.flatten(0, 1)[batch.rows].float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    reshard(core)
    found, expected = ours.chosen.sum() + ours.rejected.sum(), every.double().sum()
    if not torch.allclose(found, expected, rtol=_tolerance(core)):
        raise UnsupportedHead(
            f"{type(core).__name__} does more than a linear output layer: log-probs {found:.4f} instead of "
            f"{expected:.4f} on a probe"
        )


def hold_repeatable(core: PreTrainedModel) -> list[str]:
    """Types of the modules that are held at rest, as they draw at random in training mode; StillRandom where that does
    not help. Not for types that the tests cover, which have nothing random but what is switched off after loading.
    """
    if core.config.get_text_config().model_type in VERIFIED_ARCHITECTURES:
        return []
    batch = pad_pairs(_probe_pairs(core)).to(core.device)
    try:
        return hold_at_rest(core, lambda: hidden_states(core, core, batch)[batch.rows], 10 * _tolerance(core))
    finally:
        reshard(core)


def packing_unsupported_reason(core: PreTrainedModel, autocast: torch.dtype | None = None) -> str | None:
    """Why this model cannot share a prompt between two responses; None where it can.

    autocast: the dtype under which the model will be trained; None: in that of its weights.
    """
    config = core.config.get_text_config()
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "ALiBi positions follow the place in the batch"
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        return f"layers of type {', '.join(sorted(others))}"
    if not core._can_set_attn_implementation():  # pyright: ignore[reportPrivateUsage]
        return f"{type(core).__name__} does not take its attention from transformers' interface"
    if config.model_type in VERIFIED_ARCHITECTURES:
        # What the tests cannot see is CUDA's kernels.
        return None if core.device.type == "cpu" else _compare_layouts(core, autocast)
    if getattr(config, "sliding_window", None) is not None:
        return f"a sliding window, which is not verified for models of type {config.model_type}"
    return _compare_layouts(core, autocast)


@dataclass(frozen=True, slots=True)
class _ProbePair:
    prompt: TokenArray
    chosen: TokenArray
    rejected: TokenArray


def _probe_pairs(core: PreTrainedModel) -> list[_ProbePair]:
    """Two small pairs of spread-out token ids."""
    vocabulary = core.config.get_text_config().vocab_size
    ids = (np.arange(1, 40) * 7919) % vocabulary
    cut = np.split(ids, [9, 15, 19, 24, 27])
    return [_ProbePair(*cut[:3]), _ProbePair(*cut[3:])]


def _tolerance(core: PreTrainedModel) -> float:
    return 1e-4 if core.dtype in (torch.float32, torch.float64) and core.device.type == "cpu" else 0.1


def _compare_layouts(core: PreTrainedModel, autocast: torch.dtype | None) -> str | None:
    """Compute a probe both ways."""
    device = core.device
    try:
        with torch.no_grad(), _at_rest(core), _training_autocast(core, autocast):
            found = [
                _scored_hidden_states(core, layout(_probe_pairs(core)).to(device)) for layout in (pack_pairs, pad_pairs)
            ]
    except (CannotAttend, TypeError, ValueError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        return str(error) if isinstance(error, CannotAttend) else f"{type(error).__name__}: {error}"
    finally:
        reshard(core)
    off = float((found[0] - found[1]).norm() / found[1].norm())
    return None if off <= _tolerance(core) else f"packed and separate results differ by {off:.1e} on a probe"


@contextmanager
def _at_rest(core: PreTrainedModel) -> Generator[None]:
    before = core.training
    core.eval()
    try:
        yield
    finally:
        core.train(before)


def _training_autocast(core: PreTrainedModel, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """On CUDA other kernels run in 16 bits. On a CPU they are the same, and comparing in float32 sees more."""
    mixed = autocast is not None and core.device.type == "cuda"
    return torch.autocast("cuda", dtype=autocast) if mixed else nullcontext()


def _scored_hidden_states(core: PreTrainedModel, batch: Batch) -> Tensor:
    with use_attention(core, batch):
        return hidden_states(core, core, batch)[batch.rows].double()
