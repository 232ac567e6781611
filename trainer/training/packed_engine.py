"""`PackedEngine`: packed micro-batches, output layer in chunks, fused AdamW.

All randomness (data order, configured dropout) is a function of the seed, the update and the process, so that an update
is the same in a resumed run as in an uninterrupted one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import add
from time import perf_counter
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.config.loss_config import DpoLoss
from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import MismatchedPairs, mismatched_pairs
from trainer.distributed.fsdp import as_shard, shard_of
from trainer.evaluation.evaluator import (
    eval_mode,
    pair_batches,
    pair_costs,
    score_mismatched,
    score_pairs,
)
from trainer.forward.pair_model import PreparedPairs, UpdateLogps
from trainer.objectives.losses import required_stats
from trainer.objectives.pair_logps import (
    LossTerms,
    MetricSums,
    PairLogps,
    PendingSums,
    UpdateTotals,
    kl_estimate,
    to_device,
)
from trainer.training.engine import TrainingInputs, UpdatePlan
from trainer.training.optimizer import Optimizer

_log = logging.getLogger(__name__)
_REFERENCE = "reference."


class MovingReference:
    """TR-DPO's reference model (Gorbatovski et al. 2024, arXiv 2404.09656): a second set of the trained weights.

    Every `ref_model_sync_steps` updates it becomes alpha * policy + (1 - alpha) * reference, alpha being
    `ref_model_mixup_alpha`, as by TRL's SyncRefModelCallback. It begins as the model does. Its log-probs are computed
    by the model, whose weights are exchanged meanwhile. Of sharded weights it has this process's shards.
    """

    def __init__(self, loss: DpoLoss, trained: Mapping[str, nn.Parameter]) -> None:
        self._alpha, self._every, self._trained = loss.ref_model_mixup_alpha, loss.ref_model_sync_steps, trained
        self._weights = {name: _local(parameter).clone() for name, parameter in trained.items()}

    @contextmanager
    def in_model(self) -> Generator[None]:
        """Put the reference's weights into the model for the time of the context; no gradient may be pending."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._trained.items():
            weight, kept = _local(parameter), self._weights[name].clone()
            self._weights[name].copy_(weight)
            weight.copy_(kept)

    def after_update(self, number: int) -> None:
        """Move the reference towards the policy if it is due after update `number`."""
        if number % self._every == 0:
            for name, parameter in self._trained.items():
                self._weights[name].mul_(1.0 - self._alpha).add_(_local(parameter), alpha=self._alpha)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights as `reference.<parameter>`, sharded like the parameters."""
        return {
            f"{_REFERENCE}{name}": as_shard(weight, like)
            if isinstance(like := self._trained[name], DTensor)
            else weight
            for name, weight in self._weights.items()
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load full tensors as of `state_dict`; without them (a fork of a run whose reference does not move) the
        reference stays the initial model.
        """
        for name, weight in self._weights.items():
            full = state.get(f"{_REFERENCE}{name}")
            if full is not None:
                like = self._trained[name]
                weight.copy_(shard_of(full, like) if isinstance(like, DTensor) else full)


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """Return a parameter, or this process's shard of it, without autograd; shares its memory."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


class PackedEngine:
    """Takes updates with `PairModel`; several processes share the pairs of an update."""

    def __init__(self, config: TrialConfig, inputs: TrainingInputs) -> None:
        self.plan = UpdatePlan(config, inputs)
        self._loss, self._training, self._inputs = config.loss, config.training, inputs
        self._trained = inputs.policy.trainable_parameters()
        self._optimizer = Optimizer(inputs.policy.base, self._trained, config.training)
        self._costs = pair_costs(inputs.pair_model, inputs.train)
        self._moving: MovingReference | None = None
        if isinstance(config.loss, DpoLoss) and config.loss.moves_reference:
            self._moving = MovingReference(config.loss, self._trained)
            self._warn_if_still(config.loss.ref_model_sync_steps)
        self._mismatched = mismatched_pairs(inputs.train) if config.loss.scores_mismatched else None
        self._first: tuple[int, PreparedPairs] | None = None
        """An update, and its first micro-batch."""

    def trainable_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return self._trained

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return the optimizer's moments by name, and the weights of a moving reference."""
        return self._optimizer.state_dict() | ({} if self._moving is None else self._moving.state_dict())

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `state_dict` returned."""
        self._optimizer.load_state_dict({n: t for n, t in state.items() if not n.startswith(_REFERENCE)})
        if self._moving is not None:
            self._moving.load_state_dict(state)

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
        # A reference that depends on the model's weights has to wait for their update.
        if number < plan.total_updates and self._moving is None and self._mismatched is None:
            self._prepare_first(number + 1)
        # The host waits for the device here and at no other place of an update.
        sums, tokens, grad_norm = self._read(pending, tokens, norm)
        loss, weight = sums["loss"]
        plan.check_finite(number, loss=loss / weight, grad_norm=grad_norm)
        rate = self._optimizer.step(plan.lr_factor(number))
        if self._moving is not None:
            self._moving.after_update(number)
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

    def _prepare(self, indexes: Sequence[int], positions: Sequence[int], reference: PairLogps | None) -> PreparedPairs:
        """Lay out the pairs at these positions of an update; `reference` is that of the whole update."""
        inputs, batch = self._inputs, [indexes[position] for position in positions]
        part = None if reference is None else reference.select(list(positions))
        return inputs.pair_model.prepare([inputs.train.pair(i) for i in batch], self._loss, part)

    def _prepare_first(self, number: int) -> None:
        """Lay out the first micro-batch of an update while the device still computes the one before."""
        indexes = self.plan.order.pairs_of(number)
        first = self._shares(indexes)[self._inputs.process_group.rank][0]
        self._first = number, self._prepare(indexes, first, self._reference(indexes))

    def _reference(self, indexes: Sequence[int]) -> PairLogps | None:
        """Return the reference log-probs of an update's pairs on the CPU: cached ones, or of the moving reference."""
        inputs, chosen = self._inputs, list(indexes)
        if self._moving is not None:
            with self._moving.in_model(), eval_mode(inputs.policy.base):
                found = self._logps(indexes).to("cpu")
        elif inputs.reference is None:
            return None
        else:
            found = inputs.reference.select(chosen)
        if self._mismatched is not None:
            found = self._with_kl(found, self._mismatched, indexes)
        return found if inputs.score_gap is None else replace(found, score_gap=inputs.score_gap[chosen])

    def _with_kl(self, reference: PairLogps, mismatched: MismatchedPairs, indexes: Sequence[int]) -> PairLogps:
        """Add the estimate of the KL divergence over all pairs of an update, from an extra pass without gradient."""
        inputs, training = self._inputs, self._training
        with (
            eval_mode(inputs.policy.base),
            inputs.process_group.autocast(training.bf16, cache_weights=not inputs.pair_model.sharded),
        ):
            found = score_mismatched(
                inputs.pair_model,
                inputs.train,
                mismatched,
                training.tokens_per_micro_batch,
                inputs.process_group,
                inputs.cancel_token.check,
                indexes,
            )
        policy = found.to("cpu")
        return replace(reference, kl=kl_estimate((policy.chosen, policy.rejected), reference).repeat(len(reference)))

    def _accumulate(self, number: int, indexes: Sequence[int]) -> tuple[PendingSums, float]:
        """Add the gradients of this process's micro-batches; return their sums and tokens.

        Nothing here waits for a GPU: it computes a micro-batch while the host lays out the next.
        """
        model, process_group, pairs = self._inputs.pair_model, self._inputs.process_group, self._inputs.train
        totals = UpdateTotals.from_lengths(
            *(
                [int(lengths[i]) for i in indexes]
                for lengths in (pairs.prompt_lengths, pairs.chosen_lengths, pairs.rejected_lengths)
            )
        )
        shares = self._shares(indexes)
        first = None if self._first is None or self._first[0] != number else self._first[1]
        self._first = None
        before = model.counters.tokens
        reference = self._reference(indexes)
        update_logps = None
        if required_stats(self._loss).couples_pairs:
            update_logps = replace(self._logps(indexes), reference=reference).to(process_group.device)

        def run_micro_batch(
            positions: Sequence[int], backward: Callable[[torch.Tensor], None], prepared: PreparedPairs | None = None
        ) -> LossTerms:
            with process_group.autocast(self._training.bf16, cache_weights=not model.sharded):
                return model.backward(
                    prepared or self._prepare(indexes, positions, reference),
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

    def _logps(self, indexes: Sequence[int]) -> PairLogps:
        """Return the log-probs of all pairs of an update under the model as it is, in an extra pass, on its device."""
        inputs, budget = self._inputs, self._training.tokens_per_micro_batch
        with inputs.process_group.autocast(self._training.bf16, cache_weights=not inputs.pair_model.sharded):
            return score_pairs(
                inputs.pair_model,
                inputs.train,
                required_stats(self._loss),
                budget,
                inputs.process_group,
                inputs.cancel_token.check,
                indexes,
            )

    def _warn_if_still(self, every: int) -> None:
        if every >= self.plan.total_updates:
            _log.warning(
                "loss.ref_model_sync_steps %d: the reference does not move in %d updates, so this is DPO",
                every,
                self.plan.total_updates,
            )
