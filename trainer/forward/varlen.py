"""Packed pairs as variable-length sequences of one flash-attention call: the path of CUDA in 16 bits.

The kernel is tried once for each shape, forward and backward in the dtype that it will see, before it is used; where it
fails, packed attention runs on torch's own operations instead, and a warning says so.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from trainer.forward.packed import PackedPlan, PairSpan, strands

_log = logging.getLogger(__name__)

_HEAD_SIZES = range(8, 257, 8)
_PROBE = PackedPlan((PairSpan(0, 3, 4, 2), PairSpan(9, 2, 1, 5)))
_PROBE_TOKENS = 17


@dataclass(frozen=True, slots=True)
class _Sequences:
    """Each pair's two causal sequences. A rejected one's keys are a copy of the prompt's, then its own."""

    keys: Tensor
    """[K] positions in the packed sequence."""
    query_ends: Tensor
    """[S + 1] int32, cumulative."""
    key_ends: Tensor
    longest_query: int
    longest_key: int


def can_flash(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, window: int | None) -> bool:
    """Whether flash attention takes tensors such as these on this device.

    It takes CUDA from Ampere on, 16 bits, head sizes in eights up to 256 and no softcap; and the kernel must run here,
    which is tried once for each combination.
    """
    if not _is_supported(query, value, softcap):
        return False
    heads, head_size = query.shape[1], query.shape[-1]
    return _refusal(query.device, query.dtype, heads, key.shape[1], head_size, window is not None) is None


def _is_supported(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    return (
        query.is_cuda
        and softcap is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in _HEAD_SIZES
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def is_refusal(error: Exception) -> bool:
    """Whether this is what an attention kernel raises that does not run for these tensors here.

    Not so: memory that ran out, and CUDA errors after which the process cannot go on.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        return "no kernel image" in str(error)
    return isinstance(error, (TypeError, ValueError, RuntimeError))


@lru_cache(maxsize=64)
def _refusal(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_size: int, windowed: bool
) -> str | None:
    """Why the kernel does not run for these shapes, forward and backward; None where it does."""
    numbers = torch.arange(_PROBE_TOKENS * head_size, dtype=torch.float32).sin().view(1, 1, -1, head_size)
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            inputs = [
                numbers.expand(1, count, -1, -1).to(device, dtype).contiguous().requires_grad_()
                for count in (heads, kv_heads, kv_heads)
            ]
            found = flash(inputs[0], inputs[1], inputs[2], _PROBE, head_size**-0.5, 3 if windowed else None)
            grads = torch.autograd.grad(found.float().square().sum(), inputs)
        if not all(bool(each.isfinite().all()) for each in (found, *grads)):
            raise RuntimeError("its results are not finite on a probe")
    except (TypeError, ValueError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        _log.warning(
            "flash attention does not run for %d heads over %d of size %d in %s%s (%s); packed attention runs on "
            "torch's own operations instead, which is slower",
            heads,
            kv_heads,
            head_size,
            str(dtype).removeprefix("torch."),
            " with a sliding window" if windowed else "",
            reason,
        )
        return reason
    return None


def flash(query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, scale: float, window: int | None) -> Tensor:
    """query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, T, heads, D]; window: tokens a query sees.

    A query sees the keys up to its own, counted from the end of its sequence: flash attention's bottom-right alignment.
    """
    sequences = _sequences(plan, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    k, v = (tensor.index_select(0, sequences.keys) for tensor in (k, v))
    options: dict[str, Any] = {}
    if (group := q.shape[1] // k.shape[1]) > 1:
        if _knows_grouped_heads(varlen_attn):
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    found = varlen_attn(
        q.contiguous(),
        k,
        v,
        sequences.query_ends,
        sequences.key_ends,
        sequences.longest_query,
        sequences.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    if isinstance(found, tuple):
        raise TypeError("varlen_attn gave more than the attention's output")
    return found[None]


@lru_cache(maxsize=4)
def _knows_grouped_heads(kernel: Callable[..., Any]) -> bool:
    """Whether fewer key heads than query heads are the kernel's own business: from torch 2.12 on."""
    return "enable_gqa" in inspect.signature(kernel).parameters


@lru_cache(maxsize=4)
def _sequences(plan: PackedPlan, device: torch.device) -> _Sequences:
    """Made once per batch, used by all layers."""
    keys: list[Tensor] = []
    queries_of: list[int] = []
    keys_of: list[int] = []
    for strand in strands(plan):
        keys += [
            torch.arange(strand.prompt, strand.prompt + strand.shared),
            torch.arange(strand.begin, strand.end),
        ]
        queries_of.append(strand.end - strand.begin)
        keys_of.append(strand.shared + strand.end - strand.begin)
    ends = [torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (queries_of, keys_of)]
    return _Sequences(torch.cat(keys).to(device), ends[0], ends[1], max(queries_of), max(keys_of))
