"""TRL's trainers with a watch beside them. Loss, gradient, clipping, schedule and step are theirs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from trainer.trl_engine.watch import Watch


class _Watched(Trainer):
    """Where transformers' Trainer can be watched; comes before a TRL trainer among the bases."""

    watch: Watch

    def _send_telemetry(self) -> None:
        """Nothing about a training run leaves this machine."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:  # noqa: ARG002
        """Not estimated: it would be by the names of inputs that these batches have not."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
        """The schedule of the whole run, put where this part of it begins."""
        scheduler: Any = super().create_scheduler(self.watch.total, optimizer)
        done = self.watch.done
        rates = [base * factor(done) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.last_epoch, scheduler._last_lr = done, rates
        return scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a micro-batch."""
        self.watch.before()
        loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.watch.after(loss.detach(), _positions(inputs))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        self.watch.gradient(float(norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL adds its metrics to `logs`."""
        super().log(logs, start_time)
        self.watch.said(logs)


def _positions(inputs: dict[str, torch.Tensor]) -> int:
    if "input_ids" in inputs:
        return inputs["input_ids"].numel()
    pairs, chosen = inputs["chosen_input_ids"].shape
    return 2 * pairs * max(chosen, inputs["rejected_input_ids"].shape[1])


class WatchedDpo(_Watched, DPOTrainer):
    """DPOTrainer over rows that are tokenised and have their reference log-probs."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:  # noqa: ARG002
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:  # noqa: ARG002
        return dataset

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        scored = inputs["completion_mask"][:, 1:].sum(1).chunk(2)

        def seen(**given: Any) -> Any:
            outputs = model(**given)
            self.watch.pairs(*outputs.log_probs.detach().double().sum(1).chunk(2), *scored)
            return outputs

        return super()._compute_loss(seen, inputs, return_outputs)


class WatchedCpo(_Watched, CPOTrainer):
    """CPOTrainer; of its averages (simpo, ipo) the sums are seen."""

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:  # noqa: ARG002
        """The row as it is."""
        return feature

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """TRL's forward pass."""
        found = super().concatenated_forward(model, batch)
        _see(self.watch, found, batch, averaged=self.loss_type in ("ipo", "simpo"))
        return found


class WatchedOrpo(_Watched, ORPOTrainer):
    """ORPOTrainer; of its averages the sums are seen."""

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:  # noqa: ARG002
        """The row as it is."""
        return feature

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """TRL's forward pass."""
        found = super().concatenated_forward(model, batch)
        _see(self.watch, found, batch, averaged=True)
        return found


def _see(watch: Watch, found: Any, batch: Any, *, averaged: bool) -> None:
    tokens = [(batch[f"{side}_labels"] != -100).sum(1) for side in ("chosen", "rejected")]
    sums = [logps.detach().double() * (n if averaged else 1) for logps, n in zip(found[:2], tokens, strict=True)]
    watch.pairs(*sums, *tokens)
