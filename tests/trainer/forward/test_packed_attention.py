"""The sequences handed to flash attention on CUDA, with a plain implementation of its contract in its place."""

import logging
import math
from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest
import torch

from tests.support.trl_oracle import make_pairs, tiny_model, totals_of
from trainer.config.loss_config import SimpoLoss
from trainer.forward import packed_attention as attention_module
from trainer.forward.packed_attention import packed_attention
from trainer.forward.packing import PackingPlan, PairSpan, pack_pairs
from trainer.forward.pair_model import PairModel


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
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Sequence by sequence; causal with the last query at the last key, as the flash kernels align it."""
    assert enable_gqa or query.shape[1] == key.shape[1]
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


def varlen_of_torch_2_11(*sequences: Any, return_aux: Any = None, scale: float, window_size: Any) -> torch.Tensor:
    """The signature of torch 2.11, which has no enable_gqa."""
    assert return_aux is None
    return plain_varlen(*sequences, scale=scale, window_size=window_size)


KERNELS = {"with enable_gqa": plain_varlen, "without": varlen_of_torch_2_11}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Flash attention for any device and dtype; what was tried before is forgotten, and afterwards again."""
    monkeypatch.setattr(attention_module, "_is_supported", lambda *_: True)
    attention_module._unsupported_reason.cache_clear()
    yield monkeypatch
    attention_module._unsupported_reason.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flash_sequences_are_the_packed_attention(
    window: int | None, kv_heads: int, kernel: str, on_the_cpu: pytest.MonkeyPatch
) -> None:
    batch = pack_pairs(make_pairs(4))
    torch.manual_seed(0)
    shapes = [(1, heads, batch.tokens, 8) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    arguments: dict[str, Any] = {"pair_plan": batch.plan, "sliding_window": window, "scaling": 0.4}
    direction = torch.randn(1, batch.tokens, 4, 8, dtype=torch.float64)
    with on_the_cpu.context() as without:
        without.setattr(attention_module, "_is_supported", lambda *_: False)
        expected, _ = packed_attention(torch.nn.Identity(), *inputs, None, **arguments)
    right = torch.autograd.grad(expected, inputs, direction)
    calls: list[int] = []
    kernel_called = wraps(KERNELS[kernel])(lambda *a, **k: calls.append(1) or KERNELS[kernel](*a, **k))
    on_the_cpu.setattr(attention_module, "varlen_attn", kernel_called)
    found, _ = packed_attention(torch.nn.Identity(), *inputs, None, **arguments)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, inputs, direction), right, strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == 2, "the probe, then the batch"


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: torch.Tensor) -> torch.Tensor:
        return found.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no backward kernel for this head size")


def refused(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")


def unheard_of(*_: Any, **__: Any) -> torch.Tensor:
    raise TypeError("varlen_attn() got an unexpected keyword argument 'window_size'")


def forward_only(*args: Any, **options: Any) -> torch.Tensor:
    return _FailsInBackward.apply(plain_varlen(*args, **options))  # pyright: ignore[reportReturnType]


def not_finite(*args: Any, **options: Any) -> torch.Tensor:
    return plain_varlen(*args, **options) * math.nan


@pytest.mark.parametrize("kernel", [refused, unheard_of, forward_only, not_finite])
def test_a_kernel_that_does_not_run_is_replaced_with_a_warning(
    kernel: Any, on_the_cpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a model: still packed, the same numbers, training works, and said once for all layers and batches."""
    pairs = make_pairs(4)
    with on_the_cpu.context() as without:
        without.setattr(attention_module, "_is_supported", lambda *_: False)
        expected = PairModel(tiny_model()).logps(pairs)
    on_the_cpu.setattr(attention_module, "varlen_attn", kernel)
    with caplog.at_level(logging.WARNING):
        model = PairModel(tiny_model(), "packed")
        found, totals = model.logps(pairs), totals_of(pairs)
        model.backward(pairs, SimpoLoss(), None, totals, torch.Tensor.backward)
    torch.testing.assert_close(found.chosen, expected.chosen)
    (messages,) = [record.message for record in caplog.records if "flash attention" in record.message]
    assert "torch's own operations" in messages
    assert {refused: "only supports Ampere", unheard_of: "TypeError", forward_only: "no backward kernel"}.get(
        kernel, "not finite"
    ) in messages


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("an illegal memory access", 700)]
)
def test_errors_of_the_device_are_not_taken_for_a_kernel_that_is_missing(
    error: Exception, on_the_cpu: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any, **__: Any) -> torch.Tensor:
        raise error

    on_the_cpu.setattr(attention_module, "varlen_attn", raising)
    with pytest.raises(type(error)):
        PairModel(tiny_model(), "packed").logps(make_pairs(2))


def test_the_probe_sees_the_dtype_that_the_model_computes_in(on_the_cpu: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def recording(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(query.dtype)
        return plain_varlen(query, *args, **options)

    on_the_cpu.setattr(attention_module, "varlen_attn", recording)
    model, pairs = PairModel(tiny_model()), make_pairs(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.logps(pairs)
    assert set(seen) == {torch.bfloat16}
    model.logps(pairs)
    assert set(seen) == {torch.bfloat16, torch.float32}


def test_flash_is_for_cuda_only() -> None:
    query = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not attention_module.supports_flash(query, query, query, None, None)


def test_a_pair_without_rejected_is_one_sequence() -> None:
    sequences = attention_module._sequences(
        PackingPlan((PairSpan(0, 3, 2, 0), PairSpan(5, 1, 2, 4))), torch.device("cpu")
    )
    assert (sequences.query_ends.tolist(), sequences.key_ends.tolist()) == ([0, 5, 8, 12], [0, 5, 8, 13])
    assert sequences.keys.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 8, 9, 10, 11]
    assert (sequences.longest_query, sequences.longest_key) == (5, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_agrees_on_cuda() -> None:
    batch = pack_pairs(make_pairs(6, scale=8)).to(torch.device("cuda"))
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
