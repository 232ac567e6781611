"""Packed pairs as variable-length sequences of one flash-attention call: the path of CUDA in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from trainer.forward.packed import PackedPlan, strands

_HEAD_SIZES = range(8, 257, 8)


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


def can_flash(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether flash attention takes these: CUDA from Ampere on, 16 bits, head sizes in eights up to 256, no softcap."""
    return (
        query.is_cuda
        and softcap is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in _HEAD_SIZES
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def flash(query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, scale: float, window: int | None) -> Tensor:
    """query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, T, heads, D]; window: tokens a query sees.

    A query sees the keys up to its own, counted from the end of its sequence: flash attention's bottom-right alignment.
    """
    sequences = _sequences(plan, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    found = varlen_attn(
        q.contiguous(),
        k.index_select(0, sequences.keys),
        v.index_select(0, sequences.keys),
        sequences.query_ends,
        sequences.key_ends,
        sequences.longest_query,
        sequences.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    if isinstance(found, tuple):
        raise TypeError("varlen_attn gave more than the attention's output")
    return found[None]


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
