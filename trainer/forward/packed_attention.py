"""Exact causal attention over packed pairs: chosen and rejected attend to the shared prompt and to themselves.

No mask of the whole batch is allocated: one autograd node processes blocks of queries, so that backward writes into
full gradients instead of adding zero-filled slices. Registered with transformers under `ATTENTION_NAME`.

On CUDA in 16 bits the packed pairs are the variable-length sequences of one flash-attention call. The kernel is tested
once for each shape and dtype, forward and backward; if it fails, packed attention uses torch's own operations, and a
warning is logged.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from trainer.forward.packing import CausalSegment, PackingPlan, PairSpan, causal_segments
from trainer.objectives.pair_logps import to_device

_log = logging.getLogger(__name__)

_HEAD_SIZES = range(8, 257, 8)
_PROBE = PackingPlan((PairSpan(0, 3, 4, 2), PairSpan(9, 2, 1, 5)))
_PROBE_TOKENS = 17


@dataclass(frozen=True, slots=True)
class _Sequences:
    """The two causal sequences of each pair. A rejected sequence's keys are a copy of the prompt's, then its own."""

    keys: Tensor
    """[K] positions in the packed sequence."""
    query_ends: Tensor
    """[S + 1] int32, cumulative."""
    key_ends: Tensor
    longest_query: int
    longest_key: int


def supports_flash(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, window: int | None) -> bool:
    """Return whether flash attention supports these tensors on this device.

    It requires CUDA from Ampere on, 16 bits, head sizes in multiples of 8 up to 256 and no softcap; and the kernel must
    run, which is tested once for each combination.
    """
    if not _is_supported(query, value, softcap):
        return False
    heads, head_size = query.shape[1], query.shape[-1]
    return _unsupported_reason(query.device, query.dtype, heads, key.shape[1], head_size, window is not None) is None


def _is_supported(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    return (
        query.is_cuda
        and softcap is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in _HEAD_SIZES
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def is_unsupported_error(error: Exception) -> bool:
    """Return whether this error means that an attention kernel does not support these tensors here.

    Out of memory, and CUDA errors after which the process cannot continue, are not such errors.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        return "no kernel image" in str(error)
    return isinstance(error, (TypeError, ValueError, RuntimeError))


