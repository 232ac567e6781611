"""What other programs call the parameters of a loss, and what each of those names means here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

_REFERENCE = "does not exist; without a reference the objective is loss.kind cpo, or simpo"
_MARGIN = "belongs to SimPO: loss.kind simpo with gamma, or gamma_beta_ratio for gamma / beta"
_LAMBDA = "belongs to ORPO: loss.kind orpo, where it is called beta"
_MIXTURE = "belongs to DPO: loss.kind dpo with a list in loss_type"
_LD = "belongs to DPO: loss.kind dpo with ld_alpha (LD-DPO)"
_ALPHA = "is AlphaPO's: loss.kind simpo with alpha"

OLD_NAMES: Mapping[str, Mapping[str, str]] = {
    "simpo": {
        "simpo_gamma": "is called gamma here (absolute, as in TRL), or gamma_beta_ratio for gamma / beta",
        "cpo_alpha": "is called sft_weight here, 0 unless given (TRL's default of 1.0 makes it another objective)",
        "rpo_alpha": "is called sft_weight here: the weight of the cross-entropy on the chosen responses",
        "reference_free": "is always so: SimPO has no reference; remove it",
        "lambda": "is no parameter of SimPO: the strength of the preference is beta, the cross-entropy's sft_weight",
        "orpo_lambda": _LAMBDA,
        "loss_weights": _MIXTURE,
        "ld_alpha": _LD,
    },
    "dpo": {
        "rpo_alpha": "is written nll_scale here (or loss_type [sigmoid, sft] with loss_weights [1, rpo_alpha])",
        "sft_weight": "is SimPO's name of nll_scale; write nll_scale",
        "cpo_alpha": "belongs to CPO: loss.kind cpo with nll_scale",
        "reference_free": _REFERENCE,
        "simpo_gamma": _MARGIN,
        "gamma": _MARGIN,
        "gamma_beta_ratio": _MARGIN,
        "lambda": "is not a parameter of DPO; the strength of the preference is beta",
        "orpo_lambda": _LAMBDA,
        "alpha": _ALPHA,
    },
    "cpo": {
        "cpo_alpha": "is called nll_scale here; its default is 1, as in the paper",
        "rpo_alpha": "is called nll_scale here; its default is 1, as in CPO's paper",
        "sft_weight": "is SimPO's name of nll_scale; write nll_scale",
        "lambda": "the weight of the cross-entropy is called nll_scale here",
        "orpo_lambda": _LAMBDA,
        "reference_free": "is always so: CPO has no reference; remove it",
        "simpo_gamma": _MARGIN,
        "gamma": _MARGIN,
        "gamma_beta_ratio": _MARGIN,
        "alpha": "AlphaPO's alpha is offered with loss.kind simpo",
        "loss_weights": _MIXTURE,
        "ld_alpha": _LD,
    },
    "orpo": {
        "lambda": "is called beta here, as in TRL",
        "orpo_lambda": "is called beta here, as in TRL (fairseq2 stored its orpo_lambda and never used it)",
        "alpha": "is called beta here",
        "cpo_alpha": "is called nll_scale here: the weight of the cross-entropy",
        "rpo_alpha": "is called nll_scale here: the weight of the cross-entropy",
        "sft_weight": "is SimPO's name of nll_scale; write nll_scale",
        "reference_free": "is always so: ORPO has no reference; remove it",
        "simpo_gamma": _MARGIN,
        "gamma": _MARGIN,
        "gamma_beta_ratio": _MARGIN,
    },
}
"""Kind of loss -> a name that is none of its parameters -> what to write instead, and why."""


def explained(kind: str, error: ValidationError) -> ValidationError:
    """The same error, with what it is called here in the place of `unknown key`; every other mistake stays in it."""
    return ValidationError.from_exception_data(error.title, [_explained(kind, item) for item in error.errors()])


def meaning_of(name: str, kind: str) -> str:
    """What to write for this name with this kind of loss; empty where it is no name of another program's."""
    said = OLD_NAMES.get(kind, {}).get(name)
    return f"{name} {said}" if said else ""


def _explained(kind: str, item: Any) -> InitErrorDetails:
    last = str(item["loc"][-1]) if item["loc"] else ""
    known = item["type"] == "extra_forbidden" and last in OLD_NAMES.get(kind, {})
    # As a value of the template: a sentence may hold braces.
    told = PydanticCustomError("old_name", "{said}", {"said": OLD_NAMES[kind][last]}) if known else item["type"]
    return InitErrorDetails(type=told, loc=item["loc"], input=item["input"], ctx=item.get("ctx", {}))
