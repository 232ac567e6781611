"""The chunked output layer against the plain one: values, gradients, and what it never allocates."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.objectives import OBJECTIVES
from tests.support.trl_oracle import make_pairs
from trainer import memory_limits
from trainer.config.loss_config import LossConfig, SimpoLoss
from trainer.forward import chunked_logps
from trainer.forward.chunked_logps import ChunkSize, Head, objective_loss, sequence_logps
from trainer.forward.packing import TOKEN_KINDS, Batch, pack_pairs
from trainer.objectives.losses import pair_loss, required_stats
from trainer.objectives.pair_logps import LossTerms, PairLogps, UpdateTotals

HIDDEN, VOCABULARY = 16, 97
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.25, "softcap": 2.0, "bias": True},
}


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Batch, Head]:
    batch = pack_pairs(make_pairs(6, vocabulary=VOCABULARY), prompt=True)
    torch.manual_seed(0)
    hidden = torch.randn(batch.tokens, HIDDEN, dtype=dtype, requires_grad=True)
    options = dict(HEADS[kind])
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True) if options.pop("bias", False) else None
    return hidden, batch, Head(weight, bias, **options)


def plain_logps(hidden: torch.Tensor, batch: Batch, head: Head) -> PairLogps:
    """The same by full logits and autograd."""
    logits = hidden @ head.weight.t() + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    distribution = logits.log_softmax(-1)[batch.rows]
    tokens = distribution.gather(1, batch.targets[:, None])[:, 0].double()
    pure = (2 * distribution).logsumexp(-1).double()

    def sums(values: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.zeros(len(batch) * len(TOKEN_KINDS), dtype=torch.float64).index_add(0, batch.pair_kinds, values)
        return dict(zip(TOKEN_KINDS, found.view(-1, len(TOKEN_KINDS)).unbind(1), strict=True))

    by, collision_prob = sums(tokens), sums(pure.detach())
    return PairLogps(
        chosen=by["chosen_shared"] + by["chosen_tail"],
        rejected=by["rejected_shared"] + by["rejected_tail"],
        chosen_tokens=torch.tensor(batch.chosen_tokens),
        rejected_tokens=torch.tensor(batch.rejected_tokens),
        chosen_shared=by["chosen_shared"],
        rejected_shared=by["rejected_shared"],
        chosen_collision_logp=collision_prob["chosen_shared"] + collision_prob["chosen_tail"],
        rejected_collision_logp=collision_prob["rejected_shared"] + collision_prob["rejected_tail"],
        prompt=by["prompt"],
        prompt_tokens=torch.tensor(batch.prompt_tokens),
    )


def shifted(logps: PairLogps) -> PairLogps:
    """A reference near the policy, with an estimate of the KL divergence."""
    columns = {n: c if "tokens" in n else c.detach() + 0.3 * torch.cos(c.detach()) for n, c in logps.columns().items()}
    gaps = torch.linspace(0.5, 3.0, len(logps.chosen), dtype=logps.chosen.dtype)
    return replace(PairLogps.from_columns(columns), score_gap=gaps, kl=torch.full_like(gaps, 0.7))


def grads(hidden: torch.Tensor, head: Head) -> list[torch.Tensor]:
    found = [t.grad.clone() for t in (hidden, head.weight, head.bias) if t is not None and t.grad is not None]
    for tensor in (hidden, head.weight, head.bias):
        if tensor is not None:
            tensor.grad = None
    return found


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rows", [3, 40, 10_000])
def test_logps_are_those_of_the_full_logits(kind: str, rows: int) -> None:
    hidden, batch, head = made(kind)
    found = sequence_logps(hidden, batch, head, ChunkSize(rows, rows), collision_prob=True).columns()
    expected = plain_logps(hidden, batch, head).columns()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name].detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rows", [5, 60, 10_000])
def test_loss_and_gradients_of_every_objective_are_those_of_autograd(name: str, rows: int) -> None:
    """rows 5: every pair is visited twice; 60: groups of pairs; 10,000: one group."""
    check(OBJECTIVES[name], "plain", rows)


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_through_every_form_of_output_layer(kind: str) -> None:
    for rows in (5, 60):
        check(SimpoLoss(beta=2.0, gamma=1.0, sft_weight=0.2), kind, rows)


def check(loss: LossConfig, kind: str, rows: int) -> None:
    hidden, batch, head = made(kind)
    totals = UpdateTotals(len(batch), sum(batch.chosen_tokens), sum(batch.prompt_tokens))
    logps = plain_logps(hidden, batch, head)
    reference = shifted(logps) if required_stats(loss).reference else None
    expected = pair_loss(loss, replace(logps, reference=reference), totals)
    expected.loss.backward()
    expected_logps = grads(hidden, head)

    def objective(part: PairLogps, pairs: slice) -> LossTerms:
        return pair_loss(loss, replace(part, reference=None if reference is None else reference.select(pairs)), totals)

    requested = required_stats(loss)
    total, terms = objective_loss(
        hidden,
        batch,
        head,
        objective,
        ChunkSize(rows, rows),
        couples_pairs=requested.couples_pairs,
        collision_prob=requested.collision_prob,
    )
    total.backward()
    assert float(total.detach()) == pytest.approx(float(expected.loss), rel=1e-10)
    full = LossTerms.concatenate(terms)
    assert float(full.loss) == pytest.approx(float(expected.loss), rel=1e-10)
    torch.testing.assert_close(full.chosen_rewards, expected.chosen_rewards)
    for found, right in zip(grads(hidden, head), expected_logps, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_the_incoming_gradient_multiplies() -> None:
    hidden, batch, head = made("plain")
    results = []
    for factor in (1.0, -2.5):
        total, _ = objective_loss(hidden, batch, head, simpo(batch), ChunkSize(50, 50))
        (factor * total).backward()
        results.append(grads(hidden, head))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(-2.5 * one, other)


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    hidden, batch, head = made("bias")
    expected, _ = objective_loss(hidden, batch, head, simpo(batch), ChunkSize(50, 50))
    expected.backward()
    right = grads(hidden, head)[0]
    frozen = replace(head, weight=head.weight.detach(), bias=head.bias.detach())
    total, _ = objective_loss(hidden, batch, frozen, simpo(batch), ChunkSize(50, 50))
    total.backward()
    (found,) = grads(hidden, head)
    torch.testing.assert_close(found, right)
    assert frozen.weight.grad is None


def test_reduced_precision_accumulates_in_float32() -> None:
    """bfloat16 weights: sums stay float64 and many chunks add up like one."""
    hidden, batch, head = made("plain", torch.bfloat16)
    found = []
    for rows in (20, 10_000):
        total, _ = objective_loss(hidden, batch, head, simpo(batch), ChunkSize(rows, rows))
        total.backward()
        assert total.dtype == torch.float64
        found.append(grads(hidden, head))
        assert all(g.dtype == torch.bfloat16 for g in found[-1])
    for few, many in zip(*found, strict=True):
        torch.testing.assert_close(few.float(), many.float(), rtol=0.05, atol=2e-3)


def test_the_gradient_of_the_output_layer_in_parts_is_that_of_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, batch, head = made("plain", torch.bfloat16)
    found: list[list[torch.Tensor]] = []
    for elements in (memory_limits.GRADIENT_CHUNK_ELEMENTS, 5 * hidden.shape[1], 1):
        monkeypatch.setattr(memory_limits, "GRADIENT_CHUNK_ELEMENTS", elements)
        total, _ = objective_loss(hidden, batch, head, simpo(batch), ChunkSize(8, 8))
        total.backward()
        found.append(grads(hidden, head))
    assert found[0][1].abs().max() > 0
    for parts in found[1:]:
        for one, other in zip(found[0], parts, strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=1e-6)


class NarrowProducts(TorchDispatchMode):
    """Counts products whose result has the 16 bits of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm} and out.dtype is torch.bfloat16:
            self.count += 1
        return out