@lru_cache(maxsize=64)
def _unsupported_reason(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_size: int, windowed: bool
) -> str | None:
    """Return why the kernel does not run for these shapes, forward and backward; None if it does."""
    numbers = torch.arange(_PROBE_TOKENS * head_size, dtype=torch.float32).sin().view(1, 1, -1, head_size)
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            inputs = [
                numbers.expand(1, count, -1, -1).to(device, dtype).contiguous().requires_grad_()
                for count in (heads, kv_heads, kv_heads)
            ]
            found = flash_attention(inputs[0], inputs[1], inputs[2], _PROBE, head_size**-0.5, 3 if windowed else None)
            grads = torch.autograd.grad(found.float().square().sum(), inputs)
        if not all(bool(each.isfinite().all()) for each in (found, *grads)):
            raise RuntimeError("its results are not finite on a probe")
    except (TypeError, ValueError, RuntimeError) as error:
        if not is_unsupported_error(error):
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


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: PackingPlan, scale: float, window: int | None
) -> Tensor:
    """Compute attention of packed pairs by torch's variable-length flash attention.

    Args:
        query: [1, heads, T, D].
        key: [1, kv heads, T, D].
        value: [1, kv heads, T, D].
        plan: The pairs of the packed sequence.
        scale: Factor of the scores.
        window: Number of tokens that a query sees, itself included; None for all.

    Returns:
        [1, T, heads, D]. A query sees the keys up to its own position, counted from the end of its sequence
        (bottom-right alignment).
    """
    sequences = _sequences(plan, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    k, v = (tensor.index_select(0, sequences.keys) for tensor in (k, v))
    options: dict[str, Any] = {}
    if (group := q.shape[1] // k.shape[1]) > 1:
        if _supports_grouped_heads(varlen_attn):
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
        raise TypeError("varlen_attn returned more than the attention output")
    return found[None]


@lru_cache(maxsize=4)
def _supports_grouped_heads(kernel: Callable[..., Any]) -> bool:
    """Return whether the kernel accepts fewer key heads than query heads: torch 2.12 and later."""
    return "enable_gqa" in inspect.signature(kernel).parameters


@lru_cache(maxsize=4)
def _sequences(plan: PackingPlan, device: torch.device) -> _Sequences:
    """Return the sequences of a plan; computed once per batch and used by all layers."""
    keys: list[Tensor] = []
    queries_of: list[int] = []
    keys_of: list[int] = []
    for segment in causal_segments(plan):
        keys += [
            torch.arange(segment.prompt, segment.prompt + segment.shared),
            torch.arange(segment.begin, segment.end),
        ]
        queries_of.append(segment.end - segment.begin)
        keys_of.append(segment.shared + segment.end - segment.begin)
    ends = [
        to_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device) for lengths in (queries_of, keys_of)
    ]
    return _Sequences(to_device(torch.cat(keys), device), ends[0], ends[1], max(queries_of), max(keys_of))


ATTENTION_NAME = "prefsweep_packed"
BLOCK_SIZE = 96
"""Queries per block: fastest on CPU, by a small margin, of 32 to 256."""
MAX_SAVED_BYTES = 64 * 2**20
"""Bytes. Probabilities of a layer up to this size are stored for backward; larger ones are recomputed."""


class CannotAttend(ValueError):
    """The model's attention needs a feature that packed attention does not have."""


def register() -> None:
    """Register `ATTENTION_NAME` with transformers, without a mask function, so that models build no mask for it.

    Compiled layers call it as it is: its plan is another in every batch, and each would be compiled anew.
    """
    compiles = "torch._dynamo" in sys.modules
    AttentionInterface.register(ATTENTION_NAME, _outside_of_graphs() if compiles else packed_attention)


@cache
def _outside_of_graphs() -> Any:
    return torch.compiler.disable(packed_attention)


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
    pair_plan: PackingPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention as `pair_plan` says; an attention function for transformers' `AttentionInterface`.

    Args:
        module: Unused.
        query: [1, heads, T, D].
        key: [1, kv heads, T, D].
        value: [1, kv heads, T, D].
        attention_mask: Must be None.
        scaling: Factor of the scores, by default D ** -0.5.
        dropout: Must be 0.
        sliding_window: Number of tokens that a query sees, itself included.
        softcap: Scores become softcap * tanh(scores / softcap).
        pair_plan: The pairs of the packed sequence.
        others: Further arguments of the model.

    Returns:
        [1, T, heads, D], and None for the attention weights.

    Raises:
        CannotAttend: The result would not be exact.
    """
    if pair_plan is None:
        raise CannotAttend("the model does not pass its keyword arguments to its attention")
    if attention_mask is not None:
        raise CannotAttend("the model uses its own attention mask")
    if dropout:
        raise CannotAttend("attention dropout is not supported: set the model's attention_dropout to 0")
    refused = [name for name in ("s_aux", "position_bias", "head_mask", "cache") if others.get(name) is not None]
    if refused or others.get("is_causal") is False:
        raise CannotAttend(f"the model's attention uses {', '.join(refused) or 'bidirectional attention'}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if supports_flash(query, key, value, softcap, sliding_window):
        return flash_attention(query, key, value, pair_plan, scale, sliding_window), None
    rule = _ScoreParams(scale, softcap, sliding_window)
    return _PackedAttention.apply(query, key, value, pair_plan, rule), None  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class _ScoreParams:
    scale: float
    softcap: float | None
    window: int | None


def _segment_keys(tensor: Tensor, segment: CausalSegment) -> Tensor:
    """Return the keys [kv heads, keys, D] of a segment: the shared prompt, then its own tokens."""
    own = tensor[:, segment.begin : segment.end]
    if not segment.shared:
        return own
    return torch.cat([tensor[:, segment.prompt : segment.prompt + segment.shared], own], dim=1)


@lru_cache(maxsize=BLOCK_SIZE)
def _causal_mask(queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[queries, queries] -inf where key j comes after query i, else 0. Adding it is faster than masked_fill."""
    return torch.full((queries, queries), -torch.inf, dtype=dtype, device=device).triu_(1)


def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys] True where key j is `window` or more tokens before query i; the queries' own keys are last."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries - window)


