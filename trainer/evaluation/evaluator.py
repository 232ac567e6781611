"""The held-out pairs and prompts under the model as it is now, and what of it is kept as files.

Log-probs of a whole set of pairs under the model as it is now, by token budget and over all processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.loss_config import LossConfig
from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import PairSet
from trainer.distributed.fsdp import let_go
from trainer.distributed.processes import Patience, World
from trainer.evaluation.completions import Answer, answer_greedily, answer_metrics, chosen_prompts
from trainer.forward.packing import micro_batches, packed_lengths
from trainer.forward.pair_model import PairModel
from trainer.metrics import EVAL
from trainer.models.model_files import end_tokens
from trainer.objectives.losses import needs, pair_loss
from trainer.objectives.pair_logps import Needs, Normaliser, PairLogps, means, metric_totals
from trainer.storage.atomic_files import write_file


def pair_costs(model: PairModel, pairs: PairSet, indexes: Sequence[int] | None = None) -> list[int]:
    """Positions that each of these pairs (by default all) costs the model: the prompt once when packed, else twice."""
    where = slice(None) if indexes is None else list(indexes)
    prompt, chosen, rejected = (
        [int(n) for n in lengths[where]]
        for lengths in (pairs.prompt_lengths, pairs.chosen_lengths, pairs.rejected_lengths)
    )
    if model.mode == "packed":
        return packed_lengths(prompt, chosen, rejected, None if model.rotary is None else model.rotary.key)
    return [2 * (p + max(c, r) - 1) for p, c, r in zip(prompt, chosen, rejected, strict=True)]


def longest_sequence(pairs: PairSet) -> int:
    """Tokens of the longest prompt with its response; 0 for no pairs."""
    lengths = pairs.prompt_lengths + np.maximum(pairs.chosen_lengths, pairs.rejected_lengths)
    return int(lengths.max(initial=0))


def pair_batches(model: PairModel, costs: Sequence[int], places: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of these places (indexes into `costs`) of at most `budget` positions, padding included.

    Where pairs are padded, those of like length go together. Which pairs share a batch depends on `costs` and `budget`
    alone.
    """
    if model.mode == "packed":
        return micro_batches(costs, places, budget)
    return micro_batches(costs, sorted(places, key=lambda place: (costs[place], place)), budget, padded=True)


def score(
    model: PairModel,
    pairs: PairSet,
    needs: Needs,
    budget: int,
    world: World,
    pause: Callable[[], None],
    indexes: Sequence[int] | None = None,
) -> PairLogps:
    """Log-probs of these pairs (by default all) in this order, on the CPU, the same in every process.

    Batches hold pairs of like length; which pairs share a batch depends on the lengths and the budget alone, so that
    the result is the same to the bit however many processes there are.
    """
    wanted = range(len(pairs)) if indexes is None else indexes
    lengths = pair_costs(model, pairs, indexes)
    by_length = sorted(range(len(wanted)), key=lambda place: (lengths[place], place))
    batches = pair_batches(model, lengths, by_length, budget)
    mine = batches[world.rank :: world.size]
    found: list[PairLogps] = []
    for batch in mine:
        pause()
        found.append(model.logps([pairs.pair(wanted[place]) for place in batch], needs).to("cpu"))
    if model.sharded and len(mine) < len(batches[:: world.size]):
        model.logps([pairs.pair(wanted[place]) for place in batches[0]], needs)  # the others still need its slices
    order = [place for batch in mine for place in batch]
    return _in_order(found, order, len(wanted), world)


def _in_order(found: Sequence[PairLogps], order: Sequence[int], count: int, world: World) -> PairLogps:
    part = PairLogps.cat(found).columns() if found else {}
    if world.size == 1:
        places = torch.empty(count, dtype=torch.long)
        places[torch.tensor(order, dtype=torch.long)] = torch.arange(count)
        return PairLogps.from_columns({name: column[places] for name, column in part.items()})
    names = world.agree(sorted(part))
    columns: dict[str, torch.Tensor] = {}
    for name in names:
        # Token counts are far below 2**53: float64 carries them exactly.
        whole = torch.zeros(count, dtype=torch.float64)
        if part:
            whole[torch.tensor(order, dtype=torch.long)] = part[name].double()
        world.add_tensor(whole)
        columns[name] = whole.long() if name.endswith("_tokens") else whole
    return PairLogps.from_columns(columns)


