"""Objectives of a trial: one configuration class each, and their union. Formulas: trainer/objectives/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from trainer.config.base import Fraction, FrozenModel, NonNegativeFloat, PositiveFloat, PositiveInt
from trainer.config.loss_aliases import with_alias_hints

Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]
"""Probability that a label is wrong. At 0.5 the preference vanishes, above it is reversed."""


class BaseLoss(FrozenModel):
    """Base class of all objectives."""

    @model_validator(mode="wrap")
    @classmethod
    def _explain_aliases(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Explain names of other libraries at the position of the key."""
        try:
            return handler(value)
        except ValidationError as error:
            raise with_alias_hints(str(cls.model_fields["kind"].default), error) from None

    @property
    def couples_pairs(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its update."""
        return False

    @property
    def needs_scores(self) -> bool:
        """Whether the loss reads the scores of the rows."""
        return False

    @property
    def moves_reference(self) -> bool:
        """Whether the reference model changes during training, so that cached log-probs do not serve."""
        return False

    @property
    def scores_mismatched(self) -> bool:
        """Whether responses are also scored after the prompts of other pairs (KTO's estimate of the KL divergence)."""
        return False


class SimpoLoss(BaseLoss):
    """SimPO (Meng et al. 2024, eq. 6), with AlphaPO's alpha (Gupta et al. 2025) and an SFT term.

    gamma is absolute, gamma_beta_ratio is gamma/beta; give one of the two.
    """

    kind: Literal["simpo"] = "simpo"
    loss_type: Literal["sigmoid", "hinge"] = Field(
        default="sigmoid", description="Shape of the loss of a reward margin."
    )
    beta: PositiveFloat = Field(default=2.0, description="Scale of the length-averaged log-probs.")
    gamma: NonNegativeFloat | None = Field(default=None, description="Target reward margin, absolute.")
    gamma_beta_ratio: NonNegativeFloat | None = Field(
        default=None, description="Target reward margin divided by beta; 0.25 where neither is given."
    )
    label_smoothing: Smoothing = Field(default=0.0, description="Share of labels taken to be wrong.")
    alpha: float = Field(default=0.0, description="AlphaPO: reward (1 - p^-alpha) / alpha; 0 is SimPO's log p.")
    sft_weight: NonNegativeFloat = Field(default=0.0, description="Weight of the cross-entropy per chosen token.")
    nll_scale: NonNegativeFloat = Field(
        default=0.0, description="Another name of sft_weight, common to all objectives."
    )

    @field_validator("loss_type", mode="before")
    @classmethod
    def _no_simper(cls, value: Any) -> Any:
        if str(value).lower() == "simper":
            raise ValueError("SimPER is not a loss type of SimPO here: write loss.kind simper")
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError(
                "gamma and gamma_beta_ratio are one setting (gamma = gamma_beta_ratio * beta); give one of them"
            )
        if self.loss_type == "hinge" and self.label_smoothing > 0:
            raise ValueError("label_smoothing is not used by loss_type hinge; remove it or use sigmoid")
        if self.sft_weight > 0 and self.nll_scale > 0:
            raise ValueError("sft_weight and nll_scale are two names of one weight; give one of them")
        return self

    @property
    def gamma_over_beta(self) -> float:
        """gamma / beta; 0.25 (default of the authors' code) if neither gamma nor the ratio is set."""
        if self.gamma is not None:
            return self.gamma / self.beta
        return 0.25 if self.gamma_beta_ratio is None else self.gamma_beta_ratio

    @property
    def gamma_value(self) -> float:
        """The target reward margin gamma in absolute terms."""
        return self.gamma_over_beta * self.beta if self.gamma is None else self.gamma

    @property
    def cross_entropy_weight(self) -> float:
        """The cross-entropy weight, set as sft_weight or as nll_scale."""
        return self.sft_weight or self.nll_scale


DpoLossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "dpop",
    "chipo",
    "sft",
]
OWN_TERMS = frozenset[DpoLossType]({"dpop", "chipo"})
"""Terms that TRL's DPOTrainer 1.16 lacks."""
SMOOTHED_TERMS = frozenset[DpoLossType]({"robust", "exo_pair", "aot", "aot_unpaired"})
"""Terms that use label_smoothing. TRL silently ignores it for the other terms."""
SORTED_TERMS = frozenset[DpoLossType]({"aot", "aot_unpaired"})
F_DIVERGENCE_TERMS = frozenset[DpoLossType](
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"}
)
"""Terms of a score difference, in which the f-divergence's unknown constant cancels."""
LENGTH_TERMS = frozenset[DpoLossType]({"sigmoid", "hinge", "robust", "exo_pair", "discopop", "dpop"})
"""Terms of a difference of rewards that are sums over tokens, to which R-DPO's length term is added."""
OFFSET_TERMS = frozenset[DpoLossType]({"sigmoid"})
"""Terms from whose difference of rewards ODPO's offset is subtracted."""
_SETTINGS_OF_A_TERM: Mapping[str, DpoLossType] = {
    "discopop_tau": "discopop",
    "dpop_lambda": "dpop",
    "chipo_r_max": "chipo",
}
"""Setting -> the only term that uses it."""


class DpoLoss(BaseLoss):
    """DPO and related losses relative to a reference, the initial model: one term, or a weighted sum of several.

    Names, defaults and formulas are those of TRL's DPOTrainer 1.16; of dpop (Pal et al. 2024),
    chipo (Huang et al. 2024), length_alpha (R-DPO, Park et al. 2024) and odpo_alpha (ODPO, Amini et al. 2024) those of
    their papers.
    """

    kind: Literal["dpo"] = "dpo"
    loss_type: DpoLossType | tuple[DpoLossType, ...] = Field(
        default="sigmoid", description="One of TRL's loss types, dpop or chipo, or a list of them to add up."
    )
    loss_weights: tuple[PositiveFloat, ...] | None = Field(
        default=None, description="One per loss_type; all 1 if absent."
    )
    beta: PositiveFloat = Field(default=0.1, description="Strength of the pull towards the reference model.")
    label_smoothing: Smoothing = Field(
        default=0.0, description="Share of labels taken to be wrong; read by robust, exo_pair, aot and aot_unpaired."
    )
    nll_scale: NonNegativeFloat = Field(default=0.0, description="Weight of the cross-entropy per chosen token.")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="Divergence from the reference model (f-DPO)."
    )
    f_alpha_divergence_coef: float = Field(default=0.5, description="alpha of alpha_divergence.")
    ld_alpha: Fraction | None = Field(default=None, description="LD-DPO: weight of tokens beyond the shorter response.")
    length_alpha: NonNegativeFloat = Field(
        default=0.0, description="R-DPO: alpha, the price of a token of length in units of reward; 0 is DPO."
    )
    odpo_alpha: NonNegativeFloat = Field(
        default=0.0,
        description="ODPO: weight of the offset by the gap of a pair's scores, score_chosen - score_rejected in the "
        "rows; 0 is DPO, which reads no scores.",
    )
    odpo_scale: Literal["log", "identity"] = Field(
        default="log",
        description="ODPO: the offset is odpo_alpha times log(gap), as in the paper, or times the gap itself.",
    )
    use_weighting: bool = Field(default=False, description="WPO: weight pairs by their likelihood under the policy.")
    discopop_tau: PositiveFloat = Field(default=0.05, description="Temperature of discopop.")
    dpop_lambda: NonNegativeFloat = Field(
        default=50.0, description="DPOP: weight of a chosen response's fall below the reference; 0 is DPO."
    )

    chipo_r_max: PositiveFloat | None = Field(
        default=None,
        description="chi-PO: R_max; a pair with a margin beyond 2 R_max has no gradient.",
    )
    sync_ref_model: bool = Field(
        default=False,
        description="TR-DPO: move the reference model towards the policy during training; it is then computed in every "
        "update, with weights of its own.",
    )
    ref_model_mixup_alpha: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.6, description="TR-DPO: share of the policy in the new reference; 1 replaces it (hard update)."
    )
    ref_model_sync_steps: PositiveInt = Field(
        default=512, description="TR-DPO: updates between two moves of the reference (tau)."
    )

    @field_validator("loss_type", mode="before")
    @classmethod
    def _check_loss_types(cls, value: Any) -> Any:
        loss_types = cast(list[Any], list(value)) if isinstance(value, (list, tuple)) else [value]
        if "aot_pair" in loss_types:
            raise ValueError("aot_pair was renamed: write aot_unpaired (aot is the paired one and always was)")
        if "kto_pair" in loss_types:
            raise ValueError("kto_pair was removed from TRL: write loss.kind kto; bco_pair and apo_zero are similar")
        if named := next((each for each in ("simpo", "simper", "kto") if each in loss_types), None):
            raise ValueError(f"{named} is not a DPO loss type: write loss.kind {named}")
        if len(loss_types) > 1 and (unknown := [each for each in loss_types if each not in get_args(DpoLossType)]):
            named = ", ".join(map(str, unknown))
            raise ValueError(f"no loss type: {named}; it must be some of {', '.join(get_args(DpoLossType))}")
        return loss_types[0] if len(loss_types) == 1 else value

    @property
    def terms(self) -> tuple[tuple[DpoLossType, float], ...]:
        """Each loss type with its weight."""
        types = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        return tuple(zip(types, self.loss_weights or (1.0,) * len(types), strict=True))

    @property
    def couples_pairs(self) -> bool:
        """Whether pairs of an update are coupled: AOT sorts over them."""
        return any(term in SORTED_TERMS for term, _ in self.terms)

    @property
    def needs_scores(self) -> bool:
        """Whether ODPO's offset is used."""
        return self.odpo_alpha > 0

    @property
    def moves_reference(self) -> bool:
        """Whether TR-DPO moves the reference model."""
        return self.sync_ref_model

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        types = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        named = ", ".join(types)
        if not types:
            raise ValueError("loss_type is empty; name at least one loss")
        if len(set(types)) < len(types):
            raise ValueError(f"loss_type: {named} has a loss twice; name it once and set its weight in loss_weights")
        if self.loss_weights is not None and len(self.loss_weights) != len(types):
            raise ValueError(
                f"loss_weights: {len(self.loss_weights)} for {len(types)} loss types ({named}); give one for each"
            )
        used = set(types)
        if "exo_pair" in used and self.label_smoothing == 0:
            raise ValueError(
                "exo_pair: label_smoothing must be above 0, as its logarithm is taken; the paper uses 0.001"
            )
        if self.label_smoothing > 0 and not used & SMOOTHED_TERMS:
            instead = "use robust, which models noisy labels" if "sigmoid" in used else "remove it"
            raise ValueError(f"label_smoothing is not used by {named}; {instead}")
        if self.f_divergence_type != "reverse_kl" and not (
            used <= F_DIVERGENCE_TERMS | {"sft"} and used & F_DIVERGENCE_TERMS
        ):
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type} is not used by {named}: "
                f"only with {', '.join(sorted(F_DIVERGENCE_TERMS))}"
            )
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError("f_alpha_divergence_coef is used only with f_divergence_type alpha_divergence")
        for setting, term in _SETTINGS_OF_A_TERM.items():
            if getattr(self, setting) != type(self).model_fields[setting].default and term not in used:
                raise ValueError(f"{setting} is not used by {named}")
        if self.use_weighting and used & (SORTED_TERMS | {"sft"}):
            raise ValueError(
                f"use_weighting weights single pairs, which {named} does not have; for an SFT term use nll_scale"
            )
        if self.length_alpha > 0 and not (used <= LENGTH_TERMS | {"sft"} and used & LENGTH_TERMS):
            raise ValueError(f"length_alpha is not used by {named}: only with {', '.join(sorted(LENGTH_TERMS))}")
        if self.odpo_alpha > 0 and not (used <= OFFSET_TERMS | {"sft"} and used & OFFSET_TERMS):
            raise ValueError(f"odpo_alpha is not used by {named}: only with {', '.join(sorted(OFFSET_TERMS))}")
        if self.odpo_alpha == 0 and self.odpo_scale != "log":
            raise ValueError("odpo_scale is used only with odpo_alpha above 0")
        if self.sync_ref_model and used == {"sft"}:
            raise ValueError("sync_ref_model is not used by sft, which has no reference")
        for setting in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if not self.sync_ref_model and getattr(self, setting) != type(self).model_fields[setting].default:
                raise ValueError(f"{setting} is used only with sync_ref_model: true")
        if used == {"sft"} and self.ld_alpha is not None:
            raise ValueError("ld_alpha is not used by sft")
        if "sft" in used and self.nll_scale > 0:
            raise ValueError("sft in loss_type and nll_scale are the same term; give one of them")
        return self


