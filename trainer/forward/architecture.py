"""Properties of a model architecture: its output layer, its hidden states, and whether pairs can share a prompt.

Each property is verified on the model. Hidden states come from an unmodified transformers model, which may be wrapped
or sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from trainer.distributed.fsdp import is_sharded, reshard
from trainer.environment import has_adapters
from trainer.forward.chunked_logps import ChunkSize, Head, sequence_logps
from trainer.forward.packed_attention import ATTENTION_NAME, CannotAttend, is_unsupported_error, register
from trainer.forward.packing import Batch, TokenArray, pack_pairs, pad_pairs
from trainer.forward.rotary_embeddings import RotarySwitch
from trainer.randomness import disable_random_modules


def core_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers causal LM inside DistributedDataParallel and adapters. Raises TypeError without one."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if has_adapters(inner):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"{type(inner).__name__} is not a transformers model")
    if inner.config.is_encoder_decoder:
        raise TypeError(f"{type(inner).__name__} is an encoder-decoder model; only causal language models are trained")
    return inner


def backbone_of(core: PreTrainedModel) -> PreTrainedModel | None:
    """Return the model without its output layer; a few types (Llama 4) have it under another name than their prefix."""
    found = (core.base_model, getattr(core, "model", None))
    return next((body for body in found if isinstance(body, PreTrainedModel) and body is not core), None)


@contextmanager
def use_attention(core: PreTrainedModel, batch: Batch, rotary: RotarySwitch | None = None) -> Generator[None]:
    """Set the attention implementation that the batch's layout needs, for forward and backward (recomputation).

    `rotary`: the model's, if its frequencies depend on lengths; the batch must have been made with its `key`.
    """
    if rotary is not None:
        assert batch.rotary is not None, "the batch was made without the model's rotary key"
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
    """Return the last hidden states, flattened: [positions, hidden size]. Call it within `use_attention`."""
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
        # DDP's own forward must run, since it prepares the gradient reduction; the wrapped module returns the body's
        # output.
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
    """Make `module(...)` return `replacement(...)` inside the context."""
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
"""Model types whose packed and separate results the tests compare; other types are compared when they are loaded."""
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})


class UnsupportedHead(ValueError):
    """The output layer is not a linear layer whose log-probs can be computed in chunks."""


def find_head(core: PreTrainedModel) -> Head:
    """Return the output layer's parameters. Raises UnsupportedHead if it is adapted, quantized or unknown."""
    if backbone_of(core) is None:
        raise UnsupportedHead(f"{type(core).__name__} has no separate body and output layer")
    layer = core.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise UnsupportedHead(
            f"the output layer is a {type(layer).__name__}, not a plain linear layer: leave it out of the adapters "
            "and of quantization"
        )
    config = core.config.get_text_config()
    scale = getattr(core, "logit_scale", None) or getattr(config, "logit_scale", None) or 1.0
    divided = getattr(config, "logits_scaling", None) or 1.0
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), float(scale) / divided)


def check_head(core: PreTrainedModel, head: Head) -> None:
    """Compare the head's log-probs with the model's own on a few tokens, for model types that the tests do not cover.

    Raises UnsupportedHead if they differ.
    """
    if core.config.get_text_config().model_type in VERIFIED_ARCHITECTURES:
        return
    batch = pad_pairs(_probe_pairs(core)).to(head.weight.device)
    with torch.no_grad(), _eval_mode(core):
        hidden = hidden_states(core, core, batch)
        logps = sequence_logps(hidden, batch, find_head(core), ChunkSize(64, 64))
        logits = core(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        token_logps = logits.flatten(0, 1)[batch.rows].float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    reshard(core)
    found, expected = logps.chosen.sum() + logps.rejected.sum(), token_logps.to(logps.chosen.dtype).sum()
    if not torch.allclose(found, expected, rtol=_tolerance(core)):
        raise UnsupportedHead(
            f"{type(core).__name__} does more than a linear output layer: log-probs {found:.4f} instead of "
            f"{expected:.4f} on a probe"
        )


def disable_randomness(core: PreTrainedModel) -> list[str]:
    """Put modules that are random in training mode into evaluation mode, and return their types.

    Model types covered by the tests have no randomness other than dropout, which is off after loading. Raises
    StillRandom if the model stays random.
    """
    if core.config.get_text_config().model_type in VERIFIED_ARCHITECTURES:
        return []
    batch = pad_pairs(_probe_pairs(core)).to(core.device)
    try:
        return disable_random_modules(core, lambda: hidden_states(core, core, batch)[batch.rows], 10 * _tolerance(core))
    finally:
        reshard(core)


def packing_unsupported_reason(core: PreTrainedModel, autocast: torch.dtype | None = None) -> str | None:
    """Return why this model cannot share a prompt between two responses; None if it can.

    `autocast`: the autocast dtype of training; None for the dtype of the weights.
    """
    config = core.config.get_text_config()
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "ALiBi positions depend on the position in the batch"
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        return f"layers of type {', '.join(sorted(others))}"
    if not core._can_set_attn_implementation():  # pyright: ignore[reportPrivateUsage]
        return f"{type(core).__name__} does not use transformers' attention interface"
    if config.model_type in VERIFIED_ARCHITECTURES:
        # The tests cover the architecture, but not CUDA's kernels.
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
    """Return two small pairs of spread-out token ids."""
    vocabulary = core.config.get_text_config().vocab_size
    ids = (np.arange(1, 40) * 7919) % vocabulary
    parts = np.split(ids, [9, 15, 19, 24, 27])
    return [_ProbePair(*parts[:3]), _ProbePair(*parts[3:])]


def _tolerance(core: PreTrainedModel) -> float:
    return 1e-4 if core.dtype in (torch.float32, torch.float64) and core.device.type == "cpu" else 0.1


def _compare_layouts(core: PreTrainedModel, autocast: torch.dtype | None) -> str | None:
    """Compare the packed with the padded layout on a probe. Return why packing cannot be used; None if it can."""
    device = core.device
    try:
        with torch.no_grad(), _eval_mode(core), _training_autocast(core, autocast):
            found = [
                _scored_hidden_states(core, layout(_probe_pairs(core)).to(device)) for layout in (pack_pairs, pad_pairs)
            ]
    except (CannotAttend, TypeError, ValueError, RuntimeError) as error:
        if not is_unsupported_error(error):
            raise
        return str(error) if isinstance(error, CannotAttend) else f"{type(error).__name__}: {error}"
    finally:
        reshard(core)
    off = float((found[0] - found[1]).norm() / found[1].norm())
    return None if off <= _tolerance(core) else f"packed and separate results differ by {off:.1e} on a probe"


@contextmanager
def _eval_mode(core: PreTrainedModel) -> Generator[None]:
    before = core.training
    core.eval()
    try:
        yield
    finally:
        core.train(before)


def _training_autocast(core: PreTrainedModel, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast on CUDA, where 16-bit kernels differ. On a CPU they do not, and float32 is compared more precisely."""
    mixed = autocast is not None and core.device.type == "cuda"
    return torch.autocast("cuda", dtype=autocast) if mixed else nullcontext()


def _scored_hidden_states(core: PreTrainedModel, batch: Batch) -> Tensor:
    with use_attention(core, batch):
        return hidden_states(core, core, batch)[batch.rows].cpu().double()
