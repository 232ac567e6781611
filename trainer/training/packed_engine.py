"""The product's own engine: packed micro-batches, output layer in chunks, fused AdamW.

Everything that chance decides is a function of the seed, the update and the process: the order of the pairs, the
schedule, dropout where it was asked for. So an update is the same whether the run came here in one go or was continued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import torch
from torch import nn

from trainer.config.trial import TrialConfig
from trainer.distributed.deepspeed_zero3 import Piece
from trainer.evaluation.evaluator import pair_batches, pair_costs, score
from trainer.forward.pair_model import WholeUpdate
from trainer.objectives.losses import needs
from trainer.objectives.pair_logps import LossTerms, Normaliser, PairLogps, Totals, add_totals, metric_totals
from trainer.training.engine import Course, Material
from trainer.training.optimizer import Optimiser


class PackedEngine:
    """One update after the other with `PairModel`; several processes share the pairs of an update."""

    def __init__(self, config: TrialConfig, material: Material) -> None:
        self.course = Course(config, material)
        self._loss, self._training, self._material = config.loss, config.training, material
        self._trained = material.live.trained()
        self._zero = material.live.zero
        self._optimiser = self._zero or Optimiser(material.live.base, self._trained, config.training)
        self._lengths = pair_costs(material.model, material.train)

    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters being trained, by name."""
        return self._trained

    def state(self) -> Mapping[str, torch.Tensor | Piece]:
        """The optimiser's moments by name."""
        return self._optimiser.state()

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        self._optimiser.load(state)

    def close(self) -> None:
        """Nothing was put on the model that would have to be taken off."""

    def update(self, step: int) -> Totals:
        """One update: gradients of all micro-batches and processes added, checked, clipped, stepped."""
        began = perf_counter()
        world, course = self._material.world, self.course
        course.draw(step)
        indexes = course.order.update(step)
        totals = world.add(self._accumulate(indexes))
        loss, weight = totals["loss"]
        course.check(step, loss=loss / weight)
        if not self._material.model.sharded:  # of sharded weights backward has added them
            world.add_gradients(self._trained.values())
        norm = self._optimiser.clip()
        course.check(step, loss=loss / weight, norm=norm)
        rate = self._optimiser.step(course.factor(step))
        seconds = perf_counter() - began
        return totals | {
            "grad_norm": (norm, 1.0),
            "learning_rate": (rate, 1.0),
            "tokens_per_second": (totals["tokens_per_second"][0], seconds),
            "pairs_per_second": (float(len(indexes)), seconds),
        }

    def _accumulate(self, indexes: Sequence[int]) -> Totals:
        model, world, pairs = self._material.model, self._material.world, self._material.train
        norm = Normaliser.of_lengths(
            [int(pairs.prompt_lengths[i]) for i in indexes], [int(pairs.chosen_lengths[i]) for i in indexes]
        )
        lengths, budget = [self._lengths[i] for i in indexes], self._training.tokens_per_micro_batch
        ranks = range(world.size)
        shares = [pair_batches(model, lengths, range(rank, len(indexes), world.size), budget) for rank in ranks]
        before = model.counters.tokens
        whole = self._whole(indexes) if needs(self._loss).whole_update else None

        def visit(places: Sequence[int], backward: Callable[[torch.Tensor], None]) -> LossTerms:
            batch = [indexes[place] for place in places]
            reference = self._material.reference
            with world.autocast(self._training.bf16, keep=not model.sharded):
                return model.backward(
                    [pairs.pair(i) for i in batch],
                    self._loss,
                    None if reference is None else reference.rows(batch),
                    norm,
                    backward,
                    None if whole is None else WholeUpdate(whole, places),
                )

        def add(loss: torch.Tensor) -> None:
            if self._zero is None:
                loss.backward()
            else:
                self._zero.backward(loss)

        parts: list[Totals] = []
        for places in shares[world.rank]:
            self._material.patience.pause()
            parts.append(metric_totals(visit(places, add)))
        done = model.counters.tokens
        if model.sharded:
            for _ in range(max(map(len, shares)) - len(parts)):  # the others still need this process's slices
                visit(shares[world.rank][0], lambda loss: add(loss * 0.0))
        return add_totals(parts) | {"tokens_per_second": (float(done - before), 0.0)}

    def _whole(self, indexes: Sequence[int]) -> PairLogps:
        """A first visit, for objectives that couple the pairs: the log-probs of all pairs of the update."""
        material, budget = self._material, self._training.tokens_per_micro_batch
        with material.world.autocast(self._training.bf16, keep=not material.model.sharded):
            found = score(
                material.model,
                material.train,
                needs(self._loss),
                budget,
                material.world,
                material.patience.pause,
                indexes,
            )
        reference = None if material.reference is None else material.reference.rows(list(indexes))
        return found.against(reference).to(material.world.device)
