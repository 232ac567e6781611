"""Settings of the divergence guard: its rules, each with its thresholds.

Every rule compares a trial with its own start, so that beta, gamma and the kind of loss, which scale the raw numbers,
do not decide. A rule set to null is off. Figures in the descriptions are of the quickstart's model unless said
otherwise: at a sound learning rate (3e-4), a high one (1e-3) and absurd ones (1e-2, 1e-1).
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field, model_validator

from trainer.config.base import Fraction, FrozenModel, PositiveFloat, PositiveInt

AboveOne = Annotated[float, Field(gt=1.0)]


class LossRule(FrozenModel):
    """The training loss stays above its own start: doing nothing would have been better.

    The start is the larger of the first training loss and the held-out loss of the start model, since those of SimPO
    (softplus(gamma)), DPO (0.69) and IPO (25 at beta 0.1) have nothing in common.
    """

    ratio: AboveOne = Field(
        default=1.5,
        description="Times the start. Sound and high learning rates stayed below 1.1 but for single updates (1.3); an "
        "absurd one was at 1.8 for 50 updates.",
    )
    updates: PositiveInt = Field(
        default=20, description="For so many updates without a break; single bad batches are noise."
    )


class GradNormRule(FrozenModel):
    """The gradient's norm before clipping explodes, by its own running median or in absolute terms."""

    times_median: AboveOne | None = Field(
        default=20.0,
        description="Times the median of all points before. The worst single update of a sound trial had 4.",
    )
    above: PositiveFloat | None = Field(
        default=1e6,
        description="In absolute terms: a last resort, as beta and the loss scale the norm (sppo_hard at beta 0.001 "
        "begins near 1e5).",
    )
    updates: PositiveInt = Field(
        default=5, description="For so many updates without a break; clipping forgives a spike."
    )
    after: PositiveInt = Field(
        default=10, description="Points that must have been seen before the median says something."
    )


class ChosenLogpsRule(FrozenModel):
    """The log-prob of the chosen responses, per token, collapses: SimPO's known failure, with rising margins.

    Judged on the held-out pairs at each evaluation, and on training pairs over some updates. Margins and accuracies
    look well meanwhile, and the text is ruined (SimPO issues 12, 33, 80).
    """

    fall: PositiveFloat | None = Field(
        default=2.3,
        description="Nats per token against the start while the margin rises: 2.3 makes each chosen token ten times "
        "less likely. Sound trials fell by 0.3, a high rate by up to 1.1, absurd ones by 2.8 to 10 within 10 updates.",
    )
    fall_alone: PositiveFloat | None = Field(
        default=4.6,
        description="Nats per token against the start, whatever the margin does: a hundred times less likely.",
    )
    lowest: float | None = Field(
        default=-10.0,
        description="Nats per token; below it, with at least 1 nat lost, nothing is left. Guessing blindly among "
        "20,000 tokens has -9.9.",
    )
    updates: PositiveInt = Field(default=5, description="On training pairs, for so many updates without a break.")


class RepetitionRule(FrozenModel):
    """The greedy answers to the fixed prompts repeat themselves, as they did not at the start."""

    rise: Fraction = Field(
        default=0.5,
        description="Of `eval_repetition`, the share of 4-grams that occurred before in the same answer, against the "
        "start model's. High learning rates had up to 0.15, absurd ones 0.4 to 0.9.",
    )
    looks: PositiveInt = Field(default=2, description="So many looks in a row (evaluation.answer_steps).")


class AnswerLengthRule(FrozenModel):
    """The greedy answers to the fixed prompts grow out of hand. Seen only below evaluation.max_new_tokens."""

    ratio: AboveOne = Field(
        default=3.0,
        description="Times the start model's mean length, or that of the held-out chosen responses where it is larger. "
        "Gemma-2's answers grew 1.3 times by DPO, 1.2 by SimPO; the quickstart's 2.2 times by DPO at a high rate.",
    )
    looks: PositiveInt = Field(default=2, description="So many looks in a row (evaluation.answer_steps).")


class GuardConfig(FrozenModel):
    """Stops a trial that has diverged, apart from the pruner and by default. `guard: off` turns all rules off.

    A loss, gradient norm or goal that is not finite ends a trial in any case.
    """

    loss: LossRule | None = Field(default=LossRule(), description="The training loss stays above its start.")
    grad_norm: GradNormRule | None = Field(default=GradNormRule(), description="The gradient's norm explodes.")
    chosen_logps: ChosenLogpsRule | None = Field(
        default=ChosenLogpsRule(), description="The chosen responses' log-probs collapse."
    )
    repetition: RepetitionRule | None = Field(default=RepetitionRule(), description="Greedy answers repeat themselves.")
    answer_length: AnswerLengthRule | None = Field(
        default=AnswerLengthRule(), description="Greedy answers grow out of hand."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if _off(value):
            return dict.fromkeys(cls.model_fields)
        if not isinstance(value, dict):
            problem = f"must be off, or a mapping of {', '.join(cls.model_fields)}"
            raise ValueError(problem)  # noqa: TRY004  pydantic takes no other
        return {name: None if _off(rule) else rule for name, rule in cast("dict[str, Any]", value).items()}


def _off(value: Any) -> bool:
    return value is False or value == "off"
