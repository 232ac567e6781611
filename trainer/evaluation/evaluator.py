"""`Evaluator`: log-probs and metrics of held-out pairs and prompts under the current model.

Pairs are scored in batches within a token budget, distributed over all processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.loss_config import LossConfig
from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import MismatchedPairs, PairDataset, mismatched_pairs, select_prompts
from trainer.distributed.fsdp import reshard
from trainer.distributed.processes import CancelToken, ProcessGroup
from trainer.evaluation.completions import Completion, complete_greedily, completion_metrics
from trainer.forward.packing import TokenPair, micro_batches, packed_lengths
from trainer.forward.pair_model import PairModel
from trainer.metrics import EVAL_PREFIX
from trainer.models.model_files import end_token_ids
from trainer.objectives.losses import pair_loss, required_stats
from trainer.objectives.pair_logps import (
    PairLogps,
    RequiredStats,
    UpdateTotals,
    log_ratio_sums,
    metric_means,
    metric_sums,
    to_device,
)
from trainer.storage.atomic_files import write_file


def pair_costs(
    model: PairModel, pairs: PairDataset | MismatchedPairs, indexes: Sequence[int] | None = None
) -> list[int]:
    """Return the positions of each of these pairs (by default all).

    The prompt counts once when packed, else once a response.
    """
    selection = slice(None) if indexes is None else list(indexes)
    prompt, chosen, rejected = (
        [int(n) for n in lengths[selection]]
        for lengths in (pairs.prompt_lengths, pairs.chosen_lengths, pairs.rejected_lengths)
    )
    if model.mode == "packed":
        return packed_lengths(prompt, chosen, rejected, None if model.rotary is None else model.rotary.key)
    return [((c > 0) + (r > 0)) * (p + max(c, r) - 1) for p, c, r in zip(prompt, chosen, rejected, strict=True)]


def longest_sequence(pairs: PairDataset) -> int:
    """Return the tokens of the longest prompt with its response; 0 if there are no pairs."""
    lengths = pairs.prompt_lengths + np.maximum(pairs.chosen_lengths, pairs.rejected_lengths)
    return int(lengths.max(initial=0))


def pair_batches(model: PairModel, costs: Sequence[int], positions: Sequence[int], budget: int) -> list[list[int]]:
    """Split pair indexes into micro-batches that compute at most `budget` tokens, padding included.

    If pairs are padded, pairs of similar length are batched together. The batches depend on `costs` and `budget` only.
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
    """Return the log-probs of these pairs (by default all) in this order, equal in every process.

    Batches depend on the lengths and the budget only, so the result is bit-identical for any number of processes.
    """
    batches = _scoring_batches(model, pairs, budget, indexes)
    return _score_batches(model, pairs, required, batches, process_group, check_cancelled, indexes)


def score_mismatched(
    model: PairModel,
    pairs: PairDataset,
    mismatched: MismatchedPairs,
    budget: int,
    process_group: ProcessGroup,
    check_cancelled: Callable[[], None],
    indexes: Sequence[int] | None = None,
) -> PairLogps:
    """Do the same as `score_pairs` with the mismatched responses of these pairs.

    Each batch is one of `score_pairs` or a part of one, so that parts of whole batches give the same bits.
    """
    costs = pair_costs(model, mismatched, indexes)
    batches = [
        part
        for batch in _scoring_batches(model, pairs, budget, indexes)
        for part in micro_batches(costs, batch, budget, padded=model.mode != "packed")
    ]
    return _score_batches(model, mismatched, RequiredStats(), batches, process_group, check_cancelled, indexes)


def _score_batches(
    model: PairModel,
    pairs: PairDataset | MismatchedPairs,
    required: RequiredStats,
    batches: Sequence[Sequence[int]],
    process_group: ProcessGroup,
    check_cancelled: Callable[[], None],
    indexes: Sequence[int] | None,
) -> PairLogps:
    selected = range(len(pairs)) if indexes is None else indexes
    own_batches = batches[process_group.rank :: process_group.size]
    found: list[PairLogps] = []
    for batch in own_batches:
        check_cancelled()
        found.append(model.logps([pairs.pair(selected[position]) for position in batch], required))
    if model.sharded and len(own_batches) < len(batches[:: process_group.size]):
        model.logps([pairs.pair(selected[position]) for position in batches[0]], required)
    order = [position for batch in own_batches for position in batch]
    return _gather_in_order(found, order, len(selected), process_group)


