"""Published settings of preference tuning by objective, model size and adapters, each with its source.

Read by `init` (a first file), `advise` and `plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

LossName = Literal["simpo", "dpo", "orpo", "cpo", "simper", "kto"]
LOSS_NAMES: tuple[LossName, ...] = get_args(LossName)
SMALL, TINY = 300e6, 20e6
"""Parameters. Below SMALL no settings are published; below TINY the quickstart's settings are the closest."""
LARGEST_BATCH = {False: 128, True: 32}
"""Pairs per update: of SimPO's setups; of adapters and small models, the bound in TRL's guide "LoRA Without Regret"."""
FEWEST_UPDATES = 30
"""Below this the warm-up of a tenth has fewer than three updates and an evaluation follows every third one."""
MOST_EPOCHS = 3
WEIGHT_RATIO = (1.0, 1.5)
"""Of the summed weights of desirable to those of undesirable responses: the KTO paper's; TRL's guide ends at 4/3."""
_ADAPTER_FACTOR = 10
_LARGEST_RATE = 5e-3
"""Largest learning rate of adapters."""

SIMPO = "SimPO, arXiv 2405.14734, and its README"
DPO = "DPO, arXiv 2305.18290"
ORPO = "ORPO, arXiv 2403.07691"
CPO = "CPO, arXiv 2401.08417"
SIMPER = "SimPER, arXiv 2502.00883"
KTO = "KTO, arXiv 2402.01306"
KTO_GUIDE = "TRL's guide to KTOTrainer"
R_DPO = "R-DPO, arXiv 2403.19159"
TULU = "Tulu 3, arXiv 2411.15124"
LORA = '"LoRA Without Regret" (Schulman et al. 2025, thinkingmachines.ai/blog/lora)'
_GUIDE = "a public guide without a paper"
_FAIRSEQ2 = "fairseq2's guide"


@dataclass(frozen=True, slots=True)
class PublishedRates:
    """Learning rates to search, why these, and where they come from."""

    rates: tuple[float, ...]
    reason: str
    sources: tuple[str, ...]

    @property
    def middle(self) -> float:
        """The middle rate, the lower of two."""
        return self.rates[(len(self.rates) - 1) // 2]


SEARCHED: dict[LossName, tuple[tuple[str, str, str, str], ...]] = {
    "simpo": (
        ("loss.beta", "2.0", "[2.0, 2.5, 10.0]", "the SimPO paper; 10 is its authors' later advice"),
        ("loss.gamma_beta_ratio", "0.5", "[0.3, 0.5]", "gamma / beta; the SimPO authors start with 0.5"),
    ),
    "dpo": (("loss.beta", "0.05", "[0.01, 0.05, 0.1]", "0.01 is the best for every model in SimPO's README"),),
    "orpo": (("loss.beta", "0.1", "[0.1, 0.2]", "the ORPO paper's lambda, fairseq2's guide"),),
    "cpo": (
        ("loss.beta", "0.1", "[0.1, 1.0]", "the CPO paper, fairseq2's default"),
        ("loss.nll_scale", "1.0", "[0.0, 1.0]", "fairseq2's guide, the CPO paper"),
    ),
    "simper": (),
    "kto": (("loss.beta", "0.1", "[0.03, 0.1, 0.3]", "the KTO paper: 0.1 in most cases, 0.01 to 0.5 in all"),),
}
"""Each searched setting: its value in `base`, its values in the search, and their source."""


def learning_rates(loss: LossName, parameters: float | None, *, lora: bool) -> PublishedRates:
    """Return the learning rates to search.

    Args:
        loss: the objective.
        parameters: of the model; None where unknown, then those of 7 to 9 billion.
        lora: whether adapters are trained, whose rates are ten times those of all weights.
    """
    found = _orpo_rates(parameters) if loss == "orpo" else _rates(loss, parameters)
    if loss == "kto" and (parameters is None or SMALL <= parameters < 10e9):
        reason = "TRL's guide: 5e-7 to 5e-6 whatever the data; 5e-6 is where the KTO paper starts, 1e-6 TRL's default"
        found = PublishedRates((5e-7, 1e-6, 5e-6), reason, (KTO, KTO_GUIDE))
    if not lora:
        return found
    rates = tuple(dict.fromkeys(min(_short(_ADAPTER_FACTOR * rate), _LARGEST_RATE) for rate in found.rates))
    reason = f"ten times those of all weights, as in TRL's dpo script: {found.reason}"
    return PublishedRates(rates, reason, (LORA, *found.sources))


def _rates(loss: LossName, parameters: float | None) -> PublishedRates:
    if parameters is None or 5e9 <= parameters < 10e9:
        match loss:
            case "simpo":
                reason = "the SimPO authors' README, 7 to 9 billion parameters"
                return PublishedRates((3e-7, 5e-7, 8e-7, 1e-6), reason, (SIMPO,))
            case "simper":
                reason = "the SimPER authors' four setups, 7 to 8 billion parameters"
                return PublishedRates((3e-7, 5e-7, 6e-7, 1e-6), reason, (SIMPER,))
            case "dpo":
                reason = "the best of SimPO's README, 7 to 9 billion parameters"
                return PublishedRates((3e-7, 5e-7, 7e-7), reason, (SIMPO, DPO))
            case _:
                reason = "SimPO's README and fairseq2's guide, 7 to 9 billion parameters"
                return PublishedRates((5e-7, 1e-6), reason, (SIMPO, _FAIRSEQ2))
    if parameters >= 40e9:
        reason = "a public guide's for 70 billion parameters; 2e-7 is Tulu 3's"
        return PublishedRates((5e-8, 1e-7, 2e-7), reason, (_GUIDE, TULU))
    if parameters >= 10e9:
        reason = "a public guide's 1e-7 to 3e-7 for 13 to 30 billion parameters"
        return PublishedRates((1e-7, 2e-7, 3e-7, 5e-7), reason, (_GUIDE,))
    if parameters >= SMALL:
        reason = "a public guide's 5e-7 to 1e-6 for 1 to 3 billion parameters"
        return PublishedRates((5e-7, 7e-7, 1e-6), reason, (_GUIDE,))
    return _small_rates(parameters)


def _orpo_rates(parameters: float | None) -> PublishedRates:
    if parameters is None or 5e9 <= parameters < 10e9:
        return PublishedRates((5e-6, 8e-6), "the ORPO paper, fairseq2's guide", (ORPO, _FAIRSEQ2))
    if parameters >= 10e9:
        reason = "below the ORPO paper's 5e-6, as for larger models in general; nothing is published"
        return PublishedRates((1e-6, 3e-6, 5e-6), reason, (ORPO,))
    if parameters >= SMALL:
        reason = "the ORPO paper's and fairseq2's for larger models"
        return PublishedRates((5e-6, 8e-6), reason, (ORPO, _FAIRSEQ2))
    return _small_rates(parameters)


def _small_rates(parameters: float) -> PublishedRates:
    if parameters >= TINY:
        reason = "wide: nothing is published between 1 billion parameters and tiny models"
        return PublishedRates((1e-6, 1e-5, 1e-4), reason, ())
    reason = "sweeps/quickstart.yaml, a million parameters: 3e-4 and 1e-3"
    return PublishedRates((1e-4, 3e-4, 1e-3), reason, ())


def _short(rate: float) -> float:
    """Return the rate without the last bits of a product."""
    return float(f"{rate:.3g}")


def rate_text(rate: float) -> str:
    """Format a learning rate as 3e-7."""
    digits, _, power = f"{rate:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}"
