"""Completion log-probs from hidden states through the output layer, in chunks, without the full logits tensor.

Peak memory beyond inputs and gradients: rows x vocabulary x 4 bytes, where rows is the largest chunk (`ChunkSize`);
1.5 times that in bfloat16, twice with a softcap. A trained output layer adds its gradient, in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer import memory_limits
from trainer.environment import sum_dtype
from trainer.forward.packing import TOKEN_KINDS, Batch
from trainer.objectives.pair_logps import LossTerms, PairLogps

_log = logging.getLogger(__name__)

ObjectiveFn = Callable[[PairLogps, slice], LossTerms]
"""(log-probs of the pairs in a slice of the batch, the slice) -> their loss terms, differentiable in the log-probs."""


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer: logits = cap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor
    """[vocabulary, hidden]."""
    bias: Tensor | None = None
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma 2)."""
    scale: float = 1.0

    def for_product(self, device: torch.device) -> Head:
        """Return the parameters detached and in the dtype of the product: autocast's, if it is on."""
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.weight.dtype
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, weight=self.weight.detach().to(dtype), bias=bias)


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """Number of scored tokens per pass through the output layer."""

    target_rows: int
    """Pairs are grouped up to this many rows: few enough for the cache, many enough for an efficient product."""
    max_rows: int
    """A longer pair is processed alone up to this many rows; beyond that it is split and processed twice."""


