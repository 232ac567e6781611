"""Pairs to batches: packed without padding, with the prompt computed once per pair; or padded, two rows per pair.

`PackingPlan` holds the pairs' positions in a packed sequence and the causal segments of its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.forward.rotary_embeddings import RotaryPlan


@dataclass(frozen=True, slots=True)
class PairSpan:
    """Where a pair lies in the packed sequence: prompt, chosen and rejected tokens from `start` on."""

    start: int
    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """The pairs of one packed sequence."""

    spans: tuple[PairSpan, ...]


@dataclass(frozen=True, slots=True)
class CausalSegment:
    """One causal sequence of a pair: its queries lie at [begin, end), `shared` keys lie before them at `prompt`."""

    begin: int
    end: int
    prompt: int
    shared: int


def causal_segments(plan: PackingPlan) -> Iterator[CausalSegment]:
    """Each pair's prompt + chosen, then its rejected, which shares the prompt. In the order of the queries."""
    for span in plan.spans:
        middle = span.start + span.prompt + span.chosen
        yield CausalSegment(span.start, middle, span.start, 0)
        if span.rejected:
            yield CausalSegment(middle, middle + span.rejected, span.start, span.prompt)


SEGMENTS = ("chosen_shared", "chosen_tail", "rejected_shared", "rejected_tail", "prompt")
"""Kinds of scored tokens; segment number of a token = pair * len(SEGMENTS) + the place of its kind here."""

TokenArray = NDArray[np.integer]
RotaryKey = Callable[[int], int]
"""Tokens of a sequence -> what its rotary frequencies follow from (trainer.forward.rotary_embeddings)."""


class TokenPair(Protocol):
    """One preference pair as token ids (trainer.data.Pair)."""

    @property
    def prompt(self) -> TokenArray:
        """Token ids of the prompt, with BOS and the generation prompt."""
        ...

    @property
    def chosen(self) -> TokenArray:
        """Token ids of the chosen response, with EOS."""
        ...

    @property
    def rejected(self) -> TokenArray:
        """Token ids of the rejected response, with EOS."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model computes, and which of its positions predict which scored tokens.

    A position in `rows` is an index into the flattened [batch * length] hidden states. Rows of one pair are adjacent.
    """

    input_ids: Tensor
    """[1, T] packed, [2N, L] separate (chosen sequences first)."""
    position_ids: Tensor | None
    attention_mask: Tensor | None
    plan: PackingPlan | None
    rows: Tensor
    """[R] the position whose hidden state predicts the target."""
    targets: Tensor
    """[R] token ids."""
    segments: Tensor
    """[R] segment number of each target."""
    pair_rows: tuple[int, ...]
    """[N + 1] where each pair's rows begin, and R at the end."""
    chosen_tokens: tuple[int, ...]
    rejected_tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    """Tokens of each prompt that are predicted, its length minus 1."""
    prompt_scored: bool
    tokens: int
    """Positions computed, padding included."""
    rotary: RotaryPlan | None = None
    """Where a model's rotary frequencies depend on lengths: which each position has."""

    def __len__(self) -> int:
        return len(self.chosen_tokens)

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            rows=self.rows.to(device),
            targets=self.targets.to(device),
            segments=self.segments.to(device),
            rotary=None if self.rotary is None else replace(self.rotary, which=self.rotary.which.to(device)),
        )


def packed_lengths(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], key: RotaryKey | None = None
) -> list[int]:
    """Positions each pair takes in the packed layout: the last token of a response predicts nothing and is left out.

    key: as of `pack_pairs`; the prompt of a pair whose two sequences have different frequencies is there twice.
    """
    return [
        p + c + r - 2 + (0 if key is None or key(p + c) == key(p + r) else p)
        for p, c, r in zip(prompt, chosen, rejected, strict=True)
    ]


