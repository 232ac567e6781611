"""Forward and backward pass on the device: layouts, attention, output layer, layers, optimizer."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from tests.support.trl_oracle import gradients, make_pairs, tiny_model, together, totals_of
from trainer import memory_limits
from trainer.config.loss_config import SimpoLoss
from trainer.config.trial import ModelConfig
from trainer.forward import chunked_logps, packed_attention
from trainer.forward.chunked_logps import ChunkSize, Head, objective_loss, sequence_logps
from trainer.forward.packing import PackingPlan, PairSpan, pack_pairs
from trainer.forward.pair_model import PairModel
from trainer.models.layer_kernels import compile_layers, drop_compiled_layers, fuse_layers
from trainer.objectives.losses import pair_loss
from trainer.training.stochastic_rounding import RoundingAdamW, round_stochastically

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 24, "num_hidden_layers": 6},
}
LOSS = SimpoLoss(beta=2.0, gamma=1.0)
Update = tuple[float, dict[str, torch.Tensor]]


def update(model: PreTrainedModel, attention: str = "packed", seed: int = 0) -> Update:
    """Loss and gradients of one update of six pairs, the longest of some 80 tokens."""
    pairs = make_pairs(6, seed=seed, scale=2)
    model.zero_grad()
    pair_model = PairModel(model, attention)  # pyright: ignore[reportArgumentType]
    terms = pair_model.backward(pairs, LOSS, None, totals_of(pairs), torch.Tensor.backward)
    return float(terms.loss), {name: gradient.float() for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_packed_pairs_are_separate_sequences(name: str, device: torch.device) -> None:
    """float32 to rounding; in bfloat16 packed pairs are as near to the exact gradient as separate ones."""
    model = tiny_model(name, **SHAPES[name]).to(device)
    loss, exact = update(model, "separate")
    found, gradient = update(model)
    assert found == pytest.approx(loss, rel=1e-4)
    assert together(gradient, exact) < 1e-4
    narrow = copy.deepcopy(model).bfloat16()
    off = {attention: together(update(narrow, attention)[1], exact) for attention in ("packed", "separate")}
    assert off["packed"] < max(1.5 * off["separate"], 0.05), off
    with torch.autocast(device.type, torch.bfloat16):
        off = {attention: together(update(model, attention)[1], exact) for attention in ("packed", "separate")}
    assert off["packed"] < max(1.5 * off["separate"], 0.05), off


PLAN = PackingPlan((PairSpan(0, 21, 40, 17), PairSpan(78, 5, 1, 60), PairSpan(144, 30, 25, 0)))
TOKENS = 199


def mask_of(plan: PackingPlan, window: int | None) -> torch.Tensor:
    """[T, T] which key a query sees: its own response and the prompt, up to itself and within the window."""
    owner, position = torch.zeros(TOKENS, dtype=torch.long), torch.zeros(TOKENS, dtype=torch.long)
    prompt = torch.zeros(TOKENS, dtype=torch.long)
    for number, span in enumerate(plan.spans):
        ends = (span.prompt, span.prompt + span.chosen, span.prompt + span.chosen + span.rejected)
        for part, (low, high) in enumerate(zip((0, *ends[:2]), ends, strict=True)):
            rows = slice(span.start + low, span.start + high)
            owner[rows] = 3 * number + part
            prompt[rows] = 3 * number
            position[rows] = torch.arange(high - low) + (0 if part == 0 else span.prompt)
    sees = (owner[:, None] == owner[None]) | (prompt[:, None] == owner[None])
    distance = position[:, None] - position[None]
    return sees & (distance >= 0) & (distance < (window or TOKENS))


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_with_shared_prompts_is_attention_under_a_mask(
    kv_heads: int, window: int | None, device: torch.device, on_gpu: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, TOKENS, 32, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    assert packed_attention.supports_flash(*inputs, None, window) is on_gpu
    found, _ = packed_attention.packed_attention(nn.Identity(), *inputs, None, sliding_window=window, pair_plan=PLAN)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    mask = mask_of(PLAN, window).to(device)
    expected = scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    for result, right in (
        (found, expected),
        *zip(
            torch.autograd.grad(found.double().square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), exact),
            strict=True,
        ),
    ):
        assert float((result.detach().double() - right.detach()).norm() / right.detach().norm()) < 0.02


def test_the_output_layer_in_bfloat16(device: torch.device, on_gpu: bool) -> None:
    """On a GPU no logit and no part of the weight's gradient is rounded to 16 bits on its way."""
    batch = pack_pairs(make_pairs(6, vocabulary=1000)).to(device)
    assert chunked_logps._wide_products(device, torch.bfloat16).product is on_gpu
    print(f"addmm to float32: {chunked_logps._wide_products(device, torch.bfloat16).sum}")
    torch.manual_seed(0)
    values = [(torch.randn(rows, 64, device=device) / 4).bfloat16() for rows in (batch.tokens, 1000)]

    def outcome(dtype: torch.dtype, rows: int) -> list[torch.Tensor]:
        hidden, weight = (each.detach().to(dtype).requires_grad_() for each in values)
        totals = totals_of(make_pairs(6, vocabulary=1000))
        total, _ = objective_loss(
            hidden, batch, Head(weight), lambda part, _: pair_loss(LOSS, part, totals), ChunkSize(rows, rows)
        )
        total.backward()
        logps = sequence_logps(hidden, batch, Head(weight), ChunkSize(rows, rows))
        assert hidden.grad is not None
        assert weight.grad is not None
        return [total.detach(), logps.chosen, hidden.grad.double(), weight.grad.double()]

    exact = outcome(torch.float64, 10_000)
    for rows in (20, 10_000):
        for found, right in zip(outcome(torch.bfloat16, rows), exact, strict=True):
            assert float((found - right).norm() / right.norm()) < 5e-3
    for found, right in zip(outcome(torch.float32, 20), exact, strict=True):
        assert float((found - right).norm() / right.norm()) < 1e-5


