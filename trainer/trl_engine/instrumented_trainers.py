"""Subclasses of TRL's trainers with callbacks before and after each step.

Loss, gradient, clipping, schedule and step are TRL's. The callbacks check the gradient before a step and record the
metrics after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from trainer.distributed.processes import CancelToken
from trainer.metrics import METRICS
from trainer.objectives.pair_logps import MetricSums, PairLogps, comparison_sums, merge_sums
from trainer.training.engine import UpdatePlan


class StepCallbacks:
    """Callbacks of a TRL trainer; `emit` receives the metric sums of each update."""

    def __init__(
        self, plan: UpdatePlan, done: int, cancel_token: CancelToken, emit: Callable[[MetricSums], None]
    ) -> None:
        self.done = done
        """Updates taken so far, earlier attempts included."""
        self.total = plan.total_updates
        self._plan, self._cancel_token, self._emit = plan, cancel_token, emit
        self._micro_batches: list[MetricSums] = []
        self._positions = 0
        self._loss = 0.0
        self._began = perf_counter()

    def before_micro_batch(self) -> None:
        """Called before a micro-batch is computed. Raises Interrupted if cancelled."""
        self._cancel_token.check()
        if not self._micro_batches:
            self._plan.seed_update(self.done + 1)

    def on_pairs(self, chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> None:
        """Take TRL's summed log-probs of the micro-batch's pairs and their token counts, [N] each."""
        logps = PairLogps(chosen.detach().double(), rejected.detach().double(), chosen_tokens, rejected_tokens)
        self._micro_batches.append(comparison_sums(logps))

    def after_micro_batch(self, loss: Tensor, positions: int) -> None:
        """Take the loss of the micro-batch and the number of its positions, padding included. Raises Diverged."""
        self._positions += positions
        self._plan.check_finite(self.done + 1, loss=float(loss))
        self._loss = float(loss)

    def on_gradient(self, grad_norm: float) -> None:
        """Take the norm of the update's gradient before the step. Raises Diverged."""
        self._plan.check_finite(self.done + 1, loss=self._loss, grad_norm=grad_norm)

    def on_log(self, logs: Mapping[str, float]) -> None:
        """Take the trainer's log of an update and emit its metrics; logs without a loss are ignored."""
        if "loss" not in logs:
            return
        own_sums = merge_sums(self._micro_batches)
        pairs = self._plan.training.pairs_per_update
        seconds = perf_counter() - self._began
        # Metrics in both are equal, except for ORPO's nll_loss, in which TRL includes the prompt; ours is used.
        trl_logs: MetricSums = {
            name: (float(value) * pairs, float(pairs))
            for name, value in logs.items()
            if name in METRICS and name not in own_sums and name != "epoch"
        }
        trl_logs |= {name: (float(logs[name]), 1.0) for name in ("loss", "grad_norm", "learning_rate")}
        speed: MetricSums = {
            "tokens_per_second": (float(self._positions), seconds),
            "pairs_per_second": (float(pairs), seconds),
        }
        self._micro_batches, self._positions = [], 0
        self.done += 1
        self._emit(trl_logs | own_sums | speed)
        self._began = perf_counter()


class _InstrumentedTrainer(Trainer):
    """Mixin that calls `StepCallbacks` from transformers' Trainer; must precede the TRL trainer among the bases."""

    callbacks: StepCallbacks

    def _send_telemetry(self) -> None:
        """Send no telemetry."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:  # noqa: ARG002
        """Return 0: the estimate needs inputs that these batches do not have."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
        """Create the schedule of the whole run, advanced to where this attempt starts."""
        scheduler: Any = super().create_scheduler(self.callbacks.total, optimizer)
        done = self.callbacks.done
        rates = [base * factor(done) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.last_epoch, scheduler._last_lr = done, rates
        return scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss of a micro-batch."""
        self.callbacks.before_micro_batch()
        loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.callbacks.after_micro_batch(loss.detach(), _positions(inputs))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        self.callbacks.on_gradient(float(norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log an update; TRL adds its metrics to `logs`."""
        super().log(logs, start_time)
        self.callbacks.on_log(logs)


def _positions(inputs: dict[str, torch.Tensor]) -> int:
    if "input_ids" in inputs:
        return inputs["input_ids"].numel()
    pairs, chosen = inputs["chosen_input_ids"].shape
    return 2 * pairs * max(chosen, inputs["rejected_input_ids"].shape[1])


class InstrumentedDpoTrainer(_InstrumentedTrainer, DPOTrainer):
    """DPOTrainer over rows with token ids and reference log-probs."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:  # noqa: ARG002
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:  # noqa: ARG002
        return dataset

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        scored = inputs["completion_mask"][:, 1:].sum(1).chunk(2)

        def recorded(**inputs_of_model: Any) -> Any:
            outputs = model(**inputs_of_model)
            self.callbacks.on_pairs(*outputs.log_probs.detach().double().sum(1).chunk(2), *scored)
            return outputs

        return super()._compute_loss(recorded, inputs, return_outputs)


class InstrumentedCpoTrainer(_InstrumentedTrainer, CPOTrainer):
    """CPOTrainer; averaged log-probs (simpo, ipo) are reported as sums."""

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:  # noqa: ARG002
        """Return the row, which is tokenized already."""
        return feature

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Run TRL's forward pass and report its pairs."""
        found = super().concatenated_forward(model, batch)
        _report_pairs(self.callbacks, found, batch, averaged=self.loss_type in ("ipo", "simpo"))
        return found


class InstrumentedOrpoTrainer(_InstrumentedTrainer, ORPOTrainer):
    """ORPOTrainer; averaged log-probs are reported as sums."""

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:  # noqa: ARG002
        """Return the row, which is tokenized already."""
        return feature

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Run TRL's forward pass and report its pairs."""
        found = super().concatenated_forward(model, batch)
        _report_pairs(self.callbacks, found, batch, averaged=True)
        return found


def _report_pairs(callbacks: StepCallbacks, found: Any, batch: Any, *, averaged: bool) -> None:
    tokens = [(batch[f"{side}_labels"] != -100).sum(1) for side in ("chosen", "rejected")]
    sums = [logps.detach().double() * (n if averaged else 1) for logps, n in zip(found[:2], tokens, strict=True)]
    callbacks.on_pairs(*sums, *tokens)