def micro_batches(
    lengths: Sequence[int], order: Sequence[int], budget: int, *, padded: bool = False
) -> list[list[int]]:
    """Cut `order` into consecutive runs of at most `budget` tokens; a longer pair is alone. Deterministic.

    lengths[i] is the cost of pair i alone. The cost of a run is the sum of its pairs', or with `padded` their number
    times the largest, since each is padded to the longest. The result holds every element of `order` once, in order.
    """
    if budget < 1:
        raise ValueError(f"the token budget of a micro-batch is at least 1, not {budget}")
    batches: list[list[int]] = []
    used = longest = 0
    for index in order:
        cost = int(lengths[index])
        longest = max(longest, cost)
        used = longest * (len(batches[-1]) + 1) if padded and batches else used + cost
        if not batches or used > budget:
            batches.append([])
            used = longest = cost
        batches[-1].append(index)
    return batches


def pack_pairs(
    pairs: Sequence[TokenPair], *, prompt: bool = False, rejected: bool = True, key: RotaryKey | None = None
) -> Batch:
    """One padding-free sequence: per pair prompt, chosen, rejected; the prompt's last state predicts both first tokens.

    Position ids restart at the prompt's length for rejected. With `prompt` the prompt's own tokens are scored too;
    without `rejected` the rejected responses are left out. key: of a model whose rotary frequencies depend on lengths;
    a pair whose two sequences differ in it has the prompt twice. An empty prompt or response: ValueError.
    """
    _check_pairs(pairs)
    ids: list[TokenArray] = []
    positions: list[TokenArray] = []
    spans: list[PairSpan] = []
    scored: list[_ScoredPositions] = []
    lengths: list[TokenArray] = []
    start = 0
    for pair in pairs:
        p, c, r = len(pair.prompt), len(pair.chosen) - 1, len(pair.rejected) - 1 if rejected else 0
        of_chosen, of_rejected = p + len(pair.chosen), p + len(pair.rejected)
        apart = rejected and key is not None and key(of_chosen) != key(of_rejected)
        again = p if apart else 0
        ids += [pair.prompt, pair.chosen[:c], pair.prompt[:again], pair.rejected[:r]]
        positions += [np.arange(p + c), np.arange(p - again, p + r)]
        lengths += [np.full(p + c, of_chosen), np.full(again + r, of_rejected)]
        last, middle = start + p - 1, start + p + c
        first_rejected = middle + again
        if apart:
            spans += [PairSpan(start, p, c, 0), PairSpan(middle, p, r, 0)]
        else:
            spans.append(PairSpan(start, p, c, r))
        before = first_rejected - 1 if apart else last
        second = np.concatenate([[before], np.arange(first_rejected, first_rejected + r)]) if rejected else np.arange(0)
        scored.append(_ScoredPositions(np.arange(last, middle), second, np.arange(start, last)))
        start = first_rejected + r
    return _make_batch(
        pairs,
        scored,
        prompt,
        input_ids=np.concatenate(ids)[None],
        position_ids=np.concatenate(positions)[None],
        plan=PackingPlan(tuple(spans)),
        rotary=None if key is None else _rotary_plan(np.concatenate(lengths)[None], key),
    )


def pad_pairs(
    pairs: Sequence[TokenPair], *, prompt: bool = False, rejected: bool = True, key: RotaryKey | None = None
) -> Batch:
    """Two right-padded sequences per pair, N chosen then N rejected, for architectures that cannot share a prompt.

    With `prompt` the prompt's tokens are scored once, in the chosen sequence; without `rejected` there are N sequences.
    key: as of `pack_pairs`.
    """
    _check_pairs(pairs)
    sequences = [np.concatenate([pair.prompt, pair.chosen[:-1]]) for pair in pairs]
    if rejected:
        sequences += [np.concatenate([pair.prompt, pair.rejected[:-1]]) for pair in pairs]
    longest = max(len(sequence) for sequence in sequences)
    input_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    scored: list[_ScoredPositions] = []
    for index, pair in enumerate(pairs):
        first, second, p = index * longest, (len(pairs) + index) * longest, len(pair.prompt) - 1
        scored.append(
            _ScoredPositions(
                np.arange(first + p, first + p + len(pair.chosen)),
                np.arange(second + p, second + p + len(pair.rejected)) if rejected else np.arange(0),
                np.arange(first, first + p),
            )
        )
    if key is None:
        return _make_batch(pairs, scored, prompt, input_ids=input_ids, mask=mask)
    # A response's last token, which predicts nothing and is left out, counts towards its length all the same.
    lengths = np.array([[len(sequence) + 1] for sequence in sequences]).repeat(longest, axis=1)
    positions = np.arange(longest)[None].repeat(len(sequences), axis=0)
    rotary = _rotary_plan(lengths, key)
    return _make_batch(pairs, scored, prompt, input_ids=input_ids, position_ids=positions, mask=mask, rotary=rotary)