def test_stochastic_rounding(device: torch.device, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right on average, and the same in parts as in one go, to the bit: the device's generator draws in waves."""
    exact = torch.tensor([1.0 + 1 / 512, -(1.0 + 1 / 1024), 2.0], device=device).repeat(100_000, 1)
    rounded = round_stochastically(exact.clone(), torch.Generator(device).manual_seed(0))
    step = exact[0].abs() / 128
    assert ((rounded.double().mean(0) - exact[0].double()).abs() <= 0.01 * step).all()

    def stepped() -> list[torch.Tensor]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3001, 2003 if on_gpu else 101, device=device).bfloat16())
        adam = RoundingAdamW(
            [{"params": [weight], "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, seed=(3,)
        )
        for _ in range(2):
            weight.grad = torch.randn_like(weight)
            adam.step()
        return [weight.detach(), *adam.state[weight].values()]

    full = stepped()
    monkeypatch.setattr(memory_limits, "ROUNDING_CHUNK_ELEMENTS", 1_500_000 if on_gpu else 4096)
    assert all(torch.equal(a, b) for a, b in zip(full, stepped(), strict=True))


def test_fused_layers_are_equal(device: torch.device, on_gpu: bool) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'prefsweep[liger]'")
    if not on_gpu:
        pytest.skip("liger-kernel runs on a GPU")
    for name, more in SHAPES.items():
        model = tiny_model(name, **more).to(device)
        loss, exact = update(model)
        fused = copy.deepcopy(model)
        assert fuse_layers(fused, ModelConfig(name_or_path="any", kernels="liger"), device)
        found, gradient = update(fused)
        assert found == pytest.approx(loss, rel=1e-4), name
        assert together(gradient, exact) < 1e-4, name
        plain, narrow = (together(update(each.bfloat16())[1], exact) for each in (model, fused))
        assert narrow < max(1.5 * plain, 0.05), name


def test_compiled_layers_are_equal(device: torch.device, on_gpu: bool) -> None:
    model = tiny_model().to(device)
    expected = [update(model, seed=seed) for seed in range(3)]
    compile_layers(model, "inductor" if on_gpu else "aot_eager")
    for seed, (loss, exact) in enumerate(expected):
        found, gradient = update(model, seed=seed)
        assert found == pytest.approx(loss, rel=1e-4)
        assert together(gradient, exact) < 1e-4
    drop_compiled_layers(model)
