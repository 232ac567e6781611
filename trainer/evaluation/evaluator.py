"""`Evaluator`: log-probs and metrics of held-out pairs and prompts under the current model, and their files.

Pairs are scored in batches within a token budget, over all processes.
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
from trainer.data.pair_dataset import PairDataset
from trainer.distributed.fsdp import reshard
from trainer.distributed.processes import CancelToken, ProcessGroup
from trainer.evaluation.completions import Completion, complete_greedily, completion_metrics, select_prompts
from trainer.forward.packing import micro_batches, packed_lengths
from trainer.forward.pair_model import PairModel
from trainer.metrics import EVAL
from trainer.models.model_files import end_token_ids
from trainer.objectives.losses import pair_loss, required_stats
from trainer.objectives.pair_logps import PairLogps, RequiredStats, UpdateNormalizer, metric_means, metric_sums
from trainer.storage.atomic_files import write_file


def pair_costs(model: PairModel, pairs: PairDataset, indexes: Sequence[int] | None = None) -> list[int]:
    """Positions that each of these pairs (by default all) costs the model: the prompt once when packed, else twice."""
    where = slice(None) if indexes is None else list(indexes)
    prompt, chosen, rejected = (
        [int(n) for n in lengths[where]]
        for lengths in (pairs.prompt_lengths, pairs.chosen_lengths, pairs.rejected_lengths)
    )
    if model.mode == "packed":
        return packed_lengths(prompt, chosen, rejected, None if model.rotary is None else model.rotary.key)
    return [2 * (p + max(c, r) - 1) for p, c, r in zip(prompt, chosen, rejected, strict=True)]


def longest_sequence(pairs: PairDataset) -> int:
    """Tokens of the longest prompt with its response; 0 for no pairs."""
    lengths = pairs.prompt_lengths + np.maximum(pairs.chosen_lengths, pairs.rejected_lengths)
    return int(lengths.max(initial=0))


def pair_batches(model: PairModel, costs: Sequence[int], positions: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of these places (indexes into `costs`) of at most `budget` positions, padding included.

    Where pairs are padded, those of like length go together. Which pairs share a batch depends on `costs` and `budget`
    alone.
    """
    if model.mode == "packed":
        return micro_batches(costs, positions, budget)
    return micro_batches(
        costs, sorted(positions, key=lambda position: (costs[position], position)), budget, padded=True
    )


def score_pairs(
    model: PairModel,
    pairs: PairDataset,
    required: RequiredStats,
    budget: int,
    process_group: ProcessGroup,
    check_cancelled: Callable[[], None],
    indexes: Sequence[int] | None = None,
) -> PairLogps:
    """Log-probs of these pairs (by default all) in this order, on the CPU, the same in every process.

    Batches hold pairs of like length; which pairs share a batch depends on the lengths and the budget alone, so that
    the result is the same to the bit however many processes there are.
    """
    selected = range(len(pairs)) if indexes is None else indexes
    lengths = pair_costs(model, pairs, indexes)
    by_length = sorted(range(len(selected)), key=lambda position: (lengths[position], position))
    batches = pair_batches(model, lengths, by_length, budget)
    mine = batches[process_group.rank :: process_group.size]
    found: list[PairLogps] = []
    for batch in mine:
        check_cancelled()
        found.append(model.logps([pairs.pair(selected[position]) for position in batch], required).to("cpu"))
    if model.sharded and len(mine) < len(batches[:: process_group.size]):
        model.logps(
            [pairs.pair(selected[position]) for position in batches[0]], required
        )  # the others still need its slices
    order = [position for batch in mine for position in batch]
    return _gather_in_order(found, order, len(selected), process_group)


def _gather_in_order(
    found: Sequence[PairLogps], order: Sequence[int], count: int, process_group: ProcessGroup
) -> PairLogps:
    part = PairLogps.cat(found).columns() if found else {}
    if process_group.size == 1:
        positions = torch.empty(count, dtype=torch.long)
        positions[torch.tensor(order, dtype=torch.long)] = torch.arange(count)
        return PairLogps.from_columns({name: column[positions] for name, column in part.items()})
    names = process_group.broadcast(sorted(part))
    columns: dict[str, torch.Tensor] = {}
    for name in names:
        # Token counts are far below 2**53: float64 carries them exactly.
        full = torch.zeros(count, dtype=torch.float64)
        if part:
            full[torch.tensor(order, dtype=torch.long)] = part[name].double()
        process_group.all_reduce(full)
        columns[name] = full.long() if name.endswith("_tokens") else full
    return PairLogps.from_columns(columns)