class CpoLoss(BaseLoss):
    """CPO (Xu et al. 2024, eq. 3): DPO without a reference, on summed log-probs, plus cross-entropy."""

    kind: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field(
        default="sigmoid", description="Shape of the loss of a margin of summed log-probs."
    )
    beta: PositiveFloat = Field(default=0.1, description="Scale of the margin.")
    label_smoothing: Smoothing = Field(default=0.0, description="Share of labels taken to be wrong; read by sigmoid.")
    nll_scale: NonNegativeFloat = Field(default=1.0, description="Weight of the cross-entropy per chosen token.")

    @field_validator("loss_type", mode="before")
    @classmethod
    def _no_simpo(cls, value: Any) -> Any:
        if value in ("simpo", "alphapo"):
            raise ValueError(f"{value} is not a CPO loss type here: write loss.kind simpo (alpha is AlphaPO's)")
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.label_smoothing > 0 and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is not used by loss_type {self.loss_type}; use sigmoid")
        return self


class OrpoLoss(BaseLoss):
    """ORPO (Hong et al. 2024, eq. 6): cross-entropy plus beta times the odds ratio of length-averaged log-probs."""

    kind: Literal["orpo"] = "orpo"
    beta: PositiveFloat = Field(default=0.1, description="The paper's lambda: weight of the odds ratio.")
    nll_scale: NonNegativeFloat = Field(default=1.0, description="Weight of the cross-entropy.")
    nll_prompt: bool = Field(default=True, description="Cross-entropy over prompt and chosen, as TRL; false: chosen.")