def _scoring_batches(
    model: PairModel, pairs: PairDataset, budget: int, indexes: Sequence[int] | None = None
) -> list[list[int]]:
    """Return the batches of `score_pairs` as positions in `indexes`, pairs of similar length together."""
    costs = pair_costs(model, pairs, indexes)
    by_length = sorted(range(len(costs)), key=lambda position: (costs[position], position))
    return pair_batches(model, costs, by_length, budget)


def _gather_in_order(
    found: Sequence[PairLogps], order: Sequence[int], count: int, process_group: ProcessGroup
) -> PairLogps:
    # On the model's device, for which only the caller has to wait.
    part = PairLogps.concatenate(found).columns() if found else {}
    if process_group.size == 1:
        positions = torch.empty(count, dtype=torch.long)
        positions[torch.tensor(order, dtype=torch.long)] = torch.arange(count)
        positions = to_device(positions, process_group.device)
        return PairLogps.from_columns({name: column[positions] for name, column in part.items()})
    names = process_group.broadcast(sorted(part))
    columns: dict[str, torch.Tensor] = {}
    for name in names:
        # Token counts are far below 2**53, so float64 is exact.
        full = torch.zeros(count, dtype=torch.float64)
        if part:
            full[torch.tensor(order, dtype=torch.long)] = part[name].double().cpu()
        process_group.all_reduce(full)
        columns[name] = full.long() if name.endswith("_tokens") else full
    return PairLogps.from_columns(columns)


