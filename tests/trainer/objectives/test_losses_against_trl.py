"""Every objective in float32, loss and every parameter's gradient: against TRL's own trainers, or else its formula."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests.support.trl_oracle import (
    Pair,
    cpo_inputs,
    cpo_trainer,
    dpo_inputs,
    dpo_trainer,
    gradients,
    kto_inputs,
    kto_trainer,
    loss_and_gradients,
    make_pairs,
    moved,
    orpo_trainer,
    single_rows,
    tiny_model,
    together,
    totals_of,
    worst,
)
from trainer.config.loss_config import (
    OWN_TERMS,
    CpoLoss,
    DpoLoss,
    DpoLossType,
    KtoLoss,
    LossConfig,
    OrpoLoss,
    SimperLoss,
    SimpoLoss,
)
from trainer.forward.pair_model import PairModel, UpdateLogps
from trainer.objectives.losses import required_stats
from trainer.objectives.pair_logps import LossTerms, PairLogps, metric_means, metric_sums

PAIRS = make_pairs(6)
GAPS = torch.tensor([0.5, 1.0, 3.5, 0.1, 2.0, 7.0], dtype=torch.float64)
SIDES = ("chosen", "rejected")
_OPTIONS: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 1e-3},
    "aot": {"label_smoothing": 0.05},
}
DPO: dict[str, dict[str, Any]] = {
    term: {"loss_type": term, **_OPTIONS.get(term, {})} for term in get_args(DpoLossType) if term not in OWN_TERMS
}
DPO |= {
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "mixture-smoothed": {"loss_type": ["hinge", "aot_unpaired"], "label_smoothing": 0.2},
    "forward-kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence", "loss_type": "ipo"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "loss_type": "sigmoid_norm"},
    "alpha-one": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "ld": {"ld_alpha": 0.5},
    "ld-norm": {"ld_alpha": 0.3, "loss_type": "sigmoid_norm"},
    "ld-zero-aot": {"ld_alpha": 0.0, "loss_type": "aot"},
    "wpo": {"use_weighting": True},
    "wpo-mixture": {"use_weighting": True, "loss_type": ["apo_zero", "sigmoid_norm"], "loss_weights": [0.5, 2.0]},
    "tau": {"loss_type": "discopop", "discopop_tau": 0.2},
}
_SIMPO = {"loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0}
_ALPHAPO = {"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.1}
CPO: dict[str, tuple[LossConfig, dict[str, Any]]] = {
    "simpo": (SimpoLoss(beta=2.0, gamma=1.0), _SIMPO | {"beta": 2.0}),
    "simpo-smoothed": (
        SimpoLoss(beta=2.5, gamma_beta_ratio=0.4, label_smoothing=0.1),
        _SIMPO | {"beta": 2.5, "label_smoothing": 0.1},
    ),
    "simpo-sft": (
        SimpoLoss(beta=2.0, gamma=0.3, sft_weight=0.5),
        _SIMPO | {"beta": 2.0, "simpo_gamma": 0.3, "cpo_alpha": 0.5},
    ),
    "sigmoid": (CpoLoss(), {"loss_type": "sigmoid"}),
    "smoothed": (CpoLoss(label_smoothing=0.2, nll_scale=0.0), {"label_smoothing": 0.2, "cpo_alpha": 0.0}),
    "hinge": (CpoLoss(loss_type="hinge", nll_scale=0.5), {"loss_type": "hinge", "cpo_alpha": 0.5}),
    "ipo": (CpoLoss(loss_type="ipo", beta=0.3), {"loss_type": "ipo", "beta": 0.3}),
    "alphapo": (SimpoLoss(beta=2.5, gamma=0.1, alpha=0.25), _ALPHAPO | {"alpha": 0.25}),
    "alphapo-negative": (SimpoLoss(beta=2.5, gamma=0.1, alpha=-0.5), _ALPHAPO | {"alpha": -0.5}),
}


def ours(
    model: Any,
    loss: LossConfig,
    reference: PairLogps | None,
    cut: list[list[int]] | None = None,
    pairs: list[Pair] = PAIRS,
) -> tuple[LossTerms, dict[str, torch.Tensor]]:
    """One update's terms and gradients, whole or in micro-batches."""
    model.zero_grad(set_to_none=True)
    pair_model, cut = PairModel(model), cut or [list(range(len(pairs)))]
    full = None
    if required_stats(loss).couples_pairs and len(cut) > 1:
        full = pair_model.logps(pairs, required_stats(loss)).with_reference(reference)
    terms = [
        pair_model.backward(
            [pairs[i] for i in part],
            loss,
            None if reference is None else reference.select(part),
            totals_of(pairs),
            torch.Tensor.backward,
            None if full is None else UpdateLogps(full, part),
        )
        for part in cut
    ]
    return LossTerms.concatenate(terms), gradients(model)


