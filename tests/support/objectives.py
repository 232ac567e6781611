"""One example of every objective, and random pairs of log-probs to try them on."""

from typing import Any, get_args

import torch

from trainer.config.loss_config import (
    CpoLoss,
    DpoLoss,
    DpoLossType,
    KtoLoss,
    LossConfig,
    OrpoLoss,
    SftLoss,
    SimperLoss,
    SimpoLoss,
)
from trainer.objectives.losses import pair_loss
from trainer.objectives.pair_logps import LossTerms, PairLogps, UpdateTotals

_TERMS: dict[str, dict[str, Any]] = {term: {} for term in get_args(DpoLossType)} | {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 1e-3},
    "aot": {"label_smoothing": 0.05},
}
OBJECTIVES: dict[str, LossConfig] = {
    "simpo": SimpoLoss(beta=2.0, gamma=1.0),
    "simpo-smoothed": SimpoLoss(beta=2.5, gamma_beta_ratio=0.4, label_smoothing=0.1),
    "simpo-sft": SimpoLoss(beta=2.0, gamma=0.5, sft_weight=0.3),
    "simpo-hinge": SimpoLoss(loss_type="hinge", beta=2.0, gamma=1.0),
    "alphapo": SimpoLoss(beta=2.5, gamma=0.1, alpha=0.25),
    **{f"dpo-{term}": DpoLoss.model_validate({"loss_type": term, **options}) for term, options in _TERMS.items()},
    "dpo-mixture": DpoLoss(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
    "dpo-nll": DpoLoss(nll_scale=0.2),
    "dpo-forward-kl": DpoLoss(f_divergence_type="forward_kl"),
    "dpo-js": DpoLoss(f_divergence_type="js_divergence", loss_type=("hinge", "sigmoid_norm")),
    "dpo-alpha": DpoLoss(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
    "dpo-alpha-one": DpoLoss(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    "dpo-ld": DpoLoss(ld_alpha=0.5),
    "dpo-chipo-limited": DpoLoss(loss_type="chipo", beta=0.05, chipo_r_max=1.0),
    "dpo-length": DpoLoss(length_alpha=0.05),
    "dpo-offset": DpoLoss(odpo_alpha=0.5),
    "dpo-offset-identity": DpoLoss(odpo_alpha=0.5, odpo_scale="identity"),
    "dpo-moving": DpoLoss(sync_ref_model=True, ref_model_sync_steps=2),
    "dpo-wpo": DpoLoss(use_weighting=True),
    "cpo": CpoLoss(),
    "cpo-smoothed": CpoLoss(label_smoothing=0.2, nll_scale=0.0),
    "cpo-hinge": CpoLoss(loss_type="hinge"),
    "cpo-ipo": CpoLoss(loss_type="ipo", nll_scale=0.5),
    "orpo": OrpoLoss(),
    "orpo-response": OrpoLoss(beta=0.3, nll_scale=0.5, nll_prompt=False),
    "simper": SimperLoss(),
    "simper-nll": SimperLoss(nll_scale=0.2),
    "kto": KtoLoss(),
    "kto-weighted": KtoLoss(desirable_weight=1.5, undesirable_weight=0.5, nll_scale=0.2),
    "kto-apo-zero": KtoLoss(loss_type="apo_zero_unpaired"),
    "sft": SftLoss(),
}


def test_every_class_of_the_union_has_an_example() -> None:
    assert {type(loss) for loss in OBJECTIVES.values()} == set(get_args(get_args(LossConfig)[0]))


def pair_logps(
    chosen: list[float],
    rejected: list[float],
    chosen_tokens: list[int],
    rejected_tokens: list[int],
    reference: tuple[list[float], list[float]] | None = None,
) -> PairLogps:
    """From summed log-probs and counts."""

    def made(w: list[float], r: list[float]) -> dict[str, Any]:
        return {
            "chosen": torch.tensor(w, dtype=torch.float64),
            "rejected": torch.tensor(r, dtype=torch.float64),
            "chosen_tokens": torch.tensor(chosen_tokens),
            "rejected_tokens": torch.tensor(rejected_tokens),
        }

    frozen = None if reference is None else PairLogps(**made(*reference))
    return PairLogps(**made(chosen, rejected), reference=frozen)


def random_logps(pairs: int = 5, seed: int = 0, per_token: float = 1.0) -> PairLogps:
    """Plausible statistics with everything that any objective reads, reference included."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(pairs, generator=generator, dtype=torch.float64)

    w, r, p = (torch.randint(2, 30, (pairs,), generator=generator) for _ in range(3))
    shared = torch.minimum(w, r)

    def sums(drift: float) -> dict[str, Any]:
        found: dict[str, torch.Tensor] = {"chosen_tokens": w, "rejected_tokens": r, "prompt_tokens": p}
        for name, tokens in (("chosen", w), ("rejected", r)):
            rate = -per_token * uniform(0.2, 2.0) + drift * uniform(-0.2, 0.2)
            found[name] = rate * tokens
            found[f"{name}_shared"] = rate * shared * uniform(0.9, 1.0)
            found[f"{name}_collision_logp"] = -uniform(0.1, 1.0) * tokens
        found["prompt"] = -per_token * uniform(0.2, 2.0) * p
        return found

    policy, frozen = sums(0.0), sums(1.0)
    gaps, kl = uniform(0.1, 3.0), torch.full((pairs,), 0.7, dtype=torch.float64)
    return PairLogps(**policy, reference=PairLogps(**frozen, score_gap=gaps, kl=kl))


def update_totals(logps: PairLogps) -> UpdateTotals:
    prompts = 0 if logps.prompt_tokens is None else int(logps.prompt_tokens.sum())
    return UpdateTotals(len(logps), int(logps.chosen_tokens.sum()), prompts)


def evaluate(loss: LossConfig, logps: PairLogps) -> LossTerms:
    """The objective with these pairs as a whole update."""
    return pair_loss(loss, logps, update_totals(logps))