def _probabilities(query: Tensor, key: Tensor, group: int, rule: _ScoreParams) -> tuple[Tensor, Tensor | None]:
    """Return the softmax of a block's scores, [kv, group * b, n], and d(capped score)/d(score) if there is a softcap.

    query [kv, group * b, D], already scaled; key [kv, n, D], of which the last b are the queries' own.
    """
    scores = torch.bmm(query, key.transpose(1, 2))
    slope = None
    if rule.softcap is not None:
        squashed = scores.div_(rule.softcap).tanh_()
        slope = 1 - squashed * squashed
        scores = squashed.mul_(rule.softcap)
    b, n = query.shape[1] // group, key.shape[1]
    by_query = scores.view(-1, b, n)
    by_query[:, :, n - b :].add_(_causal_mask(b, scores.dtype, scores.device))
    if rule.window is not None and n > rule.window:
        by_query.masked_fill_(_window_mask(b, n, rule.window, query.device), -torch.inf)
    if scores.dtype in (torch.float32, torch.float64):
        return torch.softmax(scores, dim=-1), slope
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype), slope


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, plan: PackingPlan, rule: _ScoreParams
    ) -> Tensor:
        """Return the attention's output and save what the backward pass needs."""
        with torch.autocast(query.device.type, enabled=False):
            out, saved_blocks = _forward(query, key, value, plan, rule, any(ctx.needs_input_grad))  # pyright: ignore
        ctx.save_for_backward(query, key, value, *saved_blocks)
        ctx.plan, ctx.rule = plan, rule  # pyright: ignore[reportAttributeAccessIssue]
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of query, key and value."""
        (grad,) = grad_outputs
        query, key, value, *saved_blocks = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            return (*_backward(query, key, value, grad, saved_blocks, ctx.plan, ctx.rule), None, None)


def _blocks(segment: CausalSegment) -> list[tuple[slice, int]]:
    """Return the segment's blocks of queries, and how many keys of the segment each sees."""
    ends = (*range(segment.begin + BLOCK_SIZE, segment.end, BLOCK_SIZE), segment.end)
    starts = range(segment.begin, segment.end, BLOCK_SIZE)
    return [(slice(low, high), segment.shared + high - segment.begin) for low, high in zip(starts, ends, strict=True)]


def _fold_groups(block: Tensor) -> Tensor:
    """[kv, group, b, D] -> [kv, group * b, D]: queries that share keys are multiplied together."""
    return block[:, 0] if block.shape[1] == 1 else block.flatten(1, 2)


def _split_groups(tensor: Tensor, kv: int) -> Tensor:
    """[heads, T, D] -> [kv, group, T, D]."""
    return tensor.unflatten(0, (kv, -1))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, plan: PackingPlan, rule: _ScoreParams, differentiate: bool
) -> tuple[Tensor, list[Tensor]]:
    _, heads, length, _ = query.shape
    kv, group = key.shape[1], query.shape[1] // key.shape[1]
    out = query.new_empty(1, length, heads, value.shape[-1])
    target, q = _split_groups(out[0].transpose(0, 1), kv), _split_groups(query[0] * rule.scale, kv)
    scores = (
        sum((s.end - s.begin) * (s.shared + (s.end - s.begin + BLOCK_SIZE) // 2) for s in causal_segments(plan)) * heads
    )
    keep = differentiate and rule.softcap is None and scores * query.element_size() <= MAX_SAVED_BYTES
    saved_blocks: list[Tensor] = []
    for segment in causal_segments(plan):
        k, v = _segment_keys(key[0], segment), _segment_keys(value[0], segment)
        # Last block first, the order of backward.
        for block, visible in reversed(_blocks(segment)):
            probabilities, _ = _probabilities(_fold_groups(q[:, :, block]), k[:, :visible], group, rule)
            target[:, :, block] = torch.bmm(probabilities, v[:, :visible]).unflatten(1, (group, -1))
            if keep:
                saved_blocks.append(probabilities)
    return out, saved_blocks


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    saved_blocks: list[Tensor],
    plan: PackingPlan,
    rule: _ScoreParams,
) -> tuple[Tensor, Tensor, Tensor]:
    kv, group = key.shape[1], query.shape[1] // key.shape[1]
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    q, dq, g = (_split_groups(t, kv) for t in (query[0] * rule.scale, d_query[0], grad[0].transpose(0, 1)))
    saved = iter(saved_blocks)
    for segment in causal_segments(plan):
        k, v = _segment_keys(key[0], segment), _segment_keys(value[0], segment)
        sums: tuple[Tensor, Tensor] | None = None
        # The last block sees every key of the segment: the other blocks add to its gradients.
        for block, visible in reversed(_blocks(segment)):
            q_rows, g_rows = _fold_groups(q[:, :, block]), _fold_groups(g[:, :, block])
            p, slope = (next(saved), None) if saved_blocks else _probabilities(q_rows, k[:, :visible], group, rule)
            dp = torch.bmm(g_rows, v[:, :visible].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            if slope is not None:
                ds.mul_(slope)
            dq[:, :, block] = torch.bmm(ds, k[:, :visible]).unflatten(1, (group, -1))
            dk, dv = torch.bmm(ds.transpose(1, 2), q_rows), torch.bmm(p.transpose(1, 2), g_rows)
            if sums is None:
                sums = dk, dv
            else:
                sums[0][:, :visible] += dk
                sums[1][:, :visible] += dv
        # Prompt and chosen come first and are assigned; the rejected segment then adds to the prompt's gradient.
        for full, part in zip((d_key[0], d_value[0]), sums or (), strict=True):
            full[:, segment.begin : segment.end] = part[:, segment.shared :]
            if segment.shared:
                full[:, segment.prompt : segment.prompt + segment.shared] += part[:, : segment.shared]
    return d_query.mul_(rule.scale), d_key, d_value