def _rotary_plan(lengths: TokenArray, key: RotaryKey) -> RotaryPlan:
    """lengths: [rows, length] tokens of the sequence that each position belongs to."""
    tokens, scored = np.unique(lengths, return_inverse=True)
    keys = [key(int(each)) for each in tokens]
    longest = dict(zip(keys, map(int, tokens), strict=True))  # ascending: the last of each key is kept
    numbers = {each: number for number, each in enumerate(longest)}
    which = np.array([numbers[each] for each in keys])[scored.reshape(lengths.shape)]
    return RotaryPlan(tuple(longest.values()), _tensor(which))


@dataclass(frozen=True, slots=True)
class _ScoredPositions:
    """Flat positions that predict a pair's chosen, rejected and prompt tokens; no rejected ones where left out."""

    chosen: TokenArray
    rejected: TokenArray
    prompt: TokenArray


def _check_pairs(pairs: Sequence[TokenPair]) -> None:
    if not pairs:
        raise ValueError("a batch needs at least one pair")
    for number, pair in enumerate(pairs):
        for name, part in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            if len(part) == 0:
                raise ValueError(f"pair {number} of the batch has an empty {name}: nothing to score")


def _make_batch(
    pairs: Sequence[TokenPair],
    scored: Sequence[_ScoredPositions],
    prompt: bool,
    *,
    input_ids: TokenArray,
    position_ids: TokenArray | None = None,
    mask: TokenArray | None = None,
    plan: PackingPlan | None = None,
    rotary: RotaryPlan | None = None,
) -> Batch:
    """The batch of these inputs, with what its positions predict."""
    rows: list[TokenArray] = []
    targets: list[TokenArray] = []
    segments: list[TokenArray] = []
    counts: list[int] = []
    for number, (pair, position) in enumerate(zip(pairs, scored, strict=True)):
        shared = min(len(pair.chosen), len(pair.rejected))
        first = number * len(SEGMENTS)
        parts = [(0, position.chosen, pair.chosen), (2, position.rejected, pair.rejected[: len(position.rejected)])]
        if prompt:
            parts.append((4, position.prompt, pair.prompt[1:]))
        for kind, positions, tokens in parts:
            rows.append(positions)
            targets.append(tokens)
            tail = 0 if kind == 4 else np.arange(len(tokens)) >= shared
            segments.append(np.full(len(tokens), first + kind) + tail)
        counts.append(sum(len(positions) for _, positions, _ in parts))
    return Batch(
        input_ids=_tensor(input_ids),
        position_ids=None if position_ids is None else _tensor(position_ids),
        attention_mask=None if mask is None else _tensor(mask),
        plan=plan,
        rows=_tensor(np.concatenate(rows)),
        targets=_tensor(np.concatenate(targets)),
        segments=_tensor(np.concatenate(segments)),
        pair_rows=(0, *accumulate(counts)),
        chosen_tokens=tuple(len(position.chosen) for position in scored),
        rejected_tokens=tuple(len(position.rejected) for position in scored),
        prompt_tokens=tuple(len(pair.prompt) - 1 for pair in pairs),
        prompt_scored=prompt,
        tokens=input_ids.size,
        rotary=rotary,
    )


def _tensor(values: TokenArray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
