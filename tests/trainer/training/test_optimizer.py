import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import memory_limits
from trainer.config.trial import TrainingConfig
from trainer.training import stochastic_rounding
from trainer.training.optimizer import Optimizer
from trainer.training.stochastic_rounding import RoundingAdamW, round_stochastically


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
    optimizer = Optimizer(ours, dict(ours.named_parameters()), training)
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
        assert optimizer.clip_gradients() == pytest.approx(
            float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        )
        assert optimizer.step(0.5) == 5e-3
        for group in plain.param_groups:
            group["lr"] = 5e-3
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_no_clipping_at_zero() -> None:
    net = model()
    optimizer = Optimizer(net, dict(net.named_parameters()), TrainingConfig(max_grad_norm=0))
    draw(net, 1, 100.0)
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    assert optimizer.clip_gradients() > 100
    assert all(torch.equal(a, b.grad) for a, b in zip(before, net.parameters(), strict=True))


def test_goes_on_from_its_state_to_the_bit() -> None:
    full, broken = model(), model()
    training = TrainingConfig(learning_rate=1e-2)
    first = Optimizer(full, dict(full.named_parameters()), training)
    second = Optimizer(broken, dict(broken.named_parameters()), training)
    for step in range(6):
        if step == 3:
            saved = {k: v.clone() for k, v in second.state_dict().items()}
            second = Optimizer(broken, dict(broken.named_parameters()), training)
            second.load_state_dict(saved)
        for net, optimizer in ((full, first), (broken, second)):
            draw(net, step)
            optimizer.clip_gradients()
            optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), broken.parameters(), strict=True))


def test_rounding_by_chance_is_right_on_average() -> None:
    exact = torch.tensor([1.0 + 1 / 512, -(1.0 + 1 / 1024), 1e-6 * 1.003, 2.0, 0.0]).repeat(20_000, 1)
    rounded = round_stochastically(exact.clone(), torch.Generator().manual_seed(0))
    assert rounded.dtype is torch.bfloat16
    step = exact[0].abs() / 128
    assert ((rounded.float() - exact).abs() <= step + 1e-30).all()
    # The standard error of the mean is at most half a step / sqrt(20,000) = 0.0035 steps.
    assert ((rounded.double().mean(0) - exact[0].double()).abs() <= 0.02 * step + 1e-30).all()
    assert torch.equal(rounded[:, 3:].float(), exact[:, 3:])


def test_small_updates_of_bfloat16_weights_are_not_lost() -> None:
    """At a rate of 1e-5 a weight near 0.02 never moves when rounded to nearest."""
    exact, nearest, chance = model(), model().bfloat16(), model().bfloat16()
    optimizers = [
        Optimizer(net, dict(net.named_parameters()), TrainingConfig(learning_rate=1e-5, stochastic_rounding=rounding))
        for net, rounding in ((exact, True), (nearest, False), (chance, True))
    ]
    start = [p.detach().clone() for p in chance.parameters()]
    for _ in range(20):
        for net, optimizer in zip((exact, nearest, chance), optimizers, strict=True):
            draw(net, 7)
            optimizer.step(1.0)

    def moved(net: torch.nn.Module) -> float:
        """How far along the signs of the exact updates, in units of the exact way."""
        way = [(e.detach() - s.float()) for e, s in zip(exact.parameters(), start, strict=True)]
        gone = [(p.detach().float() - s.float()) for p, s in zip(net.parameters(), start, strict=True)]
        return float(sum((a.sign() * b).sum() for a, b in zip(way, gone, strict=True)))

    exact_way = 20 * 1e-5 * sum(p.numel() for p in exact.parameters())
    assert moved(chance) == pytest.approx(exact_way, rel=0.1)
    assert abs(moved(nearest)) < 0.5 * exact_way


def test_rounding_goes_on_from_its_state_to_the_bit() -> None:
    full, broken = model().bfloat16(), model().bfloat16()
    training = TrainingConfig(learning_rate=1e-3, weight_decay=0.1)
    first = Optimizer(full, dict(full.named_parameters()), training)
    second = Optimizer(broken, dict(broken.named_parameters()), training)
    for step in range(6):
        if step == 3:
            saved = {k: v.clone() for k, v in second.state_dict().items()}
            assert {v.dtype for v in saved.values()} == {torch.float32}
            second = Optimizer(broken, dict(broken.named_parameters()), training)
            second.load_state_dict(saved)
        for net, optimizer in ((full, first), (broken, second)):
            draw(net, step)
            optimizer.clip_gradients()
            optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), broken.parameters(), strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("wave", [64, 192])
@pytest.mark.parametrize("elements", [64, 640, 4096, 1 << 16])
def test_a_step_in_parts_is_the_step_in_one_go_to_the_bit(
    elements: int, wave: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments, with rounding by chance, odd sizes, float32 weights and one that is not contiguous."""

    def stepped() -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = ((1003, 97), (5,), (65, 64), (77, 64))
        weights = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
        weights += [nn.Parameter(torch.randn(300, 33)), nn.Parameter(torch.randn(64, 65).bfloat16().t())]
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
        adam = RoundingAdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, seed=(3,))
        for step in range(4):
            torch.manual_seed(step)
            for weight in weights:
                weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape))
            adam.step()
        assert {float(adam.state[weight]["step"]) for weight in weights} == {4.0}
        return [weight.detach() for weight in weights] + [m for w in weights for m in adam.state[w].values()]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        full = stepped()
        monkeypatch.setattr(memory_limits, "ROUNDING_CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(stochastic_rounding, "_wave", lambda _: wave)
        assert all(torch.equal(a, b) for a, b in zip(full, stepped(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_float32_weights_among_bfloat16_ones_are_updated_exactly() -> None:
    """Some models keep a few in float32; the others are rounded by chance all the same."""
    mixed, exact = model().bfloat16(), model()
    name = next(iter(dict(exact.named_parameters())))
    mixed.get_parameter(name).data = exact.get_parameter(name).detach().clone()
    training = TrainingConfig(learning_rate=1e-5)
    for net in (mixed, exact):
        optimizer = Optimizer(net, dict(net.named_parameters()), training)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1.0)
    assert torch.equal(mixed.get_parameter(name), exact.get_parameter(name))
    assert mixed.get_parameter(name).dtype is torch.float32
    start = model().bfloat16()
    others = [n for n, _ in mixed.named_parameters() if n != name]
    assert any(not torch.equal(mixed.get_parameter(n), start.get_parameter(n)) for n in others)
