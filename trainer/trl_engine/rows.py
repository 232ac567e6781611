"""The tokenised pairs in the run's own order, as TRL's collators take them. TRL neither tokenises nor shuffles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from trainer.data.pairs import Ids, Pair, PairSet
from trainer.loss_config import DpoLoss
from trainer.objectives.dpo import desensitised
from trainer.objectives.pair_logps import PairLogps
from trainer.training.engine import Course

Row = Callable[[int], dict[str, Any]]
"""The number of a pair -> what a collator makes a batch of."""


class Rows(Dataset[dict[str, Any]]):
    """The pairs of all updates after `done`, end to end: one pass over this is the rest of the run."""

    def __init__(self, course: Course, done: int, row: Row) -> None:
        self._course, self._done, self._row = course, done, row
        self._per_update = course.training.pairs_per_update
        self._step, self._update = -1, list[int]()

    def __len__(self) -> int:
        return (self._course.total - self._done) * self._per_update

    def __getitem__(self, place: int) -> dict[str, Any]:
        updates, within = divmod(place, self._per_update)
        if self._done + updates + 1 != self._step:
            self._step = self._done + updates + 1
            self._update = self._course.order.update(self._step)
        return self._row(self._update[within])

    def map(self, *_: Any, **__: Any) -> Rows:
        """Itself: CPOTrainer and ORPOTrainer map a data set through template and tokenizer, which this one has seen."""
        return self


def preference_rows(pairs: PairSet, loss: DpoLoss, reference: PairLogps) -> Row:
    """As DataCollatorForPreference takes them, with the start model's log-probs as DPOTrainer would precompute them."""
    chosen, rejected = (sums.tolist() for sums in desensitised(loss, reference))

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


def labelled_rows(pairs: PairSet) -> Row:
    """As DPODataCollatorWithPadding takes them, for CPOTrainer and ORPOTrainer."""

    def row(index: int) -> dict[str, Any]:
        pair: Pair = pairs.pair(index)
        prompt = pair.prompt.tolist()
        return _labelled("chosen", prompt, pair.chosen) | _labelled("rejected", prompt, pair.rejected)

    return row


def _labelled(side: str, prompt: list[int], response: Ids) -> dict[str, Any]:
    scored: list[int] = response.tolist()
    return {
        f"{side}_input_ids": prompt + scored,
        f"{side}_attention_mask": [1] * (len(prompt) + len(scored)),
        f"{side}_labels": [-100] * len(prompt) + scored,
    }