def eval_metrics(loss: LossConfig, logps: PairLogps, prompt_lengths: Sequence[int]) -> dict[str, float]:
    """The held-out metrics by their `eval_` names; `logps` are of the whole set, with reference where one is needed."""
    norm = Normaliser.of_lengths(prompt_lengths, [int(n) for n in logps.chosen_tokens])
    found = means(metric_totals(pair_loss(loss, logps, norm)))
    return {f"{EVAL}{name}": value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Examiner:
    """Looks at one model with one trial's settings: log-probs of the held-out pairs, answers to fixed prompts."""

    config: TrialConfig
    live: PreTrainedModel
    model: PairModel
    tokenizer: PreTrainedTokenizerBase
    pairs: PairSet
    world: World
    patience: Patience
    stops: tuple[int, ...] = ()
    """Tokens with which the data's responses end."""

    def logps(self, pairs: PairSet, indexes: Sequence[int] | None = None) -> PairLogps:
        """Log-probs of these pairs (by default all), on the CPU."""
        training = self.config.training
        with _at_rest(self.live), self.world.autocast(training.bf16, keep=not self.model.sharded):
            return score(
                self.model,
                pairs,
                # The held-out metrics compare both responses, whatever the objective itself reads.
                replace(needs(self.config.loss), rejected=True),
                training.tokens_per_micro_batch,
                self.world,
                self.patience.pause,
                indexes,
            )

    def answers(self) -> list[Answer]:
        """Greedy answers to the first `evaluation.prompts` distinct held-out prompts; every process returns all of the
        first one's.
        """
        evaluation, training = self.config.evaluation, self.config.training
        with _at_rest(self.live), self.world.autocast(training.bf16, keep=not self.model.sharded):
            found = answer_greedily(
                self.live,
                self.tokenizer,
                self.pairs,
                chosen_prompts(self.pairs, evaluation.prompts),
                max_new_tokens=evaluation.max_new_tokens,
                budget=training.tokens_per_micro_batch,
                pause=self.patience.pause,
                stops=self.stops,
            )
        if self.world.size == 1:
            return found
        return [Answer(**json.loads(one)) for one in self.world.agree([json.dumps(asdict(one)) for one in found])]

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return end_tokens(self.live, self.tokenizer, self.stops)

    def metrics(self, logps: PairLogps, reference: PairLogps, answers: Sequence[Answer]) -> dict[str, float]:
        """All `eval_` metrics; `reference` are the start model's log-probs of the same pairs."""
        against = logps.against(reference) if needs(self.config.loss).reference else logps
        held_out = eval_metrics(self.config.loss, against, [int(n) for n in self.pairs.prompt_lengths])
        return held_out | self.of_answers(answers)

    @staticmethod
    def of_answers(answers: Sequence[Answer]) -> dict[str, float]:
        """The `eval_` metrics that follow from answers alone."""
        return {f"{EVAL}{name}": value for name, value in answer_metrics(answers).items()}


@contextmanager
def _at_rest(model: PreTrainedModel) -> Generator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        let_go(model)
        model.train(before)


def write_eval_pairs(path: Path, logps: PairLogps, start: PairLogps, pairs: PairSet) -> None:
    """The log-probs of every held-out pair, [N] each, with its `source` and `row`: what paired tests compare.

    `start_chosen` and `start_rejected` are the start model's of the same pairs.
    """
    columns = logps.columns() | {
        "start_chosen": start.chosen,
        "start_rejected": start.rejected,
        "source": torch.as_tensor(pairs.sources).clone(),
        "row": torch.as_tensor(pairs.rows).clone(),
    }
    write_file(path, lambda aside: save_file(columns, aside))
