"""Causal attention over packed pairs: chosen and rejected each see the prompt, which is there once, and themselves.

Exact, without a mask of the whole batch: one autograd node works through blocks of queries, so that backward writes
into whole gradients instead of adding up zero-filled slices. Registered with transformers under `NAME`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface

NAME = "prefsweep_packed"
BLOCK = 128
"""Queries per block: measured best of 64, 128 and 256 on CPU."""
KEEP_BYTES = 64 * 2**20
"""Probabilities of a layer up to this size are kept for backward; larger ones are computed again there."""


class CannotAttend(ValueError):
    """The model asks of its attention something that the packed form does not do."""


@dataclass(frozen=True, slots=True)
class PairSpan:
    """Where a pair lies in the packed sequence: prompt, chosen and rejected tokens from `start` on."""

    start: int
    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """The pairs of one packed sequence."""

    spans: tuple[PairSpan, ...]


def register() -> None:
    """Make `NAME` known to transformers. It gets no mask function, so that models build no mask for it."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pair_plan: PackedPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention by `pair_plan`; query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, T, heads, D].

    scaling: factor of the scores, by default D ** -0.5; sliding_window: tokens a query sees, itself included;
    softcap: scores become softcap * tanh(scores / softcap). CannotAttend where it would not be exact.
    """
    if pair_plan is None:
        raise CannotAttend("the model does not hand its keyword arguments on to its attention")
    if attention_mask is not None:
        raise CannotAttend("the model brings its own attention mask")
    if dropout:
        raise CannotAttend("attention dropout is not supported: set the model's attention_dropout to 0")
    refused = [name for name in ("s_aux", "position_bias", "head_mask", "cache") if others.get(name) is not None]
    if refused or others.get("is_causal") is False:
        raise CannotAttend(f"the model's attention uses {', '.join(refused) or 'bidirectional attention'}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rule = _Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window)
    return _PackedAttention.apply(query, key, value, pair_plan, rule), None  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class _Rule:
    scale: float
    softcap: float | None
    window: int | None


@dataclass(frozen=True, slots=True)
class _Strand:
    """One causal sequence of a pair: its queries lie at [begin, end), `shared` keys lie before them at `prompt`."""

    begin: int
    end: int
    prompt: int
    shared: int


def _strands(plan: PackedPlan) -> Iterator[_Strand]:
    for span in plan.spans:
        middle = span.start + span.prompt + span.chosen
        yield _Strand(span.start, middle, span.start, 0)
        if span.rejected:
            yield _Strand(middle, middle + span.rejected, span.start, span.prompt)


def _keys(tensor: Tensor, strand: _Strand) -> Tensor:
    """[kv heads, keys, D] of a strand: the shared prompt, then its own tokens."""
    own = tensor[:, strand.begin : strand.end]
    if not strand.shared:
        return own
    return torch.cat([tensor[:, strand.prompt : strand.prompt + strand.shared], own], dim=1)


@lru_cache(maxsize=BLOCK)
def _later(queries: int, device: torch.device) -> Tensor:
    """[queries, queries] True where key j comes after query i."""
    return torch.ones(queries, queries, dtype=torch.bool, device=device).triu(1)


def _outside(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys] True where key j is `window` or more tokens before query i; the queries' own keys are last."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries - window)


def _probabilities(query: Tensor, key: Tensor, rule: _Rule) -> tuple[Tensor, Tensor | None]:
    """[kv, group, b, n] softmax of a block's scores, and d(capped score)/d(score) where there is a softcap.

    query [kv, group, b, D]; key [kv, n, D], of which the last b are the queries' own.
    """
    kv, group, b, _ = query.shape
    n = key.shape[1]
    scores = torch.baddbmm(
        query.new_empty(1, 1, 1), query.reshape(kv, group * b, -1), key.transpose(1, 2), beta=0, alpha=rule.scale
    ).view(kv, group, b, n)
    slope = None
    if rule.softcap is not None:
        squashed = torch.tanh(scores / rule.softcap)
        scores, slope = squashed * rule.softcap, 1 - squashed * squashed
    scores[..., n - b :].masked_fill_(_later(b, query.device), -torch.inf)
    if rule.window is not None and n > rule.window:
        scores.masked_fill_(_outside(b, n, rule.window, query.device), -torch.inf)
    if query.dtype in (torch.float32, torch.float64):
        return torch.softmax(scores, dim=-1), slope
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), slope


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, rule: _Rule) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            out, kept = _forward(query, key, value, plan, rule, any(ctx.needs_input_grad))  # pyright: ignore
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.plan, ctx.rule = plan, rule  # pyright: ignore[reportAttributeAccessIssue]
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad,) = grad_outputs
        query, key, value, out, *kept = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            return (*_backward(query, key, value, out, grad, kept, ctx.plan, ctx.rule), None, None)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """[1, heads, T, D] as [kv heads, group, T, D]."""
    return tensor[0].unflatten(0, (groups, -1))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, rule: _Rule, differentiate: bool
) -> tuple[Tensor, list[Tensor]]:
    _, heads, length, _ = query.shape
    kv = key.shape[1]
    out = query.new_empty(1, length, heads, value.shape[-1])
    target, q = _grouped(out.transpose(1, 2), kv), _grouped(query, kv)
    scores = sum((s.end - s.begin) * (s.shared + (s.end - s.begin + BLOCK) // 2) for s in _strands(plan)) * heads
    keep = differentiate and rule.softcap is None and scores * query.element_size() <= KEEP_BYTES
    kept: list[Tensor] = []
    for strand in _strands(plan):
        k, v = _keys(key[0], strand), _keys(value[0], strand)
        for low in range(0, strand.end - strand.begin, BLOCK):
            high = min(low + BLOCK, strand.end - strand.begin)
            block = slice(strand.begin + low, strand.begin + high)
            seen = strand.shared + high
            probabilities, _ = _probabilities(q[:, :, block], k[:, :seen], rule)
            found = torch.bmm(probabilities.view(kv, -1, seen), v[:, :seen])
            target[:, :, block] = found.view(kv, -1, high - low, found.shape[-1])
            if keep:
                kept.append(probabilities)
    return out, kept


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad: Tensor,
    kept: list[Tensor],
    plan: PackedPlan,
    rule: _Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    kv = key.shape[1]
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    q, dq = _grouped(query, kv), _grouped(d_query, kv)
    g, o = _grouped(grad.transpose(1, 2), kv), _grouped(out.transpose(1, 2), kv)
    number = 0
    for strand in _strands(plan):
        k, v = _keys(key[0], strand), _keys(value[0], strand)
        # A strand that shares a prompt gathers its keys' gradients apart, others write where they belong.
        own = slice(strand.begin, strand.end)
        dk, dv = (torch.zeros_like(k), torch.zeros_like(v)) if strand.shared else (d_key[0, :, own], d_value[0, :, own])
        for low in range(0, strand.end - strand.begin, BLOCK):
            high = min(low + BLOCK, strand.end - strand.begin)
            block = slice(strand.begin + low, strand.begin + high)
            seen, rows = strand.shared + high, q.shape[1] * (high - low)
            q_block, g_block = q[:, :, block], g[:, :, block].reshape(kv, rows, -1)
            if kept:
                probabilities, slope = kept[number], None
            else:
                probabilities, slope = _probabilities(q_block, k[:, :seen], rule)
            number += 1
            p = probabilities.view(kv, rows, seen)
            delta = (g_block * o[:, :, block].reshape(kv, rows, -1)).sum(-1, keepdim=True)
            dv[:, :seen].baddbmm_(p.transpose(1, 2), g_block)
            ds = torch.bmm(g_block, v[:, :seen].transpose(1, 2)).sub_(delta).mul_(p)
            if slope is not None:
                ds.mul_(slope.view(kv, rows, seen))
            q_rows = q_block.reshape(kv, rows, -1)
            dk[:, :seen].baddbmm_(ds.transpose(1, 2), q_rows, alpha=rule.scale)
            found = torch.baddbmm(q.new_empty(1, 1, 1), ds, k[:, :seen], beta=0, alpha=rule.scale)
            dq[:, :, block] = found.view(kv, -1, high - low, found.shape[-1])
        if strand.shared:
            prompt = slice(strand.prompt, strand.prompt + strand.shared)
            for whole, part in ((d_key[0], dk), (d_value[0], dv)):
                whole[:, prompt] += part[:, : strand.shared]
                whole[:, own] += part[:, strand.shared :]
    return d_query, d_key, d_value