def eval_metrics(loss: LossConfig, logps: PairLogps, prompt_lengths: Sequence[int]) -> dict[str, float]:
    """The held-out metrics by their `eval_` names; `logps` are of the whole set, with reference where one is needed."""
    norm = UpdateNormalizer.from_lengths(prompt_lengths, [int(n) for n in logps.chosen_tokens])
    found = metric_means(metric_sums(pair_loss(loss, logps, norm)))
    return {f"{EVAL}{name}": value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Looks at one model with one trial's settings: log-probs of the held-out pairs, answers to fixed prompts."""

    config: TrialConfig
    policy: PreTrainedModel
    pair_model: PairModel
    tokenizer: PreTrainedTokenizerBase
    pairs: PairDataset
    process_group: ProcessGroup
    cancel_token: CancelToken
    stops: tuple[int, ...] = ()
    """Tokens with which the data's responses end."""

    def logps(self, pairs: PairDataset, indexes: Sequence[int] | None = None) -> PairLogps:
        """Log-probs of these pairs (by default all), on the CPU."""
        training = self.config.training
        with _eval_mode(self.policy), self.process_group.autocast(training.bf16, keep=not self.pair_model.sharded):
            return score_pairs(
                self.pair_model,
                pairs,
                # The held-out metrics compare both responses, whatever the objective itself reads.
                replace(required_stats(self.config.loss), rejected=True),
                training.tokens_per_micro_batch,
                self.process_group,
                self.cancel_token.check,
                indexes,
            )

    def completions(self) -> list[Completion]:
        """Greedy answers to the first `evaluation.prompts` distinct held-out prompts; every process returns all of the
        first one's.
        """
        evaluation, training = self.config.evaluation, self.config.training
        with _eval_mode(self.policy), self.process_group.autocast(training.bf16, keep=not self.pair_model.sharded):
            found = complete_greedily(
                self.policy,
                self.tokenizer,
                self.pairs,
                select_prompts(self.pairs, evaluation.prompts),
                max_new_tokens=evaluation.max_new_tokens,
                budget=training.tokens_per_micro_batch,
                check_cancelled=self.cancel_token.check,
                stops=self.stops,
            )
        if self.process_group.size == 1:
            return found
        return [
            Completion(**json.loads(one))
            for one in self.process_group.broadcast([json.dumps(asdict(one)) for one in found])
        ]

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return end_token_ids(self.policy, self.tokenizer, self.stops)

    def metrics(self, logps: PairLogps, reference: PairLogps, completions: Sequence[Completion]) -> dict[str, float]:
        """All `eval_` metrics; `reference` are the initial model's log-probs of the same pairs."""
        against = logps.with_reference(reference) if required_stats(self.config.loss).reference else logps
        held_out = eval_metrics(self.config.loss, against, [int(n) for n in self.pairs.prompt_lengths])
        return held_out | self.completion_metrics(completions)

    @staticmethod
    def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
        """The `eval_` metrics that follow from answers alone."""
        return {f"{EVAL}{name}": value for name, value in completion_metrics(completions).items()}


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Generator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        reshard(model)
        model.train(before)


def write_eval_pairs(path: Path, logps: PairLogps, initial: PairLogps, pairs: PairDataset) -> None:
    """The log-probs of every held-out pair, [N] each, with its `source` and `row`: what paired tests compare.

    `start_chosen` and `start_rejected` are the initial model's of the same pairs.
    """
    columns = logps.columns() | {
        "start_chosen": initial.chosen,
        "start_rejected": initial.rejected,
        "source": torch.as_tensor(pairs.sources).clone(),
        "row": torch.as_tensor(pairs.rows).clone(),
    }
    write_file(path, lambda temporary: save_file(columns, temporary))
