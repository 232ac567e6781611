"""Notices of a plan: settings of a sweep that cost more, or do less, than their file lets one expect."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.spec.estimates.disk_space import format_bytes
from orchestrator.spec.estimates.input_sizes import ModelShape
from orchestrator.spec.pruners import NoPruner
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.loss_config import DpoLoss
from trainer.config.trial import TrialConfig

_LATE = 0.25
"""Share of a training without an evaluation from which on a notice says that a pruner comes late."""


def kept_models_notices(spec: SweepSpec) -> list[str]:
    """Return that more weights stay on disk than `keep_models` says, where judging needs them."""
    if spec.judge is None or "keep_models" not in spec.model_fields_set or spec.judge.top <= spec.keep_models:
        return []
    return [
        f"judge.top {spec.judge.top} is above keep_models {spec.keep_models}: the weights of the best "
        f"{spec.judge.top} trials stay on disk, as judging needs them"
    ]


def moving_reference_notices(
    configs: Sequence[TrialConfig], updates: Sequence[int], shape: ModelShape | None
) -> list[str]:
    """Return what a reference that moves costs, and whether it never does."""
    moving = [(i, c) for i, c in enumerate(configs) if c.loss.moves_reference]
    if not moving:
        return []
    config = moving[0][1]
    forwards = (3 if config.lora is None else 2) + config.training.gradient_checkpointing
    what = "a second set of weights" if config.lora is None else "a second set of adapters"
    size = ""
    if shape is not None:
        each = 2 if config.model.dtype == "bfloat16" and config.lora is None else 4
        trained = shape.parameters if config.lora is None else shape.adapters(config.lora.r)
        size = f" ({format_bytes(each * trained)})"
    notices = [
        f"loss.sync_ref_model: the reference moves, so that its log-probs are not cached but computed in every update, "
        f"about {1 / forwards:.0%} more FLOPs, with {what} in memory{size} and in each checkpoint"
    ]
    still = [
        (loss.ref_model_sync_steps, updates[i])
        for i, c in moving
        if isinstance(loss := c.loss, DpoLoss) and i < len(updates) and loss.ref_model_sync_steps >= updates[i]
    ]
    if still:
        every, most = still[0]
        notices.append(
            f"loss.ref_model_sync_steps {every:,}: the reference does not move in {most:,} updates, so that such a "
            "trial is DPO; set it lower"
        )
    return notices


def late_pruning_notices(spec: SweepSpec, updates: Sequence[int]) -> list[str]:
    """Return that a pruner, which decides at evaluations, has none early enough to save much.

    Args:
        spec: The sweep.
        updates: Updates of its trials, as far as they are known.
    """
    every, most = spec.base.training.eval_steps, max(updates, default=0)
    if isinstance(spec.pruner, NoPruner) or every is None or every <= _LATE * most or not most:
        return []
    saves = "no trial is pruned" if every >= most else f"pruning saves at most {1 - every / most:.0%} of a training"
    return [
        f"base.training.eval_steps {every:,} of {most:,} updates: trials are compared at evaluations, so that {saves}; "
        f"set {max(1, most // 10):,} or leave it out"
    ]
