"""TRL's inputs for a trial: its arguments and the tokenized rows.

Every default of TRL that would change the result is set explicitly. Rows come in the run's own order, in the format of
TRL's collators; TRL neither tokenizes nor shuffles.
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
    """Restrict the arguments to one device, however many GPUs this process sees.

    With several, transformers would wrap the model in DataParallel and multiply the micro-batch by their number.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    return arguments


def common_arguments(config: TrialConfig, updates: int, total: int, folder: Path, *, cpu: bool) -> dict[str, Any]:
    """Return the arguments of all trainers: `updates` left of `total`; nothing is saved, evaluated or reported."""
    training = config.training
    batch_size = config.pairs_per_micro_batch
    return {
        "output_dir": str(folder),
        "max_steps": updates,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": training.pairs_per_update // batch_size,
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
        # The model is configured already; TRL's defaults would change it.
        "activation_checkpointing": False,
        "disable_dropout": False,
        # Every update is logged, and a loss that is not finite is not filtered.
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
    """Return DPOTrainer's arguments; nll_scale is its term `sft`. max_length None: the pairs are truncated already."""
    terms = dict(loss.terms) | ({"sft": loss.nll_scale} if loss.nll_scale else {})
    arguments = DPOConfig(
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
    return on_one_device(arguments)


def cpo_arguments(loss: SimpoLoss | CpoLoss, common: dict[str, Any], max_length: int) -> CPOConfig:
    """Return CPOTrainer's arguments; SimPO is one of its loss types: gamma absolute, cpo_alpha 0 unless configured."""
    if isinstance(loss, CpoLoss):
        kind: dict[str, Any] = {"loss_type": loss.loss_type, "cpo_alpha": loss.nll_scale}
    else:
        kind = {
            "loss_type": "simpo",
            "simpo_gamma": loss.gamma_value,
            "alpha": loss.alpha,
            "cpo_alpha": loss.cross_entropy_weight,
        }
    smoothing = loss.label_smoothing
    return on_one_device(CPOConfig(**common, **kind, beta=loss.beta, label_smoothing=smoothing, max_length=max_length))


def orpo_arguments(loss: OrpoLoss, common: dict[str, Any], max_length: int) -> ORPOConfig:
    """Return ORPOTrainer's arguments."""
    return on_one_device(ORPOConfig(**common, beta=loss.beta, max_length=max_length))


RowFn = Callable[[int], dict[str, Any]]
"""Index of a pair -> a row for the collator."""


class RemainingRows(Dataset[dict[str, Any]]):
    """The pairs of all updates after `done`, concatenated: one pass over them is the rest of the run."""

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
        """Return this data set: CPOTrainer and ORPOTrainer would apply template and tokenizer again."""
        return self


def preference_rows(pairs: PairDataset, loss: DpoLoss, reference: PairLogps) -> RowFn:
    """Return a function from a pair's index to a row for DataCollatorForPreference.

    Rows contain the initial model's log-probs as DPOTrainer would precompute them.
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
    """Return a function from a pair's index to a row for DPODataCollatorWithPadding (CPOTrainer and ORPOTrainer)."""

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
