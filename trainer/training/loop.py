"""The training loop: a generator of points. Who consumes it decides how far it goes.

Everything that chance decides is a function of the seed, the update and the process: the order of the pairs, the
schedule, dropout where it was asked for. So an update is the same whether the run came here in one go or was continued.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from trainer.config import TrialConfig
from trainer.data.pairs import PairSet
from trainer.errors import ResumeError, TrialError
from trainer.evaluation.scoring import pair_costs, score
from trainer.forward.layout import micro_batches
from trainer.forward.pair_model import PairModel, WholeUpdate
from trainer.models.live import LiveModel
from trainer.objectives.losses import needs
from trainer.objectives.pair_logps import Normaliser, PairLogps
from trainer.objectives.pair_metrics import Totals, add_totals, means, metric_totals
from trainer.report import Ending, EndKind, Point
from trainer.storage import checkpoint
from trainer.training.optimiser import Optimiser
from trainer.training.schedule import Order, every, rate_factor, total_updates
from trainer.world import Interrupted, Patience, World

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Material:
    """What a run trains with, already loaded. `evaluate(last)` gives the `eval_` metrics of the model as it is now."""

    live: LiveModel
    model: PairModel
    train: PairSet
    reference: PairLogps | None
    start: dict[str, float]
    """Metrics of the start model: the point at step 0."""
    evaluate: Callable[[bool], dict[str, float]]
    world: World
    patience: Patience


class _Diverged(Exception):
    """A loss, a gradient or a held-out metric is not finite; the message has the numbers."""


class Run:
    """One trial's updates from its start, or from a checkpoint's state. `config_digest` names its configuration."""

    def __init__(
        self, config: TrialConfig, material: Material, folder: Path, earlier: Sequence[Path], config_digest: str
    ) -> None:
        training = config.training
        self._config, self._training, self._material = config, training, material
        self._folder, self._places, self._digest = folder, [*earlier, folder], config_digest
        self.total = total_updates(training, len(material.train))
        if training.pairs_per_update < material.world.size:
            raise TrialError(
                f"pairs_per_update {training.pairs_per_update} cannot be shared among {material.world.size} processes"
            )
        self._order = Order(len(material.train), training.pairs_per_update, training.seed)
        self._factor = rate_factor(training, self.total)
        self._eval_every = every(training.eval_steps, self.total)
        self._save_every = training.save_steps or self._eval_every
        self._trained = material.live.trained()
        self._optimiser = Optimiser(material.live.base, self._trained, training)
        self._lengths = pair_costs(material.model, material.train)
        self._step = 0
        self._saved_at = 0
        self._window: Totals = {}
        self.history: list[Point] = []

    def restore(self, state: checkpoint.State) -> None:
        """Take over a checkpoint's state. ResumeError where it is of other weights than this trial trains."""
        if state.weights.keys() != self._trained.keys():
            raise ResumeError(f"the checkpoint of update {state.step} holds other weights than this trial trains")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state.weights[name])
        self._optimiser.load(state.optimiser)
        self._step = self._saved_at = state.step
        self._window = dict(state.window)
        self.history = list(state.history)

    def points(self) -> Generator[Point, None, Ending]:
        """Train; earlier points first. Closing the generator stops at once and saves nothing."""
        yield from list(self.history)
        try:
            if not self.history:
                yield self._remember(self._finite(Point(0, self._material.start)))
            while True:
                # A run that was interrupted while it evaluated comes here with its point still to be said.
                if self.history[-1].step < self._step and (metrics := self._metrics()):
                    yield self._remember(self._finite(Point(self._step, metrics)))
                if self._step == self.total:
                    break
                if self._step % self._save_every == 0 and self._step > self._saved_at:
                    self._save()
                self._material.patience.settle()
                self._update(self._step + 1)
                self._step += 1
        except _Diverged as why:
            return Ending(EndKind.DIVERGED, str(why), self._step)
        except Interrupted:
            if self._step > self._saved_at:
                self._save()
            return Ending(EndKind.STOPPED, f"interrupted after update {self._step} of {self.total}", self._step)
        return Ending(EndKind.FINISHED, f"{self.total} updates done", self._step, self._folder / "model")

    def _remember(self, point: Point) -> Point:
        self.history.append(point)
        return point

    # --- one update --------------------------------------------------------------------------------------------------

    def _update(self, step: int) -> None:
        began = perf_counter()
        world, seed = self._material.world, self._training.seed
        torch.manual_seed(int(np.random.SeedSequence([seed, step, world.rank]).generate_state(1)[0]))
        indexes = self._order.update(step)
        totals = world.add(self._accumulate(indexes))
        loss, weight = totals["loss"]
        if not math.isfinite(loss):
            raise _Diverged(self._told(step, f"the loss is {loss / weight}"))
        world.add_gradients(self._trained.values())
        norm = self._optimiser.clip()
        if not math.isfinite(norm):
            raise _Diverged(self._told(step, f"the gradient's norm is {norm} at a loss of {loss / weight:.6g}"))
        rate = self._optimiser.step(self._factor(step))
        seconds = perf_counter() - began
        totals |= {
            "grad_norm": (norm, 1.0),
            "learning_rate": (rate, 1.0),
            "tokens_per_second": (totals["tokens_per_second"][0], seconds),
            "pairs_per_second": (float(len(indexes)), seconds),
        }
        if self._window:
            # The rate of the last update is what a schedule shows; everything else is averaged.
            self._window["learning_rate"] = (0.0, 0.0)
        self._window = add_totals([self._window, totals]) if self._window else totals

    def _accumulate(self, indexes: Sequence[int]) -> Totals:
        material, world, pairs = self._material, self._material.world, self._material.train
        norm = Normaliser.of_lengths(
            [int(pairs.prompt_lengths[i]) for i in indexes], [int(pairs.chosen_lengths[i]) for i in indexes]
        )
        mine = list(range(world.rank, len(indexes), world.size))
        lengths = [self._lengths[i] for i in indexes]
        batches = micro_batches(lengths, mine, self._training.tokens_per_micro_batch)
        before = material.model.counters.tokens
        whole = self._whole(indexes) if needs(self._config.loss).whole_update else None
        parts: list[Totals] = []
        for places in batches:
            material.patience.pause()
            batch = [indexes[place] for place in places]
            with world.autocast(self._training.bf16):
                terms = material.model.backward(
                    [pairs.pair(i) for i in batch],
                    self._config.loss,
                    None if material.reference is None else material.reference.rows(batch),
                    norm,
                    world.accelerator.backward,
                    None if whole is None else WholeUpdate(whole, places),
                )
            parts.append(metric_totals(terms))
        return add_totals(parts) | {"tokens_per_second": (float(material.model.counters.tokens - before), 0.0)}

    def _whole(self, indexes: Sequence[int]) -> PairLogps:
        """A first visit, for objectives that couple the pairs: the log-probs of all pairs of the update."""
        material, budget = self._material, self._training.tokens_per_micro_batch
        wanted = needs(self._config.loss)
        with material.world.autocast(self._training.bf16):
            found = score(
                material.model, material.train, wanted, budget, material.world, material.patience.pause, indexes
            )
        reference = None if material.reference is None else material.reference.rows(list(indexes))
        return found.against(reference).to(material.world.device)

    def _told(self, step: int, what: str) -> str:
        rate = self._training.learning_rate * self._factor(step)
        return f"update {step} of {self.total}: {what} (learning rate {rate:.3g}); its step was not taken"

    # --- what is said and kept ---------------------------------------------------------------------------------------

    def _metrics(self) -> dict[str, float]:
        last = self._step == self.total
        evaluated = last or self._step % self._eval_every == 0
        held_out = self._material.evaluate(last) if evaluated else {}
        # The window is emptied only now: an interruption while evaluating leaves it whole.
        if not (last or self._step % self._training.logging_steps == 0):
            return held_out
        trained = means(self._window)
        trained["epoch"] = self._step * self._training.pairs_per_update / len(self._material.train)
        self._window = {}
        return trained | held_out

    def _finite(self, point: Point) -> Point:
        bad = [f"{name} {value}" for name, value in point.metrics.items() if not math.isfinite(value)]
        if bad:
            raise _Diverged(f"after update {point.step} of {self.total} not finite: {', '.join(bad)}")
        return point

    def _save(self) -> None:
        world = self._material.world
        if world.is_main:
            state = checkpoint.State(
                self._digest, self._step, self._trained, self._optimiser.state(), self.history, self._window
            )
            place = checkpoint.save(self._folder, state)
            checkpoint.discard(self._places, before=self._step)
            log.info("checkpoint of update %d: %s", self._step, place)
        world.wait()
        self._saved_at = self._step