def sequence_logps(
    hidden: Tensor, batch: Batch, head: Head, chunk_size: ChunkSize, collision_prob: bool = False
) -> PairLogps:
    """Return the log-probs of a batch's pairs without gradient. `hidden`: [positions, hidden size]."""
    with torch.no_grad():
        product = head.for_product(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            pairs = slice(0, len(batch))
            buffer = _logits_buffer(min(chunk_size.target_rows, len(batch.rows)), product)
            return _pair_logps(batch, pairs, _sums(hidden[batch.rows], batch, product, pairs, buffer, collision_prob))


def next_token_logps(hidden: Tensor, batch: Batch, head: Head, chunk_size: ChunkSize) -> Iterator[Tensor]:
    """Yield the log-probs of the whole vocabulary at the batch's scored positions, without gradient.

    [rows, vocabulary] in at least float32, in order of `batch.rows`, `chunk_size.target_rows` at a time; each lies in a
    buffer that the next one overwrites. `hidden`: [positions, hidden size].
    """
    with torch.no_grad():
        product = head.for_product(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            buffer = _logits_buffer(min(chunk_size.target_rows, len(batch.rows)), product)
            for low in range(0, len(batch.rows), len(buffer)):
                selected = hidden[batch.rows[low : low + len(buffer)]].to(product.weight.dtype)
                logits, _ = _logits(selected, product, buffer, with_grad=False)
                yield logits.sub_(logits.logsumexp(1, keepdim=True))


def objective_loss(
    hidden: Tensor,
    batch: Batch,
    head: Head,
    objective: ObjectiveFn,
    chunk_size: ChunkSize,
    *,
    couples_pairs: bool = False,
    collision_prob: bool = False,
) -> tuple[Tensor, list[LossTerms]]:
    """Return the objective of a batch; its gradient is computed in the same pass over the vocabulary.

    Whole pairs are processed together, loss and gradient in one pass. A pair longer than `chunk_size.max_rows`, or a
    batch whose objective couples its pairs, takes two passes: sums, then gradients.

    Args:
        hidden: [positions, hidden size], with autograd history.
        batch: The batch of `hidden`.
        head: The output layer.
        objective: Gives the loss terms of a slice of pairs.
        chunk_size: Rows per pass.
        couples_pairs: Whether the loss terms of a pair depend on other pairs of the batch.
        collision_prob: Whether to compute the collision probabilities that WPO needs.

    Returns:
        The scalar loss, whose backward passes on the computed gradients, and the loss terms in the order of the pairs.
    """
    chunked_pass = _ChunkedPass(
        batch, head.for_product(hidden.device), objective, chunk_size, couples_pairs, collision_prob
    )
    selected = hidden.index_select(0, batch.rows)
    loss = cast(Tensor, _ChunkedLoss.apply(selected, head.weight, head.bias, chunked_pass))
    return loss, chunked_pass.terms


@dataclass(slots=True)
class _ChunkedPass:
    batch: Batch
    head: Head
    objective: ObjectiveFn
    chunk_size: ChunkSize
    couples_pairs: bool
    collision_prob: bool
    terms: list[LossTerms] = field(default_factory=list[LossTerms])

    def groups(self) -> list[slice]:
        """Return the groups of pairs whose loss is computed together."""
        edges, last = self.batch.pair_rows, len(self.batch)
        if self.couples_pairs:
            return [slice(0, last)]
        groups: list[slice] = []
        first = 0
        for pair in range(1, last + 1):
            if pair == last or edges[pair + 1] - edges[first] > self.chunk_size.target_rows:
                groups.append(slice(first, pair))
                first = pair
        return groups

    def tokens(self, pairs: slice) -> int:
        """Return the number of scored tokens of these pairs."""
        return self.batch.pair_rows[pairs.stop] - self.batch.pair_rows[pairs.start]


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Gradient buffers that the chunks fill; None for tensors without gradient."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, selected: Tensor, weight: Tensor, bias: Tensor | None, chunked_pass: _ChunkedPass) -> Tensor:
        """Return the loss [], float64; the gradients of `selected`, `weight` and `bias` are stored in ctx."""
        grads = _Gradients(
            torch.empty_like(selected) if ctx.needs_input_grad[0] else None,
            _accumulator(weight) if ctx.needs_input_grad[1] else None,
            _accumulator(bias) if bias is not None and ctx.needs_input_grad[2] else None,
        )
        with torch.autocast(selected.device.type, enabled=False):
            total = torch.zeros((), dtype=sum_dtype(selected.device), device=selected.device)
            groups = chunked_pass.groups()
            buffer = _logits_buffer(
                min(chunked_pass.chunk_size.max_rows, max(chunked_pass.tokens(pairs) for pairs in groups)),
                chunked_pass.head,
            )
            for pairs in groups:
                total += _run_group(selected, chunked_pass, pairs, grads, buffer)
            del buffer  # free it before the weight's gradient is copied
        dtypes = (selected.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.grads = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip((grads.hidden, grads.weight, grads.bias), dtypes, strict=True)
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients that `forward` computed, times the loss's gradient. They are freed: one call only."""
        (grad,) = grad_outputs
        grads: list[Tensor | None] = ctx.grads
        ctx.grads = None
        if grad.device.type != "cpu" or grad.item() != 1.0:
            grads = [None if each is None else each.mul_(grad) for each in grads]
        return (*grads, None)


def _accumulator(parameter: Tensor) -> Tensor:
    """Return zeros in at least float32, so that sums over many chunks are not rounded to bfloat16."""
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _run_group(selected: Tensor, chunked_pass: _ChunkedPass, pairs: slice, grads: _Gradients, buffer: Tensor) -> Tensor:
    """Return the loss [] of a group of pairs; write the gradient of its rows, add to the weight's gradient."""
    batch, head = chunked_pass.batch, chunked_pass.head
    begin, end = batch.pair_rows[pairs.start], batch.pair_rows[pairs.stop]
    single_chunk = (
        _chunk_logps(selected[begin:end], batch.targets[begin:end], head, buffer)
        if end - begin <= len(buffer)
        else None
    )
    if single_chunk is None:
        sums = _sums(selected, batch, head, pairs, buffer, chunked_pass.collision_prob)
    else:
        sums = _sums_by_kind([single_chunk], batch, pairs, chunked_pass.collision_prob)
    sums.logps.requires_grad_()
    with torch.enable_grad():
        terms = chunked_pass.objective(_pair_logps(batch, pairs, sums), pairs)
        (grad_logps,) = torch.autograd.grad(terms.loss, sums.logps)
    chunked_pass.terms.append(replace(terms, loss=terms.loss.detach()))
    per_row = grad_logps.flatten()[batch.pair_kinds[begin:end] - pairs.start * len(TOKEN_KINDS)].unsqueeze(1)
    for low in range(begin, end, len(buffer)):
        high = min(low + len(buffer), end)
        targets = batch.targets[low:high]
        chunk = _chunk_logps(selected[low:high], targets, head, buffer) if single_chunk is None else single_chunk
        _backward(chunk, targets, per_row[low - begin : high - begin], head, grads, slice(low, high))
    return terms.loss.detach()


# --- one chunk of rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some rows after the output layer. `exp_logits` lies in the logits buffer, which the next chunk overwrites."""

    hidden: Tensor
    """[r, hidden] in the dtype of the product."""
    exp_logits: Tensor
    """[r, vocabulary] exp(logit - row maximum)."""
    exp_sum: Tensor
    """[r, 1] sum of exp_logits over the vocabulary."""
    logps: Tensor
    """[r] log-prob of the target."""
    softcap_grad: Tensor | None
    """[r, vocabulary] d(capped logit) / d(logit), with a softcap."""


def _logits_buffer(rows: int, head: Head) -> Tensor:
    """Allocate [rows, vocabulary] in at least float32, reused by all chunks because allocating new pages is slow."""
    weight = head.weight
    return weight.new_empty(rows, weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


def _chunk_logps(hidden: Tensor, targets: Tensor, head: Head, buffer: Tensor) -> _Chunk:
    """hidden [r, hidden size], targets [r] -> log-probs and the inputs of their gradient, with one exp per logit."""
    hidden = hidden.to(head.weight.dtype)
    logits, softcap_grad = _logits(hidden, head, buffer)
    top = logits.amax(1, keepdim=True)
    target_logits = logits.gather(1, targets.unsqueeze(1))
    exp_logits = logits.sub_(top).exp_()
    exp_sum = exp_logits.sum(1, keepdim=True)
    return _Chunk(hidden, exp_logits, exp_sum, (target_logits - top - exp_sum.log()).squeeze(1), softcap_grad)


def _logits(hidden: Tensor, head: Head, buffer: Tensor, *, with_grad: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the logits [r, vocabulary] in the buffer and, `with_grad` and a softcap, its derivative."""
    logits = buffer[: len(hidden)]
    _product_into(logits, hidden, head.weight.t())
    if head.bias is not None:
        logits.add_(head.bias)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    softcap_grad = None
    if head.softcap is not None:
        squashed = logits.div_(head.softcap).tanh_()
        softcap_grad = (squashed * squashed).neg_().add_(1) if with_grad else None
        logits = squashed.mul_(head.softcap)
    return logits, softcap_grad


def _backward(chunk: _Chunk, targets: Tensor, per_row: Tensor, head: Head, grads: _Gradients, rows: slice) -> None:
    """Turn d(loss)/d(log-prob) per row, [r, 1], into gradients; overwrites the chunk.

    d(loss)/d(logits) = factor * d_logits with d_logits = exp_logits - exp_sum at the target. The factor of each row is
    applied to the small operands of the products instead of the large one.
    """
    factor = -per_row.to(chunk.exp_logits.dtype) * head.scale / chunk.exp_sum
    d_logits = chunk.exp_logits.scatter_add_(1, targets.unsqueeze(1), -chunk.exp_sum)
    if chunk.softcap_grad is not None:
        d_logits.mul_(chunk.softcap_grad)
    if grads.bias is not None:
        grads.bias.addmv_(d_logits.t(), factor.squeeze(1))
    product = d_logits.to(head.weight.dtype)
    if grads.hidden is not None:
        grads.hidden[rows] = _wide_product(product, head.weight).mul_(factor)
    if grads.weight is not None:
        _add_product(grads.weight, product.t(), (chunk.hidden * factor).to(product.dtype))


# --- products of 16-bit matrices with results in float32 --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _WideProducts:
    """What a device does with 16-bit matrices without rounding the result to 16 bits."""

    product: bool
    """`mm` with a float32 result."""
    sum: bool
    """`addmm` to a float32 matrix."""


@lru_cache(maxsize=8)
def _wide_products(device: torch.device, dtype: torch.dtype) -> _WideProducts:
    """Try torch's `out_dtype` on a probe: CUDA has it for 16 bits, torch 2.11's `addmm` perhaps not; a CPU has none.

    Raises whatever says more than that: out of memory, and CUDA errors after which the process cannot continue.
    """
    left = torch.arange(24 * 16, device=device).sin().view(24, 16).to(dtype)
    exact = left.float() @ left.float().t()
    into, added = torch.empty_like(exact), torch.ones_like(exact)

    def works(attempt: Callable[[], Tensor], expected: Tensor) -> bool:
        try:
            return torch.allclose(attempt(), expected, rtol=1e-3, atol=1e-4)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError:
            return False

    found = _WideProducts(
        works(lambda: torch.mm(left, left.t(), out_dtype=torch.float32, out=into), exact),
        works(lambda: torch.addmm(added, left, left.t(), out_dtype=torch.float32, out=added), exact + 1),
    )
    if device.type != "cpu" and not found.product:
        _log.warning("the output layer's logits are rounded to %s: torch has no product in float32 here", dtype)
    return found


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, `out` at least in float32."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif _wide_products(left.device, left.dtype).product:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right))


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, of 16-bit matrices in float32 where the device can."""
    if left.dtype in (torch.bfloat16, torch.float16) and _wide_products(left.device, left.dtype).product:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, `out` at least in float32. Transient memory: GRADIENT_CHUNK_ELEMENTS elements at most."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif _wide_products(left.device, left.dtype).sum:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        rows = max(1, memory_limits.GRADIENT_CHUNK_ELEMENTS // right.shape[1])
        for part, sums in zip(left.split(rows), out.split(rows), strict=True):
            sums.add_(_wide_product(part, right))


# --- rows to sequences ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sums:
    """[pairs, len(TOKEN_KINDS)] float64."""

    logps: Tensor
    collision_prob: Tensor | None


def _sums(selected: Tensor, batch: Batch, head: Head, pairs: slice, buffer: Tensor, collision_prob: bool) -> _Sums:
    """Return the sums of these pairs, processing as many rows at a time as the buffer has."""
    end = batch.pair_rows[pairs.stop]
    edges = [(low, min(low + len(buffer), end)) for low in range(batch.pair_rows[pairs.start], end, len(buffer))]
    chunks = (_chunk_logps(selected[low:high], batch.targets[low:high], head, buffer) for low, high in edges)
    return _sums_by_kind(chunks, batch, pairs, collision_prob)


def _sums_by_kind(chunks: Iterable[_Chunk], batch: Batch, pairs: slice, collision_prob: bool) -> _Sums:
    logps: list[Tensor] = []
    collision_probs: list[Tensor] = []
    for chunk in chunks:
        logps.append(chunk.logps)
        if collision_prob:
            squares = torch.linalg.vecdot(chunk.exp_logits, chunk.exp_logits).log() - 2 * chunk.exp_sum.squeeze(1).log()
            collision_probs.append(squares)
    rows = slice(batch.pair_rows[pairs.start], batch.pair_rows[pairs.stop])
    pair_kinds = batch.pair_kinds[rows] - pairs.start * len(TOKEN_KINDS)

    def by_kind(values: list[Tensor]) -> Tensor:
        size = (pairs.stop - pairs.start) * len(TOKEN_KINDS)
        zeros = torch.zeros(size, dtype=sum_dtype(pair_kinds.device), device=pair_kinds.device)
        return zeros.index_add_(0, pair_kinds, torch.cat(values).to(zeros.dtype)).view(-1, len(TOKEN_KINDS))

    return _Sums(by_kind(logps), by_kind(collision_probs) if collision_prob else None)


def _pair_logps(batch: Batch, pairs: slice, sums: _Sums) -> PairLogps:
    chosen_tokens, rejected_tokens, prompt_tokens = batch.token_counts[:, pairs].unbind()
    by = dict(zip(TOKEN_KINDS, sums.logps.unbind(1), strict=True))
    collisions = (
        None if sums.collision_prob is None else dict(zip(TOKEN_KINDS, sums.collision_prob.unbind(1), strict=True))
    )
    return PairLogps(
        chosen=by["chosen_shared"] + by["chosen_tail"],
        rejected=by["rejected_shared"] + by["rejected_tail"],
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        chosen_shared=by["chosen_shared"],
        rejected_shared=by["rejected_shared"],
        chosen_collision_logp=None if collisions is None else collisions["chosen_shared"] + collisions["chosen_tail"],
        rejected_collision_logp=None
        if collisions is None
        else collisions["rejected_shared"] + collisions["rejected_tail"],
        prompt=by["prompt"] if batch.prompt_scored else None,
        prompt_tokens=prompt_tokens if batch.prompt_scored else None,
    )
