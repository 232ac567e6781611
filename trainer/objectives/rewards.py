"""The implicit rewards of each objective, as TRL defines them; used in training, evaluation and reports.

Imports no torch, so that reports work without it; the values may be torch tensors or NumPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar, assert_never

import numpy as np

from trainer.config.loss_config import CpoLoss, DpoLoss, KtoLoss, LossConfig, OrpoLoss, SftLoss, SimperLoss, SimpoLoss

V = TypeVar("V")
"""A torch tensor or a NumPy array."""
_MAX_EXPONENT = 80.0
"""Upper bound of exponents: e^80 is larger than any useful value and finite in float32."""


class NoReference(ValueError):
    """The objective needs reference log-probs, which are missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Responses(Generic[V]):
    """Statistics of one side (chosen or rejected) of N pairs, [N] each."""

    logps: V
    """Summed log-probs under the policy; for LD-DPO after `length_desensitized`."""
    tokens: V
    """Scored tokens."""
    reference: V | None = None
    """Like `logps`, under the initial model; None if unknown."""


def compares_with_reference(loss: LossConfig) -> bool:
    """Return whether the objective uses the initial model's log-probs."""
    return isinstance(loss, KtoLoss) or (isinstance(loss, DpoLoss) and any(term != "sft" for term, _ in loss.terms))


def rewards(loss: LossConfig, responses: Responses[V]) -> V:
    """Return the implicit reward of each response, [N].

    A pair counts as right if the chosen response has the higher reward.

    SimPO: beta * average log-prob (AlphaPO: shaped); ORPO and CPO ipo: beta * average; SimPER: the average; other CPO:
    beta * sum; DPO and KTO: beta * (sum - reference sum), for all terms; SFT and DPO with only the term sft: the sum.
    Raises NoReference if the objective needs a reference and `reference` is None.
    """
    sums: Any = responses.logps
    match loss:
        case SimpoLoss():
            return loss.beta * shape_log_prob(sums / responses.tokens, loss.alpha)
        case OrpoLoss():
            return loss.beta * (sums / responses.tokens)
        case CpoLoss():
            return loss.beta * (sums / responses.tokens if loss.loss_type == "ipo" else sums)
        case DpoLoss() | KtoLoss():
            if not compares_with_reference(loss):
                return sums
            if responses.reference is None:
                raise NoReference("this objective needs the initial model's log-probs, which are missing")
            return loss.beta * (sums - responses.reference)
        case SimperLoss():
            return sums / responses.tokens
        case SftLoss():
            return sums
        case _:
            assert_never(loss)


def shape_log_prob(average: Any, alpha: float) -> Any:
    """Return AlphaPO's reward of an average log-prob x (Gupta et al. 2025).

    (1 - e^(-alpha x)) / alpha; x if alpha is 0.
    """
    if not alpha:
        return average
    if isinstance(average, np.ndarray):
        return -np.expm1(np.minimum(-alpha * average, _MAX_EXPONENT)) / alpha
    return -(-alpha * average).clamp(max=_MAX_EXPONENT).expm1() / alpha
