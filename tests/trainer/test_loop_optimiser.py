from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config import TrainingConfig
from trainer.training.optimiser import Optimiser


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


def draw(net: torch.nn.Module, step: int, size: float = 1.0) -> None:
    torch.manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn_like(p) * size


def test_equals_plain_adamw_with_clipping_and_decay_beside_norms() -> None:
    ours, theirs = model(), model()
    training = TrainingConfig(learning_rate=1e-2, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=0.5)
    optimiser = Optimiser(ours, dict(ours.named_parameters()), training)
    norms = [p for n, p in theirs.named_parameters() if "norm" in n]
    rest = [p for n, p in theirs.named_parameters() if "norm" not in n]
    assert len(norms) == 3
    plain = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step in range(4):
        draw(ours, step)
        draw(theirs, step)
        assert optimiser.clip() == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)))
        assert optimiser.step(0.5) == 5e-3
        for group in plain.param_groups:
            group["lr"] = 5e-3
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_no_clipping_at_zero() -> None:
    net = model()
    optimiser = Optimiser(net, dict(net.named_parameters()), TrainingConfig(max_grad_norm=0))
    draw(net, 1, 100.0)
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    assert optimiser.clip() > 100
    assert all(torch.equal(a, b.grad) for a, b in zip(before, net.parameters(), strict=True))


def test_goes_on_from_its_state_to_the_bit() -> None:
    whole, broken = model(), model()
    training = TrainingConfig(learning_rate=1e-2)
    first = Optimiser(whole, dict(whole.named_parameters()), training)
    second = Optimiser(broken, dict(broken.named_parameters()), training)
    for step in range(6):
        if step == 3:
            saved = {k: v.clone() for k, v in second.state().items()}
            second = Optimiser(broken, dict(broken.named_parameters()), training)
            second.load(saved)
        for net, optimiser in ((whole, first), (broken, second)):
            draw(net, step)
            optimiser.clip()
            optimiser.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))
