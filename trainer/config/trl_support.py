"""Engine names, and which configurations TRL's trainers do not support. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, assert_never

from trainer.config.loss_config import (
    OWN_TERMS,
    CpoLoss,
    DpoLoss,
    KtoLoss,
    LossConfig,
    OrpoLoss,
    SftLoss,
    SimperLoss,
    SimpoLoss,
)

EngineName = Literal["packed", "trl"]


def pairs_per_micro_batch(pairs_per_update: int, token_budget: int, max_length: int) -> int:
    """Return TRL's batch size: the largest divisor of the update that keeps within `token_budget` at full length.

    A pair is two sequences of up to `max_length` tokens; the result is at least 1.
    """
    fitting = [
        pairs
        for pairs in range(1, pairs_per_update + 1)
        if pairs_per_update % pairs == 0 and 2 * max_length * pairs <= token_budget
    ]
    return max(fitting, default=1)


def unsupported_by_trl(
    loss: LossConfig, *, single_batch: bool, stochastic_rounding: bool, load_in_4bit: bool
) -> Iterator[str]:
    """Yield what TRL's trainers do not support of this configuration, each with an alternative.

    `single_batch`: TRL computes all pairs of an update at once. `stochastic_rounding`: bfloat16 weights are to be
    updated with stochastic rounding.
    """
    if stochastic_rounding:
        yield (
            "TRL's trainers update bfloat16 weights by rounding to nearest: set training.stochastic_rounding to false, "
            "use float32 weights with training.bf16, or use engine packed"
        )
    if load_in_4bit:
        yield "model.load_in_4bit is not supported by engine trl; use engine packed"
    match loss:
        case SimpoLoss():
            if loss.loss_type == "hinge":
                yield "TRL's CPOTrainer has no hinge form of SimPO; use engine packed, or loss_type sigmoid"
        case DpoLoss():
            yield from _dpo_unsupported(loss, single_batch)
        case CpoLoss():
            pass
        case OrpoLoss():
            if loss.nll_scale != 1.0 or not loss.nll_prompt:
                yield (
                    "TRL's ORPOTrainer always adds the cross-entropy of prompt and chosen response once: leave "
                    "nll_scale at 1 and nll_prompt at true, or use engine packed"
                )
        case SimperLoss():
            yield "TRL has no SimPER; use engine packed"
        case KtoLoss():
            yield "TRL's KTOTrainer estimates the KL divergence in each micro-batch; use engine packed"
        case SftLoss():
            yield "engine trl trains on preferences (DPOTrainer, CPOTrainer, ORPOTrainer); for sft use engine packed"
        case _:
            assert_never(loss)


def _dpo_unsupported(loss: DpoLoss, single_batch: bool) -> Iterator[str]:
    if own := [term for term, _ in loss.terms if term in OWN_TERMS]:
        yield f"TRL's DPOTrainer has no loss_type {', '.join(own)}; use engine packed"
    if loss.length_alpha > 0:
        yield "TRL's DPOTrainer has no length_alpha (R-DPO); use engine packed"
    if loss.odpo_alpha > 0:
        yield "TRL's DPOTrainer has no odpo_alpha (ODPO); use engine packed"
    if loss.sync_ref_model:
        yield "engine trl takes the initial model's cached log-probs: for sync_ref_model (TR-DPO) use engine packed"
    if {term for term, _ in loss.terms} == {"sft"}:
        yield "engine trl trains on preferences: loss_type sft alone uses none; use engine packed"
    if loss.nll_scale > 0 and loss.use_weighting:
        yield "TRL's DPOTrainer would apply use_weighting to the cross-entropy; leave one out, or use engine packed"
    if loss.couples_pairs and not single_batch:
        yield (
            "TRL's DPOTrainer sorts the pairs of a micro-batch, not of an update: for aot raise tokens_per_micro_batch "
            "to 2 * max_length * pairs_per_update, or use engine packed"
        )