class SimperLoss(BaseLoss):
    """SimPER (Xiao et al. 2025, arXiv 2502.00883): inverse perplexity of rejected minus that of chosen responses.

    It has no hyperparameter and no reference.
    """

    kind: Literal["simper"] = "simper"
    nll_scale: NonNegativeFloat = Field(default=0.0, description="Weight of the cross-entropy per chosen token.")


class SftLoss(BaseLoss):
    """Token-mean cross-entropy on the chosen responses; the objective of the `sft:` stage."""

    kind: Literal["sft"] = "sft"


class KtoLoss(BaseLoss):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306): each response is desirable or not, against a reference point.

    The chosen response of a pair is a desirable example, the rejected one an undesirable one; a row may have one
    response and a label instead. Names, defaults and formulas are those of TRL's KTOTrainer 1.16.
    """

    kind: Literal["kto"] = "kto"
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto",
        description="kto: rewards against an estimate of the KL divergence from the reference model, for which one "
        "more forward pass of each update scores responses after other prompts; apo_zero_unpaired: against 0.",
    )
    beta: PositiveFloat = Field(default=0.1, description="Strength of the pull towards the reference model.")
    desirable_weight: NonNegativeFloat = Field(default=1.0, description="Weight of the chosen responses' losses.")
    undesirable_weight: NonNegativeFloat = Field(default=1.0, description="Weight of the rejected responses' losses.")
    nll_scale: NonNegativeFloat = Field(default=0.0, description="Weight of the cross-entropy per chosen token.")

    @property
    def scores_mismatched(self) -> bool:
        """Whether the KL divergence is estimated."""
        return self.loss_type == "kto"

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError("desirable_weight and undesirable_weight are both 0; set at least one above 0")
        return self


LossConfig = Annotated[
    SimpoLoss | DpoLoss | CpoLoss | OrpoLoss | SimperLoss | KtoLoss | SftLoss, Field(discriminator="kind")
]
