"""Settings of the divergence guard: its rules, each with its thresholds.

Every rule compares a trial with its own first values, so that beta, gamma and the kind of loss, which scale the raw
numbers, have no effect. A rule set to null is off. Figures in the descriptions are measured on the quickstart's model
unless stated otherwise: at a good learning rate (3e-4), a high one (1e-3) and far too high ones (1e-2, 1e-1).
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field, model_validator

from trainer.config.base import Fraction, FrozenModel, PositiveFloat, PositiveInt

AboveOne = Annotated[float, Field(gt=1.0)]


class LossRule(FrozenModel):
    """The training loss stays above its initial value: the initial model would have been better.

    The initial value is the larger of the first training loss and the held-out loss of the initial model. It differs
    between losses: softplus(gamma) for SimPO, 0.69 for DPO, 25 for IPO at beta 0.1.
    """

    ratio: AboveOne = Field(
        default=1.5,
        description="Times the initial value. Good and high learning rates stayed below 1.1 except for single updates "
        "(1.3); a far too high one was at 1.8 for 50 updates.",
    )
    updates: PositiveInt = Field(
        default=20, description="Consecutive updates above the limit; single bad batches are noise."
    )


class GradNormRule(FrozenModel):
    """The gradient norm before clipping explodes, relative to its running median or in absolute terms."""

    times_median: AboveOne | None = Field(
        default=20.0,
        description="Times the median of all earlier values. The worst single update of a good trial had 4.",
    )
    above: PositiveFloat | None = Field(
        default=1e6,
        description="Absolute limit; a last resort, as beta and the loss scale the norm (sppo_hard at beta 0.001 "
        "begins near 1e5).",
    )
    updates: PositiveInt = Field(
        default=5, description="Consecutive updates above the limit; clipping makes a single spike harmless."
    )
    after: PositiveInt = Field(default=10, description="Values needed before the median is used.")


class ChosenLogpsRule(FrozenModel):
    """The log-prob per token of the chosen responses collapses while margins rise, a known failure of SimPO.

    Checked on the held-out pairs at each evaluation, and on training pairs over several updates. Margins and accuracies
    look good meanwhile although the generated text degenerates (SimPO issues 12, 33, 80).
    """

    fall: PositiveFloat | None = Field(
        default=2.3,
        description="Nats per token below the initial value while the margin rises: 2.3 makes each chosen token ten "
        "times less likely. Good trials fell by 0.3, a high rate by up to 1.1, far too high ones by 2.8 to 10 within "
        "10 updates.",
    )
    fall_alone: PositiveFloat | None = Field(
        default=4.6,
        description="Nats per token below the initial value, whatever the margin: a hundred times less likely.",
    )
    lowest: float | None = Field(
        default=-10.0,
        description="Nats per token; a lower value, with a fall of at least 1 nat, stops the trial. A uniform guess "
        "among 20,000 tokens has -9.9.",
    )
    updates: PositiveInt = Field(default=5, description="On training pairs: consecutive updates beyond a limit.")


class RepetitionRule(FrozenModel):
    """The greedy completions of the fixed prompts repeat themselves more than those of the initial model."""

    rise: Fraction = Field(
        default=0.5,
        description="Rise of `eval_repetition` (share of 4-grams that occurred before in the same completion) over the "
        "initial model's. High learning rates had up to 0.15, far too high ones 0.4 to 0.9.",
    )
    looks: PositiveInt = Field(default=2, description="Consecutive measurements (evaluation.answer_steps).")


class AnswerLengthRule(FrozenModel):
    """The greedy completions of the fixed prompts become too long. Measured up to evaluation.max_new_tokens only."""

    ratio: AboveOne = Field(
        default=3.0,
        description="Times the larger of two mean lengths: the initial model's completions and the held-out chosen "
        "responses. Gemma-2's completions grew 1.3 times by DPO, 1.2 by SimPO; the quickstart's 2.2 times by DPO at a "
        "high learning rate.",
    )
    looks: PositiveInt = Field(default=2, description="Consecutive measurements (evaluation.answer_steps).")


class GuardConfig(FrozenModel):
    """Stops a trial that has diverged; on by default and independent of the pruner. `guard: off` turns all rules off.

    A loss, gradient norm or objective that is not finite ends a trial in any case.
    """

    loss: LossRule | None = Field(default=LossRule(), description="The training loss stays above its start.")
    grad_norm: GradNormRule | None = Field(default=GradNormRule(), description="The gradient's norm explodes.")
    chosen_logps: ChosenLogpsRule | None = Field(
        default=ChosenLogpsRule(), description="The chosen responses' log-probs collapse."
    )
    repetition: RepetitionRule | None = Field(default=RepetitionRule(), description="Greedy answers repeat themselves.")
    answer_length: AnswerLengthRule | None = Field(
        default=AnswerLengthRule(), description="Greedy answers become several times longer."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if _off(value):
            return dict.fromkeys(cls.model_fields)
        if not isinstance(value, dict):
            problem = f"must be off, or a mapping of {', '.join(cls.model_fields)}"
            raise ValueError(problem)  # noqa: TRY004  pydantic reports only ValueError
        return {name: None if _off(rule) else rule for name, rule in cast("dict[str, Any]", value).items()}


def _off(value: Any) -> bool:
    return value is False or value == "off"
