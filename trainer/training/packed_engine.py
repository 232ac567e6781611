"""`PackedEngine`: packed micro-batches, output layer in chunks, fused AdamW.

All randomness (data order, configured dropout) is a function of the seed, the update and the process, so that an update
is the same in a resumed run as in an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from time import perf_counter
from typing import cast

import torch
from torch import nn

from trainer.config.trial import TrialConfig
from trainer.evaluation.evaluator import pair_batches, pair_costs, score_pairs
from trainer.forward.pair_model import PreparedPairs, UpdateLogps
from trainer.objectives.losses import required_stats
from trainer.objectives.pair_logps import LossTerms, MetricSums, PairLogps, PendingSums, UpdateTotals, to_device
from trainer.training.engine import TrainingInputs, UpdatePlan
from trainer.training.optimizer import Optimizer


class PackedEngine:
    """Takes updates with `PairModel`; several processes share the pairs of an update."""

    def __init__(self, config: TrialConfig, inputs: TrainingInputs) -> None:
        self.plan = UpdatePlan(config, inputs)
        self._loss, self._training, self._inputs = config.loss, config.training, inputs
        self._trained = inputs.policy.trainable_parameters()
        self._optimizer = Optimizer(inputs.policy.base, self._trained, config.training)
        self._costs = pair_costs(inputs.pair_model, inputs.train)
        self._first: tuple[int, PreparedPairs] | None = None
        """An update, and its first micro-batch."""

    def trainable_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return self._trained

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return the optimizer's moments by name."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `state_dict` returned."""
        self._optimizer.load_state_dict(state)

    def close(self) -> None:
        """Do nothing: this engine adds nothing to the model."""

    def step(self, number: int) -> MetricSums:
        """Take one update: sum the gradients of all micro-batches and processes, check, clip, step."""
        began = perf_counter()
        process_group, plan = self._inputs.process_group, self.plan
        plan.seed_update(number)
        indexes = plan.order.pairs_of(number)
        pending, tokens = self._accumulate(number, indexes)
        if not self._inputs.pair_model.sharded:  # backward has reduced those of sharded weights
            process_group.all_reduce_gradients(self._trained.values())
        norm = self._optimizer.clip_gradients()
        if number < plan.total_updates:
            self._prepare_first(number + 1)
        # The host waits for the device here and at no other place of an update.
        sums, tokens, grad_norm = self._read(pending, tokens, norm)
        loss, weight = sums["loss"]
        plan.check_finite(number, loss=loss / weight, grad_norm=grad_norm)
        rate = self._optimizer.step(plan.lr_factor(number))
        seconds = perf_counter() - began
        return sums | {
            "grad_norm": (grad_norm, 1.0),
            "learning_rate": (rate, 1.0),
            "tokens_per_second": (tokens, seconds),
            "pairs_per_second": (float(len(indexes)), seconds),
        }

    def _read(self, pending: PendingSums, tokens: float, norm: torch.Tensor) -> tuple[MetricSums, float, float]:
        """Return the sums over all processes, their tokens, and the gradient norm, in one copy from the device."""
        counted = to_device(torch.tensor([tokens], dtype=pending.numbers.dtype), pending.numbers.device)
        summed = self._inputs.process_group.all_reduce(torch.cat([pending.numbers, counted]))
        *numbers, tokens, grad_norm = cast("list[float]", torch.cat([summed, norm.to(summed.dtype)[None]]).tolist())
        return pending.complete(numbers), tokens, grad_norm

    def _shares(self, indexes: Sequence[int]) -> list[list[list[int]]]:
        """Return the micro-batches of each process, as positions in the update."""
        lengths, budget = [self._costs[i] for i in indexes], self._training.tokens_per_micro_batch
        size = self._inputs.process_group.size
        return [
            pair_batches(self._inputs.pair_model, lengths, range(rank, len(indexes), size), budget)
            for rank in range(size)
        ]

    def _prepare(self, indexes: Sequence[int], positions: Sequence[int]) -> PreparedPairs:
        inputs, batch = self._inputs, [indexes[position] for position in positions]
        reference = None if inputs.reference is None else inputs.reference.select(batch)
        return inputs.pair_model.prepare([inputs.train.pair(i) for i in batch], self._loss, reference)

    def _prepare_first(self, number: int) -> None:
        """Lay out the first micro-batch of an update while the device still computes the one before."""
        indexes = self.plan.order.pairs_of(number)
        self._first = number, self._prepare(indexes, self._shares(indexes)[self._inputs.process_group.rank][0])

    def _accumulate(self, number: int, indexes: Sequence[int]) -> tuple[PendingSums, float]:
        """Add the gradients of this process's micro-batches; return their sums and tokens.

        Nothing here waits for a GPU: it computes a micro-batch while the host lays out the next.
        """
        model, process_group, pairs = self._inputs.pair_model, self._inputs.process_group, self._inputs.train
        totals = UpdateTotals.from_lengths(
            [int(pairs.prompt_lengths[i]) for i in indexes], [int(pairs.chosen_lengths[i]) for i in indexes]
        )
        shares = self._shares(indexes)
        first = None if self._first is None or self._first[0] != number else self._first[1]
        self._first = None
        before = model.counters.tokens
        update_logps = self._update_logps(indexes) if required_stats(self._loss).couples_pairs else None

        def run_micro_batch(
            positions: Sequence[int], backward: Callable[[torch.Tensor], None], prepared: PreparedPairs | None = None
        ) -> LossTerms:
            with process_group.autocast(self._training.bf16, cache_weights=not model.sharded):
                return model.backward(
                    prepared or self._prepare(indexes, positions),
                    self._loss,
                    None,
                    totals,
                    backward,
                    None if update_logps is None else UpdateLogps(update_logps, positions),
                )

        def zero_backward(loss: torch.Tensor) -> None:
            (loss * 0.0).backward()

        parts: list[PendingSums] = []
        for positions in shares[process_group.rank]:
            self._inputs.cancel_token.check()
            parts.append(PendingSums.of(run_micro_batch(positions, torch.Tensor.backward, first)))
            first = None
        done = model.counters.tokens
        if model.sharded:
            for _ in range(max(map(len, shares)) - len(parts)):  # the others need this one's shards
                run_micro_batch(shares[process_group.rank][0], zero_backward)
        return reduce(add, parts), float(done - before)

    def _update_logps(self, indexes: Sequence[int]) -> PairLogps:
        """Return the log-probs of all pairs of an update, in an extra pass, for objectives that couple them."""
        inputs, budget = self._inputs, self._training.tokens_per_micro_batch
        with inputs.process_group.autocast(self._training.bf16, cache_weights=not inputs.pair_model.sharded):
            found = score_pairs(
                inputs.pair_model,
                inputs.train,
                required_stats(self._loss),
                budget,
                inputs.process_group,
                inputs.cancel_token.check,
                indexes,
            )
        reference = None if inputs.reference is None else inputs.reference.select(list(indexes))
        return replace(found, reference=reference).to(inputs.process_group.device)
