"""Agreement with TRL in float32: loss, every parameter's gradient, a trajectory, the metrics."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.trl_oracle import (
    Pair,
    cpo_inputs,
    cpo_trainer,
    dpo_inputs,
    dpo_trainer,
    gradients,
    loss_and_gradients,
    make_pairs,
    moved,
    tiny_model,
    worst,
)
from trainer.config.loss_config import DpoLoss, LossConfig, SimpoLoss
from trainer.forward.packing import micro_batches
from trainer.forward.pair_model import PairModel
from trainer.objectives.pair_logps import LossTerms, PairLogps, UpdateNormalizer, metric_means, metric_sums

PAIRS = make_pairs(6)
SIMPO: dict[str, tuple[SimpoLoss, dict[str, Any]]] = {
    "plain": (SimpoLoss(beta=2.0, gamma=1.0), {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    "smoothed": (
        SimpoLoss(beta=2.5, gamma_beta_ratio=0.4, label_smoothing=0.1),
        {"beta": 2.5, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "label_smoothing": 0.1},
    ),
    "sft": (
        SimpoLoss(beta=2.0, gamma=0.3, sft_weight=0.5),
        {"beta": 2.0, "simpo_gamma": 0.3, "cpo_alpha": 0.5},
    ),
}


def norm_of(pairs: list[Pair]) -> UpdateNormalizer:
    return UpdateNormalizer.from_lengths([len(p.prompt) for p in pairs], [len(p.chosen) for p in pairs])


def ours(model: Any, loss: LossConfig, reference: PairLogps | None) -> tuple[LossTerms, dict[str, torch.Tensor]]:
    """Gradients of one update, in two micro-batches."""
    model.zero_grad(set_to_none=True)
    pair_model = PairModel(model)
    terms = [
        pair_model.backward(
            [PAIRS[i] for i in part],
            loss,
            None if reference is None else reference.select(part),
            norm_of(PAIRS),
            torch.Tensor.backward,
        )
        for part in micro_batches([1] * len(PAIRS), range(len(PAIRS)), 4)
    ]
    return LossTerms.cat(terms), gradients(model)


@pytest.mark.parametrize("case", SIMPO)
def test_simpo_agrees_with_trls_cpo_trainer(case: str, tmp_path: Path) -> None:
    loss, options = SIMPO[case]
    model = tiny_model()
    trainer = cpo_trainer(model, tmp_path, loss_type="simpo", **options)
    value, right = loss_and_gradients(trainer, cpo_inputs(PAIRS))
    terms, found = ours(model, loss, None)
    assert float(terms.loss) == pytest.approx(value, rel=1e-5)
    assert worst(found, right) < 1e-5
    logged = {name: sum(values) / len(values) for name, values in trainer._stored_metrics["train"].items()}
    agree(metric_means(metric_sums(terms)), logged, without={"nll_loss"} if not loss.sft_weight else set())


def test_dpo_agrees_with_trls_dpo_trainer(tmp_path: Path) -> None:
    model = tiny_model()
    other = moved(model)
    reference = PairModel(other).logps(PAIRS)
    trainer = dpo_trainer(model, other, tmp_path, beta=0.1)
    value, right = loss_and_gradients(trainer, dpo_inputs(PAIRS))
    terms, found = ours(model, DpoLoss(beta=0.1), reference)
    assert float(terms.loss) == pytest.approx(value, rel=1e-5)
    assert worst(found, right) < 1e-5
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    agree(metric_means(metric_sums(terms)), logged, without=set())


def agree(found: dict[str, float], logged: dict[str, float], without: set[str]) -> None:
    """Every metric that both report has the same value."""
    names = (found.keys() & logged.keys()) - without
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"} <= names
    for name in names:
        assert found[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", ["simpo", "dpo"])
def test_twenty_updates_of_adamw_agree_with_trl(kind: str, tmp_path: Path) -> None:
    """Four batches in turn; weights and losses side by side."""
    mine, theirs = tiny_model(), tiny_model()
    frozen = deepcopy(mine)
    if kind == "simpo":
        loss: LossConfig = SimpoLoss(beta=2.0, gamma=1.0)
        trainer = cpo_trainer(theirs, tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0)
    else:
        loss = DpoLoss(beta=0.1)
        trainer = dpo_trainer(theirs, deepcopy(frozen), tmp_path, beta=0.1)
    pair_model, start = PairModel(mine), PairModel(frozen)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (mine, theirs)]
    losses: list[tuple[float, float]] = []
    for update in range(20):
        pairs = make_pairs(4, seed=100 + update % 4)
        theirs.train()
        optimizers[1].zero_grad()
        right = trainer.compute_loss(theirs, cpo_inputs(pairs) if kind == "simpo" else dpo_inputs(pairs))
        right.backward()
        optimizers[0].zero_grad()
        reference = None if kind == "simpo" else start.logps(pairs)
        terms = pair_model.backward(pairs, loss, reference, norm_of(pairs), torch.Tensor.backward)
        for optimizer in optimizers:
            optimizer.step()
        losses.append((float(terms.loss), float(right.detach())))
    for found, expected in losses:
        assert found == pytest.approx(expected, rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[-1][0], rel=1e-2)
    for (name, one), other, begun in zip(
        mine.named_parameters(), theirs.parameters(), frozen.parameters(), strict=True
    ):
        assert float(((one - other).norm() / (other - begun).norm()).detach()) < 5e-3, name