def agree(found: dict[str, float], logged: dict[str, float]) -> None:
    names = found.keys() & logged.keys()
    assert {f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")} <= names
    assert {"logps/chosen", "logps/rejected"} <= names
    for name in names:
        assert found[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, PairLogps]:
    """Policy, reference, and the reference's log-probs from ONE pass: they serve every variant."""
    model = tiny_model()
    other = moved(model)
    return model, other, PairModel(other).logps(PAIRS)


@pytest.mark.parametrize("case", DPO)
def test_dpo_and_its_relatives(case: str, models: tuple[Any, Any, PairLogps], tmp_path: Path) -> None:
    model, other, reference = models
    trainer = dpo_trainer(model, other, tmp_path, beta=0.2, **DPO[case])
    loss = DpoLoss.model_validate({"beta": 0.2, **DPO[case]})
    value, right = loss_and_gradients(trainer, dpo_inputs(PAIRS))
    # exp(-log-ratio) magnifies float32's rounding: by processor up to 2.4e-5 between ours and TRL's in one parameter,
    # while each, over all parameters, is within 1e-5 of the same in float64.
    limit = {"forward-kl": 2e-5, "discopop": 3e-5}.get(case, 1e-5)
    for cut in (None, [[0, 1, 2], [3], [4, 5]]):
        terms, found = ours(model, loss, reference if required_stats(loss).reference else None, cut)
        assert float(terms.loss) == pytest.approx(value, rel=1e-5)
        assert together(found, right) < limit
        assert worst(found, right) < limit
        if case != "sft":
            logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
            agree(metric_means(metric_sums(terms)), logged)


@pytest.mark.parametrize("case", CPO)
def test_cpo_simpo_and_alphapo(case: str, models: tuple[Any, Any, PairLogps], tmp_path: Path) -> None:
    loss, options = CPO[case]
    trainer = cpo_trainer(models[0], tmp_path, **options)
    value, right = loss_and_gradients(trainer, cpo_inputs(PAIRS))
    for cut in (None, [[0, 1, 2, 3], [4, 5]]):
        terms, found = ours(models[0], loss, None, cut)
        assert float(terms.loss) == pytest.approx(value, rel=1e-5)
        assert worst(found, right) < 1e-5
    logged = {name: sum(values) / len(values) for name, values in trainer._stored_metrics["train"].items()}
    # TRL reports 0 where the cross-entropy is not part of the loss.
    agree(metric_means(metric_sums(terms)), {k: v for k, v in logged.items() if k != "nll_loss" or v != 0})


def test_orpo(models: tuple[Any, Any, PairLogps], tmp_path: Path) -> None:
    trainer = orpo_trainer(models[0], tmp_path, beta=0.3)
    value, right = loss_and_gradients(trainer, cpo_inputs(PAIRS))
    for cut in (None, [[0, 1, 2], [3], [4, 5]]):
        terms, found = ours(models[0], OrpoLoss(beta=0.3), None, cut)
        assert float(terms.loss) == pytest.approx(value, rel=1e-5)
        assert worst(found, right) < 1e-5
    logged = {name: sum(values) / len(values) for name, values in trainer._stored_metrics["train"].items()}
    # Ours is per chosen token for every objective, TRL's ORPO counts the prompt's tokens too.
    agree(metric_means(metric_sums(terms)), {name: each for name, each in logged.items() if name != "nll_loss"})
    assert {"log_odds_ratio", "log_odds_chosen"} <= logged.keys()


KTO: dict[str, dict[str, Any]] = {
    "kto": {},
    "weighted": {"desirable_weight": 1.4, "undesirable_weight": 0.6},
    "apo-zero": {"loss_type": "apo_zero_unpaired"},
}


@pytest.mark.parametrize("single", [False, True], ids=["pairs", "labels"])
@pytest.mark.parametrize("drifts", [False, True], ids=["kl-0", "kl-above-0"])
@pytest.mark.parametrize("case", KTO)
def test_kto(case: str, drifts: bool, single: bool, models: tuple[Any, Any, PairLogps], tmp_path: Path) -> None:
    """`drifts`: mismatched responses to which the policy gives more than the reference does, else less.

    `single`: rows with one response and a label, of both labels in unequal numbers.
    """
    model, other, reference = models
    mismatched: list[Any] = []
    pairs = single_rows(PAIRS) if single else PAIRS
    reference = PairModel(other).logps(pairs) if single else reference
    for pair in PAIRS:
        candidates = [replace(each, prompt=pair.prompt) for each in PAIRS if each is not pair]
        policy, frozen = PairModel(model).logps(candidates), PairModel(other).logps(candidates)
        gains = (policy.chosen - frozen.chosen) + (policy.rejected - frozen.rejected)
        mismatched.append(candidates[int(gains.argmax() if drifts else gains.argmin())])
    mismatched = single_rows(mismatched) if single else mismatched
    trainer = kto_trainer(model, other, tmp_path, beta=0.2, **KTO[case])
    value, right = loss_and_gradients(trainer, kto_inputs(pairs, mismatched))
    loss = KtoLoss.model_validate({"beta": 0.2, **KTO[case]})
    policy, frozen = PairModel(model).logps(mismatched), PairModel(other).logps(mismatched)
    columns = {"mismatched_chosen": policy.chosen, "mismatched_rejected": policy.rejected}
    start = replace(reference, mismatched_chosen=frozen.chosen, mismatched_rejected=frozen.rejected)
    ready = replace(reference, **columns, reference=start).with_kl().reference
    assert ready is not None
    assert ready.kl is not None
    assert bool((ready.kl > 0).all()) == drifts
    for cut in (None, [[0, 1, 2], [3], [4, 5]]):
        terms, found = ours(model, loss, ready, cut, pairs)
        assert float(terms.loss) == pytest.approx(value, rel=1e-5)
        assert worst(found, right) < 1e-5
    logged = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    metrics = metric_means(metric_sums(terms))
    assert metrics["kl"] == pytest.approx(logged["kl"], rel=1e-5, abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert metrics[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


@dataclass(frozen=True)
class Exact:
    """Summed log-probs of PAIRS in float64, [N] each: policy, then reference; and their token counts."""

    w: torch.Tensor
    l: torch.Tensor  # noqa: E741
    ref_w: torch.Tensor
    ref_l: torch.Tensor
    n_w: torch.Tensor
    n_l: torch.Tensor


def sums_of(model: Any) -> list[torch.Tensor]:
    """Chosen and rejected log-probs, each response computed on its own."""
    sides: list[torch.Tensor] = []
    for side in SIDES:
        found = []
        for pair in PAIRS:
            ids = torch.tensor([*pair.prompt.tolist(), *getattr(pair, side).tolist()])[None]
            scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(scores[len(pair.prompt) - 1 :].sum())
        sides.append(torch.stack(found))
    return sides


def token_nll(x: Exact) -> torch.Tensor:
    return -x.w.sum() / x.n_w.sum()


def sigma(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def dpop(x: Exact) -> torch.Tensor:
    """Pal et al. 2024, eq. 3."""
    penalty = torch.maximum(torch.zeros_like(x.w), x.ref_w - x.w)
    assert (penalty > 0).any()
    assert (penalty == 0).any()
    return -torch.log(sigma(0.2 * ((x.w - x.ref_w) - (x.l - x.ref_l) - 5.0 * penalty))).mean()


def chipo(x: Exact, r_max: float = float("inf")) -> torch.Tensor:
    """Huang et al. 2024, algorithm 1, with phi(z) = z + log z."""
    phi_w, phi_l = (torch.exp(p - ref) + (p - ref) for p, ref in ((x.w, x.ref_w), (x.l, x.ref_l)))
    margin = 0.2 * (phi_w - phi_l)
    assert r_max == float("inf") or (margin.abs() > 2 * r_max).any()
    return -torch.log(sigma(margin.clamp(-2 * r_max, 2 * r_max))).mean()


FORMULAS: dict[str, tuple[LossConfig, Callable[[Exact], torch.Tensor]]] = {
    "simpo-hinge": (
        SimpoLoss(loss_type="hinge", beta=2.0, gamma=1.0),
        lambda x: torch.relu(1 - 2.0 * (x.w / x.n_w - x.l / x.n_l - 0.5)).mean(),
    ),
    "dpop": (DpoLoss(loss_type="dpop", beta=0.2, dpop_lambda=5.0), dpop),
    "dpop-nll": (
        DpoLoss(loss_type="dpop", beta=0.2, dpop_lambda=5.0, nll_scale=0.3),
        lambda x: dpop(x) + 0.3 * token_nll(x),
    ),
    "chipo": (DpoLoss(loss_type="chipo", beta=0.2), chipo),
    "chipo-limited-nll": (
        DpoLoss(loss_type="chipo", beta=0.2, chipo_r_max=0.5, nll_scale=0.3),
        lambda x: chipo(x, 0.5) + 0.3 * token_nll(x),
    ),
    # Park et al. 2024: -log sigma(beta delta + alpha |y_w| - alpha |y_l|).
    "rdpo": (
        DpoLoss(beta=0.2, length_alpha=0.05),
        lambda x: -torch.log(sigma(0.2 * (x.w - x.ref_w - x.l + x.ref_l) + 0.05 * (x.n_w - x.n_l))).mean(),
    ),
    # The authors' preference_loss in rycolab/odpo, trainers.py: -log sigma(beta delta - alpha log(score gap)).
    "odpo": (
        DpoLoss(beta=0.2, odpo_alpha=0.7),
        lambda x: -torch.log(sigma(0.2 * (x.w - x.ref_w - x.l + x.ref_l) - 0.7 * torch.log(GAPS))).mean(),
    ),
    "odpo-identity-nll": (
        DpoLoss(beta=0.2, odpo_alpha=0.7, odpo_scale="identity", nll_scale=0.3),
        lambda x: -torch.log(sigma(0.2 * (x.w - x.ref_w - x.l + x.ref_l) - 0.7 * GAPS)).mean() + 0.3 * token_nll(x),
    ),
    # The authors' simper_trainer.py: losses = -exp(average of chosen) + exp(average of rejected).
    "simper": (SimperLoss(), lambda x: (-torch.exp(x.w / x.n_w) + torch.exp(x.l / x.n_l)).mean()),
    "simper-nll": (
        SimperLoss(nll_scale=0.3),
        lambda x: (-torch.exp(x.w / x.n_w) + torch.exp(x.l / x.n_l)).mean() + 0.3 * token_nll(x),
    ),
}
"""Objectives that TRL lacks: the formula of the paper or of its authors' code, written out in double precision."""


@pytest.mark.parametrize("case", FORMULAS)
def test_what_trl_lacks_against_its_formula_in_float64(case: str, models: tuple[Any, Any, PairLogps]) -> None:
    model, _, reference = models
    loss, formula = FORMULAS[case]
    reference = replace(reference, score_gap=GAPS)
    exact, counts = tiny_model().double(), [torch.tensor([len(getattr(p, s)) for p in PAIRS]) for s in SIDES]
    with torch.no_grad():
        frozen = sums_of(moved(tiny_model()).double())
    value = formula(Exact(*sums_of(exact), *frozen, *counts))
    exact.zero_grad(set_to_none=True)
    value.backward()
    right = {name: grad.float() for name, grad in gradients(exact).items()}
    for cut in (None, [[0, 1], [2, 3, 4, 5]], [[5], [3, 0], [1, 2, 4]]):
        terms, found = ours(model, loss, reference if required_stats(loss).reference else None, cut)
        assert float(terms.loss) == pytest.approx(float(value.detach()), rel=1e-5)
        assert worst(found, right) < 1e-5


def test_coupled_pairs_in_parts_need_the_whole_update(models: tuple[Any, Any, PairLogps]) -> None:
    model, _, reference = models
    part = [0, 1]
    with pytest.raises(ValueError, match="couples the pairs of an update, but 2 of 6"):
        PairModel(model).backward(
            [PAIRS[i] for i in part],
            DpoLoss(loss_type="aot"),
            reference.select(part),
            totals_of(PAIRS),
            torch.Tensor.backward,
        )


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
        terms = pair_model.backward(pairs, loss, reference, totals_of(pairs), torch.Tensor.backward)
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