def eval_metrics(loss: LossConfig, logps: PairLogps, prompt_lengths: Sequence[int]) -> dict[str, float]:
    """Return the held-out metrics under their `eval_` names. `logps`: of all pairs, with reference if required."""
    lengths = ([int(n) for n in tokens] for tokens in (logps.chosen_tokens, logps.rejected_tokens))
    totals = UpdateTotals.from_lengths(prompt_lengths, *lengths)
    found = metric_means(metric_sums(pair_loss(loss, logps, totals)))
    return {f"{EVAL_PREFIX}{name}": value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates one model with one trial's settings: log-probs of held-out pairs, completions of fixed prompts."""

    config: TrialConfig
    model: PreTrainedModel
    pair_model: PairModel
    tokenizer: PreTrainedTokenizerBase
    pairs: PairDataset
    process_group: ProcessGroup
    cancel_token: CancelToken
    extra_end_tokens: tuple[int, ...] = ()
    """Tokens with which the data's responses end."""

    def logps(self, pairs: PairDataset, indexes: Sequence[int] | None = None) -> PairLogps:
        """Return the log-probs of these pairs (by default all), on the CPU."""
        training = self.config.training
        # The held-out metrics compare both responses, even if the objective reads only one.
        required = replace(required_stats(self.config.loss), rejected=True)
        rest = training.tokens_per_micro_batch, self.process_group, self.cancel_token.check, indexes
        with (
            eval_mode(self.model),
            self.process_group.autocast(training.bf16, cache_weights=not self.pair_model.sharded),
        ):
            found = score_pairs(self.pair_model, pairs, required, *rest)
            if required.mismatched:
                other = score_mismatched(self.pair_model, pairs, mismatched_pairs(pairs), *rest)
                found = replace(found, mismatched_chosen=other.chosen, mismatched_rejected=other.rejected)
        return found.to("cpu")

    def parts(self, pairs: PairDataset, most: int) -> list[list[int]]:
        """Split the pairs into at most `most` parts, as indexes, for processes that compute them at the same time.

        Whole batches in their order: `logps` of the parts is `logps` of all pairs, bit for bit.
        """
        batches = _scoring_batches(self.pair_model, pairs, self.config.training.tokens_per_micro_batch)
        count = min(most, len(batches))
        edges = [len(batches) * part // count for part in range(count + 1)] if batches else []
        return [[pair for batch in batches[first:last] for pair in batch] for first, last in pairwise(edges)]

    def completions(self) -> list[Completion]:
        """Return greedy completions of the first `evaluation.prompts` distinct held-out prompts, as computed by the
        main process.
        """
        evaluation, training = self.config.evaluation, self.config.training
        with (
            eval_mode(self.model),
            self.process_group.autocast(training.bf16, cache_weights=not self.pair_model.sharded),
            # Each token would have another length. torch.compiler takes a second to load.
            torch.compiler.set_stance("force_eager") if self.config.model.compile else nullcontext(),
        ):
            found = complete_greedily(
                self.model,
                self.tokenizer,
                self.pairs,
                select_prompts(self.pairs, evaluation.prompts),
                max_new_tokens=evaluation.max_new_tokens,
                budget=training.tokens_per_micro_batch,
                check_cancelled=self.cancel_token.check,
                extra_end_tokens=self.extra_end_tokens,
            )
        if self.process_group.size == 1:
            return found
        return [
            Completion(**json.loads(one))
            for one in self.process_group.broadcast([json.dumps(asdict(one)) for one in found])
        ]

    def read_next_token_logps(
        self,
        answers: Sequence[TokenPair],
        batches: Sequence[Sequence[int]],
        read: Callable[[torch.Tensor], None],
        check_cancelled: Callable[[], None],
    ) -> None:
        """Call `read` with the next-token log-probs of these answers, the chosen responses, batch by batch.

        See `PairModel.read_next_token_logps`. Every process of a trial computes all of them.
        """
        training = self.config.training
        with (
            eval_mode(self.model),
            self.process_group.autocast(training.bf16, cache_weights=not self.pair_model.sharded),
            # Adapters that are on and off would be compiled twice.
            torch.compiler.set_stance("force_eager") if self.config.model.compile else nullcontext(),
        ):
            for batch in batches:
                check_cancelled()
                self.pair_model.read_next_token_logps([answers[index] for index in batch], read)

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end a completion."""
        return end_token_ids(self.model, self.tokenizer, self.extra_end_tokens)

    def metrics(self, logps: PairLogps, reference: PairLogps, completions: Sequence[Completion]) -> dict[str, float]:
        """Return all `eval_` metrics; `reference` are the initial model's log-probs of the same pairs."""
        required = required_stats(self.config.loss)
        with_reference = logps.with_reference(reference) if required.reference else logps
        with_reference = with_reference.with_kl() if required.mismatched else with_reference
        held_out = eval_metrics(self.config.loss, with_reference, [int(n) for n in self.pairs.prompt_lengths])
        ratios = metric_means(log_ratio_sums(logps, reference))
        held_out |= {f"{EVAL_PREFIX}{name}": value for name, value in ratios.items()}
        return held_out | self.completion_metrics(completions)

    @staticmethod
    def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
        """Return the `eval_` metrics of completions."""
        return {f"{EVAL_PREFIX}{name}": value for name, value in completion_metrics(completions).items()}


@contextmanager
def eval_mode(model: PreTrainedModel) -> Generator[None]:
    """Put the model into evaluation mode, without adapters' dropout, for the time of the context."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        reshard(model)
        model.train(before)


def write_eval_pairs(path: Path, logps: PairLogps, initial: PairLogps, pairs: PairDataset) -> None:
    """Write the log-probs of every held-out pair, [N] each, with its `source` and `row`, for paired tests.

    `start_chosen` and `start_rejected` are the initial model's log-probs of the same pairs.
    """
    columns = logps.columns() | {
        "start_chosen": initial.chosen,
        "start_rejected": initial.rejected,
        "source": torch.as_tensor(pairs.sources).clone(),
        "row": torch.as_tensor(pairs.rows).clone(),
    }
    write_file(path, lambda temporary: save_file(columns, temporary))
