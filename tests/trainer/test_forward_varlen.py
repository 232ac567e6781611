"""The sequences handed to flash attention on CUDA, with a plain implementation of its contract in its place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import make_pairs

from trainer.forward import varlen
from trainer.forward.attention import packed_attention
from trainer.forward.layout import pack
from trainer.forward.packed import PackedPlan, PairSpan


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """Sequence by sequence; causal with the last query at the last key, as the flash kernels align it."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out: list[torch.Tensor] = []
    for a, b, c, d in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        q, k, v = query[a:b].transpose(0, 1), key[c:d].transpose(0, 1), value[c:d].transpose(0, 1)
        assert q.shape[1] <= max_q
        assert k.shape[1] <= max_k
        k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
        at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        seen = torch.arange(k.shape[1])[None] <= at + window_size[1]
        if window_size[0] >= 0:
            seen &= torch.arange(k.shape[1])[None] >= at - window_size[0]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flash_sequences_are_the_packed_attention(
    window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack(make_pairs(4))
    torch.manual_seed(0)
    shapes = [(1, heads, batch.tokens, 8) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    arguments: dict[str, Any] = {"pair_plan": batch.plan, "sliding_window": window, "scaling": 0.4}
    direction = torch.randn(1, batch.tokens, 4, 8, dtype=torch.float64)
    expected, _ = packed_attention(torch.nn.Identity(), *inputs, None, **arguments)
    right = torch.autograd.grad(expected, inputs, direction)
    monkeypatch.setattr("trainer.forward.attention.can_flash", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    found, _ = packed_attention(torch.nn.Identity(), *inputs, None, **arguments)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, inputs, direction), right, strict=True):
        torch.testing.assert_close(one, other)


def test_flash_is_for_cuda_only() -> None:
    query = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not varlen.can_flash(query, query, None)


def test_a_pair_without_rejected_is_one_sequence() -> None:
    sequences = varlen._sequences(PackedPlan((PairSpan(0, 3, 2, 0), PairSpan(5, 1, 2, 4))), torch.device("cpu"))
    assert sequences.query_ends.tolist() == [0, 5, 8, 12]
    assert sequences.key_ends.tolist() == [0, 5, 8, 13]
    assert sequences.keys.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 8, 9, 10, 11]
    assert (sequences.longest_query, sequences.longest_key) == (5, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_agrees_on_cuda() -> None:
    batch = pack(make_pairs(6, scale=8)).to(torch.device("cuda"))
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, heads, batch.tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    ]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    direction = torch.randn(1, batch.tokens, 8, 64, device="cuda")
    for window in (None, 40):
        arguments: dict[str, Any] = {"pair_plan": batch.plan, "sliding_window": window}
        found, _ = packed_attention(torch.nn.Identity(), *inputs, None, **arguments)
        expected, _ = packed_attention(torch.nn.Identity(), *wide, None, **arguments)
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.03)
        grads = torch.autograd.grad(found, inputs, direction.bfloat16())
        for one, other in zip(grads, torch.autograd.grad(expected, wide, direction), strict=True):
            assert float((one.float() - other).norm() / other.norm()) < 0.02
