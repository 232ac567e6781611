"""What may be changed in a trial that goes on from another one's checkpoint: nothing that its state depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.spec.given import Problem
from trainer.config import TrialConfig

CADENCE = ("training.logging_steps", "training.eval_steps", "training.save_steps")
MAY_CHANGE = (
    "training.learning_rate",
    "training.lr_scheduler_type",
    "training.warmup_ratio",
    "training.max_steps",
    "training.num_train_epochs",
    "training.weight_decay",
    "training.adam_beta1",
    "training.adam_beta2",
    "training.adam_epsilon",
    "training.max_grad_norm",
    *CADENCE,
    "training.tokens_per_micro_batch",
    "training.gradient_checkpointing",
)
"""Leaves outside the loss under which weights, moments and the place in the data keep their meaning."""
_BOUND = {
    "model": "the weights are of this start model",
    "data": "the place in the data is of these pairs",
    "lora": "the weights are of these adapters",
    "engine": "the optimiser's state is of this engine",
    "evaluation": "the points so far were measured in this way",
    "training.pairs_per_update": "the place in the data is counted in updates of this size",
    "loss": "the points so far are of this loss",
    "training.seed": "the order of the pairs is drawn with this seed",
}
"""Why others may not, by the start of their paths."""


def fork_problems(parent: TrialConfig, config: TrialConfig, changed: Mapping[str, Any]) -> list[Problem]:
    """Why a checkpoint of `parent` cannot go on as `config`, which differs in `changed`; empty where it can."""
    return list(_problems(parent, config, changed))


def _problems(parent: TrialConfig, config: TrialConfig, changed: Mapping[str, Any]) -> Iterator[Problem]:
    before, after = parent.leaves(), config.leaves()
    numbers = loss_numbers(config) if config.loss.kind == parent.loss.kind else []
    hint = f"these may: {', '.join((*numbers, *MAY_CHANGE))}; without --from-checkpoint the clone begins anew"
    for path in changed:
        if path in MAY_CHANGE or path in numbers or before.get(path, ...) == after.get(path, ...):
            continue
        why = next((why for start, why in _BOUND.items() if path == start or path.startswith(f"{start}.")), "")
        yield path, "cannot change from one update to the next" + (f": {why}" if why else ""), hint


def loss_numbers(config: TrialConfig) -> list[str]:
    """The numbers of this loss: beta, gamma and the like. What kind of loss it is, is not among them."""
    leaves = config.loss.model_dump()
    return [f"loss.{name}" for name, value in leaves.items() if not isinstance(value, (str, bool, tuple, list))]
