"""Names that other libraries use for a loss parameter, and what to write instead: `PARAMETER_ALIASES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

_REFERENCE = "is not supported; for an objective without reference use loss.kind cpo or simpo"
_MARGIN = "belongs to SimPO: write loss: {kind: simpo, gamma_beta_ratio: RATIO}, or leave it out of other kinds"
_LAMBDA = "belongs to ORPO: loss.kind orpo, where it is called beta"
_MIXTURE = "belongs to DPO: loss.kind dpo with a list in loss_type"
_LD = "belongs to DPO: loss.kind dpo with ld_alpha (LD-DPO)"
_TRUST_REGION = dict.fromkeys(
    ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "belongs to TR-DPO: loss.kind dpo with sync_ref_model",
)
_KTO = dict.fromkeys(("desirable_weight", "undesirable_weight"), "belongs to KTO: loss.kind kto")
_ODPO = dict.fromkeys(("odpo_alpha", "odpo_scale"), "belongs to ODPO: loss.kind dpo with odpo_alpha")
_ALPHA = "is AlphaPO's: loss.kind simpo with alpha"

PARAMETER_ALIASES: Mapping[str, Mapping[str, str]] = {
    "simpo": {
        "simpo_gamma": "is called gamma here (absolute, as in TRL), or gamma_beta_ratio for gamma / beta",
        "cpo_alpha": "is called sft_weight here, 0 unless given (TRL's default of 1.0 makes it another objective)",
        "rpo_alpha": "is called sft_weight here, the weight of the cross-entropy on the chosen responses",
        "reference_free": "is always so: SimPO has no reference; remove it",
        "lambda": "is no parameter of SimPO: the strength of the preference is beta, the cross-entropy's sft_weight",
        "orpo_lambda": _LAMBDA,
        "loss_weights": _MIXTURE,
        "ld_alpha": _LD,
        **_TRUST_REGION,
        **_ODPO,
        **_KTO,
    },
    "dpo": {
        **_KTO,
        "rpo_alpha": "is written nll_scale here (or loss_type [sigmoid, sft] with loss_weights [1, rpo_alpha])",
        "sft_weight": "is SimPO's name of nll_scale; write nll_scale",
        "cpo_alpha": "belongs to CPO: loss.kind cpo with nll_scale",
        "reference_free": _REFERENCE,
        "simpo_gamma": _MARGIN,
        "gamma": _MARGIN,
        "gamma_beta_ratio": _MARGIN,
        "lambda": "is not a parameter of DPO; the strength of the preference is beta, DPOP's lambda dpop_lambda",
        "orpo_lambda": _LAMBDA,
        "alpha": f"{_ALPHA}; R-DPO's is called length_alpha here, ODPO's odpo_alpha, TR-DPO's ref_model_mixup_alpha",
        "tau": "of TR-DPO is called ref_model_sync_steps here, of discopop discopop_tau",
        **dict.fromkeys(("offset", "offset_alpha"), "is called odpo_alpha here (ODPO), the weight of the offset"),
        **dict.fromkeys(("rdpo_alpha", "lenN_lambda", "length_penalty"), "is called length_alpha here (R-DPO)"),
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
        **_TRUST_REGION,
        **_ODPO,
        **_KTO,
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
        **_TRUST_REGION,
        **_ODPO,
        **_KTO,
    },
    "simper": {
        "sft_weight": "is SimPO's name of nll_scale; write nll_scale",
        "reference_free": "is always so: SimPER has no reference; remove it",
        **dict.fromkeys(
            ("beta", "gamma", "gamma_beta_ratio", "simpo_gamma", "label_smoothing", "loss_type", "lambda", "alpha"),
            "is no parameter of SimPER, which has none but nll_scale; remove it",
        ),
        **_KTO,
    },
    "kto": {
        "sft_weight": "is SimPO's name of nll_scale; write nll_scale",
        "rpo_alpha": "is called nll_scale here: the weight of the cross-entropy",
        "cpo_alpha": "is called nll_scale here: the weight of the cross-entropy",
        "lambda_d": "is called desirable_weight here, as in TRL",
        "lambda_u": "is called undesirable_weight here, as in TRL",
        "reference_free": _REFERENCE,
        "simpo_gamma": _MARGIN,
        "gamma": _MARGIN,
        "gamma_beta_ratio": _MARGIN,
        "loss_weights": _MIXTURE,
        "ld_alpha": _LD,
        **_TRUST_REGION,
        **_ODPO,
    },
}
"""Kind of loss -> a name that is not one of its parameters -> what to write instead, and why."""


def with_alias_hints(kind: str, error: ValidationError) -> ValidationError:
    """Return the error with a hint in place of `unknown key` for known aliases; other errors stay unchanged."""
    return ValidationError.from_exception_data(error.title, [_with_alias_hint(kind, item) for item in error.errors()])


def alias_hint(name: str, kind: str) -> str:
    """Return what to write instead of this alias for this kind of loss; "" if it is not a known alias."""
    hint = PARAMETER_ALIASES.get(kind, {}).get(name)
    return f"{name} {hint}" if hint else ""


def _with_alias_hint(kind: str, item: Any) -> InitErrorDetails:
    last = str(item["loc"][-1]) if item["loc"] else ""
    is_alias = item["type"] == "extra_forbidden" and last in PARAMETER_ALIASES.get(kind, {})
    # As a value of the template, because the hint may contain braces.
    kind_or_error = (
        PydanticCustomError("old_name", "{hint}", {"hint": PARAMETER_ALIASES[kind][last]}) if is_alias else item["type"]
    )
    return InitErrorDetails(type=kind_or_error, loc=item["loc"], input=item["input"], ctx=item.get("ctx", {}))
