"""TRL's inputs for a trial: its arguments and the tokenized rows.

Every default of TRL's that would change the result is set explicitly. Rows come in the run's own order, as TRL's
collators take them; TRL neither tokenizes nor shuffles.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import Dataset
from transformers import TrainingArguments
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from trainer.config.loss_config import CpoLoss, DpoLoss, OrpoLoss, SimpoLoss
from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import Pair, PairDataset, TokenIds
from trainer.objectives.dpo_terms import length_desensitized
from trainer.objectives.pair_logps import PairLogps
from trainer.training.engine import UpdatePlan

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def on_one_device(arguments: Arguments) -> Arguments:
    """The same arguments for one device, whatever number of GPUs this process sees.

    With several, transformers would wrap the model in DataParallel and multiply the micro-batch by their number.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    return arguments


def common_arguments(config: TrialConfig, updates: int, total: int, folder: Path, *, cpu: bool) -> dict[str, Any]:
    """What all trainers are told: `updates` still to be taken of `total`. Nothing is saved, evaluated or reported."""
    training = config.training
    together = config.pairs_per_micro_batch
    return {
        "output_dir": str(folder),
        "max_steps": updates,
        "per_device_train_batch_size": together,
        "gradient_accumulation_steps": training.pairs_per_update // together,
        "train_sampling_strategy": "sequential",
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": math.ceil(total * training.warmup_ratio),
        "optim": "adamw_torch_fused",
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.bf16,
        "use_cpu": cpu,
        "seed": training.seed,
        # The model comes with them as configured; TRL's own defaults are on.
        "activation_checkpointing": False,
        "disable_dropout": False,
        # Every update is heard of, and a loss that is not finite as what it is.
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def dpo_arguments(loss: DpoLoss, common: dict[str, Any]) -> DPOConfig:
    """DPOTrainer's arguments; nll_scale is its term `sft`. max_length None: the pairs are cut already."""
    terms = dict(loss.terms) | ({"sft": loss.nll_scale} if loss.nll_scale else {})
    made = DPOConfig(
        **common,
        loss_type=list(terms),
        loss_weights=list(terms.values()),
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        f_divergence_type=loss.f_divergence_type,
        f_alpha_divergence_coef=loss.f_alpha_divergence_coef,
        ld_alpha=loss.ld_alpha,
        use_weighting=loss.use_weighting,
        discopop_tau=loss.discopop_tau,
        precompute_ref_log_probs=True,
        router_aux_loss_coef=0.0,
        max_length=None,
    )
    return on_one_device(made)


def cpo_arguments(loss: SimpoLoss | CpoLoss, common: dict[str, Any], max_length: int) -> CPOConfig:
    """CPOTrainer's arguments, of which SimPO is a loss type: gamma absolute, cpo_alpha 0 unless asked for."""
    if isinstance(loss, CpoLoss):
        kind: dict[str, Any] = {"loss_type": loss.loss_type, "cpo_alpha": loss.nll_scale}
    else:
        kind = {
            "loss_type": "simpo",
            "simpo_gamma": loss.margin,
            "alpha": loss.alpha,
            "cpo_alpha": loss.cross_entropy_weight,
        }
    smoothing = loss.label_smoothing
    return on_one_device(CPOConfig(**common, **kind, beta=loss.beta, label_smoothing=smoothing, max_length=max_length))


def orpo_arguments(loss: OrpoLoss, common: dict[str, Any], max_length: int) -> ORPOConfig:
    """ORPOTrainer's arguments."""
    return on_one_device(ORPOConfig(**common, beta=loss.beta, max_length=max_length))


RowFn = Callable[[int], dict[str, Any]]
"""The number of a pair -> what a collator makes a batch of."""


class RemainingRows(Dataset[dict[str, Any]]):
    """The pairs of all updates after `done`, end to end: one pass over this is the rest of the run."""

    def __init__(self, plan: UpdatePlan, done: int, row: RowFn) -> None:
        self._plan, self._done, self._row = plan, done, row
        self._per_update = plan.training.pairs_per_update
        self._step, self._update = -1, list[int]()

    def __len__(self) -> int:
        return (self._plan.total_updates - self._done) * self._per_update

    def __getitem__(self, position: int) -> dict[str, Any]:
        updates, within = divmod(position, self._per_update)
        if self._done + updates + 1 != self._step:
            self._step = self._done + updates + 1
            self._update = self._plan.order.pairs_of(self._step)
        return self._row(self._update[within])

    def map(self, *_: Any, **__: Any) -> RemainingRows:
        """Itself: CPOTrainer and ORPOTrainer map a data set through template and tokenizer, which this one has seen."""
        return self


def preference_rows(pairs: PairDataset, loss: DpoLoss, reference: PairLogps) -> RowFn:
    """Return a function from a row number to a row as DataCollatorForPreference takes it.

    Rows carry the initial model's log-probs as DPOTrainer would precompute them.
    """
    chosen, rejected = (sums.tolist() for sums in length_desensitized(loss, reference))

    def row(index: int) -> dict[str, Any]:
        pair = pairs.pair(index)
        return {
            "prompt_ids": pair.prompt.tolist(),
            "chosen_ids": pair.chosen.tolist(),
            "rejected_ids": pair.rejected.tolist(),
            "ref_chosen_logps": chosen[index],
            "ref_rejected_logps": rejected[index],
        }

    return row


def labeled_rows(pairs: PairDataset) -> RowFn:
    """As DPODataCollatorWithPadding takes them, for CPOTrainer and ORPOTrainer."""

    def row(index: int) -> dict[str, Any]:
        pair: Pair = pairs.pair(index)
        prompt = pair.prompt.tolist()
        return _labeled("chosen", prompt, pair.chosen) | _labeled("rejected", prompt, pair.rejected)

    return row


def _labeled(side: str, prompt: list[int], response: TokenIds) -> dict[str, Any]:
    scored: list[int] = response.tolist()
    return {
        f"{side}_input_ids": prompt + scored,
        f"{side}_attention_mask": [1] * (len(prompt) + len(scored)),
        f"{side}_labels": [-100] * len(prompt) + scored,
    }
