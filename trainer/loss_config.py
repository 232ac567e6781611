"""The objectives a trial can train with: one class each, one union. Formulas are in trainer/losses.py."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.frozen import Frozen, NonNegative, Positive


class SimpoLoss(Frozen):
    """SimPO (Meng et al. 2024, eq. 6). gamma is absolute, gamma_beta_ratio is gamma/beta; give one of the two."""

    kind: Literal["simpo"] = "simpo"
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid"
    beta: Positive = 2.0
    gamma: NonNegative | None = None
    gamma_beta_ratio: NonNegative | None = None
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    sft_weight: NonNegative = 0.0

    @model_validator(mode="after")
    def _one_margin(self) -> Self:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError(
                "gamma and gamma_beta_ratio say the same twice (gamma = gamma_beta_ratio * beta); give one of them"
            )
        if self.loss_type == "hinge" and self.label_smoothing > 0:
            raise ValueError("label_smoothing has no meaning with loss_type hinge; remove it or use sigmoid")
        return self

    @property
    def ratio(self) -> float:
        """gamma / beta, whichever of the two was given; 0.25 (the authors' code default) when neither was."""
        if self.gamma is not None:
            return self.gamma / self.beta
        return 0.25 if self.gamma_beta_ratio is None else self.gamma_beta_ratio

    @property
    def margin(self) -> float:
        """The target reward margin gamma in absolute terms."""
        return self.ratio * self.beta if self.gamma is None else self.gamma


class DpoLoss(Frozen):
    """DPO (Rafailov et al. 2023, eq. 7) against the frozen start model."""

    kind: Literal["dpo"] = "dpo"
    loss_type: Literal["sigmoid"] = "sigmoid"
    beta: Positive = 0.1


class SftLoss(Frozen):
    """Token-mean cross-entropy on the chosen responses; what the `sft:` stage trains with."""

    kind: Literal["sft"] = "sft"


LossConfig = Annotated[SimpoLoss | DpoLoss | SftLoss, Field(discriminator="kind")]