@pytest.fixture
def wide_products() -> Iterator[None]:
    """The operators that torch has for CUDA only, on this CPU: products of 16-bit matrices in float32."""
    library = torch.library.Library("aten", "IMPL")

    def mm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return left.to(out_dtype) @ right.to(out_dtype)

    library.impl("mm.dtype", mm, "CPU")
    library.impl("mm.dtype_out", lambda left, right, dtype, *, out: out.copy_(mm(left, right, dtype)), "CPU")
    library.impl(
        "addmm.dtype_out", lambda to, left, right, dtype, *, out, **_: out.copy_(to + mm(left, right, dtype)), "CPU"
    )
    chunked_logps._wide_products.cache_clear()
    yield
    library._destroy()
    chunked_logps._wide_products.cache_clear()


def loss_and_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of bfloat16 values, computed in `dtype`: loss, gradient of the hidden states, gradient of the weight."""
    hidden, batch, head = made("plain", torch.bfloat16)
    states, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, head.weight))
    total, _ = objective_loss(states, batch, Head(weight), simpo(batch), ChunkSize(20, 20))
    total.backward()
    return [total.detach(), *grads(states, Head(weight))]


@pytest.mark.usefixtures("wide_products")
def test_products_in_float32_where_the_device_has_them() -> None:
    """No result in 16 bits is made on the way, which leaves the rounding of the factors alone."""
    exact = loss_and_gradients(torch.float64)
    with NarrowProducts() as narrow:
        wide = loss_and_gradients(torch.bfloat16)
    assert narrow.count == 0
    chunked_logps._wide_products.cache_clear()
    with pytest.MonkeyPatch.context() as patched, NarrowProducts() as narrow:
        patched.setattr(chunked_logps, "_wide_products", lambda *_: chunked_logps._WideProducts(False, False))
        rounded = loss_and_gradients(torch.bfloat16)
    assert narrow.count > 0
    assert abs(float(wide[0] - exact[0])) < 1e-5 < abs(float(rounded[0] - exact[0]))
    off = [
        [float((f.double() - e).norm() / e.norm()) for f, e in zip(g[1:], exact[1:], strict=True)]
        for g in (wide, rounded)
    ]
    assert all(less < more for less, more in zip(*off, strict=True))


def test_a_cpu_has_no_such_products() -> None:
    chunked_logps._wide_products.cache_clear()
    found = chunked_logps._wide_products(torch.device("cpu"), torch.bfloat16)
    assert found == chunked_logps._WideProducts(product=False, sum=False)


def simpo(batch: Batch) -> Any:
    totals = UpdateTotals(len(batch), sum(batch.chosen_tokens))
    return lambda part, pairs: pair_loss(SimpoLoss(beta=2.0, gamma=1.0), part, totals)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("rows", [16, 64])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(rows: int) -> None:
    """The largest is a chunk of rows, and the rows of the largest pair decide nothing: longer ones are cut."""
    vocabulary = 1000
    pairs = make_pairs(8, vocabulary=vocabulary)
    batch = pack_pairs(pairs)
    hidden = torch.randn(batch.tokens, 8, requires_grad=True)
    head = Head(torch.randn(vocabulary, 8, requires_grad=True))
    totals = UpdateTotals(len(pairs), sum(batch.chosen_tokens))
    with Largest() as seen:
        sequence_logps(hidden, batch, head, ChunkSize(rows, rows))
        total, _ = objective_loss(
            hidden, batch, head, lambda part, _: pair_loss(SimpoLoss(), part, totals), ChunkSize(rows, rows)
        )
        total.backward()
    assert len(batch.rows) > 2 * rows
    assert seen.numel <= rows * vocabulary
