"""Log-probs of a whole set of pairs under the model as it is now, by token budget and over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from trainer.data.pairs import PairSet
from trainer.forward.layout import micro_batches, packed_lengths
from trainer.forward.pair_model import PairModel
from trainer.loss_config import LossConfig
from trainer.metrics import EVAL
from trainer.objectives.losses import pair_loss
from trainer.objectives.pair_logps import Needs, Normaliser, PairLogps
from trainer.objectives.pair_metrics import means, metric_totals
from trainer.world import World


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
