"""What is seen of an update that somebody else takes: the guard before each step, the metrics after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from torch import Tensor

from trainer.metrics import METRICS
from trainer.objectives.pair_logps import PairLogps
from trainer.objectives.pair_metrics import Totals, add_totals, ruler_totals
from trainer.training.engine import Course
from trainer.world import Patience


class Watch:
    """Stands beside a TRL trainer; `give` takes the totals of each update."""

    def __init__(self, course: Course, done: int, patience: Patience, give: Callable[[Totals], None]) -> None:
        self.done = done
        """Updates taken so far, those of earlier attempts included."""
        self.total = course.total
        self._course, self._patience, self._give = course, patience, give
        self._micro_batches: list[Totals] = []
        self._positions = 0
        self._loss = 0.0
        self._began = perf_counter()

    def before(self) -> None:
        """A micro-batch is about to be computed. Raises Interrupted when asked to stop."""
        self._patience.pause()
        if not self._micro_batches:
            self._course.draw(self.done + 1)

    def pairs(self, chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> None:
        """TRL's summed log-probs of the micro-batch's pairs, and how many tokens they are of; [N] each."""
        logps = PairLogps(chosen.detach().double(), rejected.detach().double(), chosen_tokens, rejected_tokens)
        self._micro_batches.append(ruler_totals(logps))

    def after(self, loss: Tensor, positions: int) -> None:
        """The loss of the micro-batch, and the positions (padding included) that it took."""
        self._positions += positions
        self._course.check(self.done + 1, loss=float(loss))
        self._loss = float(loss)

    def gradient(self, norm: float) -> None:
        """The norm of the update's gradient, before the step."""
        self._course.check(self.done + 1, loss=self._loss, norm=norm)

    def said(self, logs: Mapping[str, float]) -> None:
        """What the trainer logs of an update; other messages of its have no loss and are passed over."""
        if "loss" not in logs:
            return
        seen = add_totals(self._micro_batches)
        pairs = self._course.training.pairs_per_update
        seconds = perf_counter() - self._began
        # Names that both have mean the same, but for ORPO's nll_loss, which TRL takes over the prompt too.
        theirs: Totals = {
            name: (float(value) * pairs, float(pairs))
            for name, value in logs.items()
            if name in METRICS and name not in seen and name != "epoch"
        }
        theirs |= {name: (float(logs[name]), 1.0) for name in ("loss", "grad_norm", "learning_rate")}
        speed: Totals = {
            "tokens_per_second": (float(self._positions), seconds),
            "pairs_per_second": (float(pairs), seconds),
        }
        self._micro_batches, self._positions = [], 0
        self.done += 1
        self._give(theirs | seen | speed)
        self._began = perf_counter()
