"""Batches of pairs: packed without padding, with the prompt computed once per pair; or padded, a row per response.

`PackingPlan` holds the pairs' positions in a packed sequence, from which the causal segments of attention follow.
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
from trainer.objectives.pair_logps import to_device


@dataclass(frozen=True, slots=True)
class PairSpan:
    """Position of a pair in the packed sequence: numbers of prompt, chosen and rejected tokens from `start` on."""

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
    """A causal sequence of a pair: queries at [begin, end), preceded by `shared` keys at `prompt`."""

    begin: int
    end: int
    prompt: int
    shared: int


def causal_segments(plan: PackingPlan) -> Iterator[CausalSegment]:
    """Yield for each pair prompt + chosen, then rejected, which shares the prompt; in the order of the queries."""
    for span in plan.spans:
        middle = span.start + span.prompt + span.chosen
        yield CausalSegment(span.start, middle, span.start, 0)
        if span.rejected:
            yield CausalSegment(middle, middle + span.rejected, span.start, span.prompt)


TOKEN_KINDS = ("chosen_shared", "chosen_tail", "rejected_shared", "rejected_tail", "prompt")
"""Kinds of scored tokens; `shared`: within the length of the shorter response, `tail`: after it."""

TokenArray = NDArray[np.integer]
RotaryKey = Callable[[int], int]
"""Tokens of a sequence -> key of its rotary frequencies (trainer.forward.rotary_embeddings)."""


class TokenPair(Protocol):
    """One preference pair as token ids (trainer.data.Pair); one of the two responses may be empty."""

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
    """The inputs of the model, and which positions predict which scored tokens.

    `rows` are indices into the flattened [batch * length] hidden states. Rows of one pair are adjacent.
    """

    input_ids: Tensor
    """[1, T] packed, [2N, L] padded (chosen sequences first; those of responses alone that are not empty)."""
    position_ids: Tensor | None
    attention_mask: Tensor | None
    plan: PackingPlan | None
    rows: Tensor
    """[R] positions whose hidden states predict the targets."""
    targets: Tensor
    """[R] token ids."""
    pair_kinds: Tensor
    """[R] pair * len(TOKEN_KINDS) + index of the kind, of each target."""
    pair_rows: tuple[int, ...]
    """[N + 1] the first row of each pair, then R."""
    chosen_tokens: tuple[int, ...]
    rejected_tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    """Number of predicted tokens of each prompt: its length minus 1."""
    token_counts: Tensor
    """[3, N] the three numbers above, on the device."""
    prompt_scored: bool
    tokens: int
    """Number of positions computed, padding included."""
    rotary: RotaryPlan | None = None
    """Groups of rotary frequencies by position, if the model's frequencies depend on lengths."""

    def __len__(self) -> int:
        return len(self.chosen_tokens)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device; the host does not wait for a copy to a GPU."""
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            position_ids=None if self.position_ids is None else to_device(self.position_ids, device),
            attention_mask=None if self.attention_mask is None else to_device(self.attention_mask, device),
            rows=to_device(self.rows, device),
            targets=to_device(self.targets, device),
            pair_kinds=to_device(self.pair_kinds, device),
            token_counts=to_device(self.token_counts, device),
            rotary=None if self.rotary is None else replace(self.rotary, which=to_device(self.rotary.which, device)),
        )


def packed_lengths(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], key: RotaryKey | None = None
) -> list[int]:
    """Return how many positions each pair takes in the packed layout. The last token of a response predicts nothing.

    `key` is that of `pack_pairs`: if the two sequences of a pair have different frequencies, its prompt is repeated.
    """
    return [
        prompt_length
        + max(0, chosen_length - 1)
        + max(0, rejected_length - 1)
        + (
            0
            if key is None
            or not (chosen_length and rejected_length)
            or key(prompt_length + chosen_length) == key(prompt_length + rejected_length)
            else prompt_length
        )
        for prompt_length, chosen_length, rejected_length in zip(prompt, chosen, rejected, strict=True)
    ]


def micro_batches(
    lengths: Sequence[int], order: Sequence[int], budget: int, *, padded: bool = False
) -> list[list[int]]:
    """Split `order` into consecutive micro-batches of at most `budget` tokens; a longer pair is alone. Deterministic.

    `lengths[i]` is the cost of pair i. The cost of a micro-batch is the sum over its pairs or, with `padded`, their
    number times the largest. The result has every element of `order` once, in order.
    """
    if budget < 1:
        raise ValueError(f"the token budget of a micro-batch must be at least 1, not {budget}")
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
    """Pack pairs into one sequence without padding. The last state of a prompt predicts the first tokens of both
    responses.

    Args:
        pairs: At least one pair; per pair the order is prompt, chosen, rejected, and position ids restart at the
            prompt's length for rejected.
        prompt: Whether the prompt's own tokens are scored too.
        rejected: Whether rejected responses are included.
        key: `RotarySwitch.key` of a model whose rotary frequencies depend on lengths; if the keys of a pair's two
            sequences differ, its prompt is repeated.

    Raises:
        ValueError: A prompt is empty, or both responses of a pair.
    """
    _check_pairs(pairs, rejected)
    ids: list[TokenArray] = []
    positions: list[TokenArray] = []
    spans: list[PairSpan] = []
    scored: list[_ScoredPositions] = []
    lengths: list[TokenArray] = []
    start = 0
    for pair in pairs:
        prompt_length, chosen_length, rejected_length = (
            len(pair.prompt),
            max(0, len(pair.chosen) - 1),
            max(0, len(pair.rejected) - 1) if rejected else 0,
        )
        has_chosen, has_rejected = len(pair.chosen) > 0, rejected and len(pair.rejected) > 0
        of_rejected = prompt_length + len(pair.rejected)
        of_chosen = prompt_length + len(pair.chosen) if has_chosen else of_rejected
        separate = has_chosen and has_rejected and key is not None and key(of_chosen) != key(of_rejected)
        repeated = prompt_length if separate else 0
        ids += [pair.prompt, pair.chosen[:chosen_length], pair.prompt[:repeated], pair.rejected[:rejected_length]]
        positions += [
            np.arange(prompt_length + chosen_length),
            np.arange(prompt_length - repeated, prompt_length + rejected_length),
        ]
        lengths += [np.full(prompt_length + chosen_length, of_chosen), np.full(repeated + rejected_length, of_rejected)]
        last, middle = start + prompt_length - 1, start + prompt_length + chosen_length
        first_rejected = middle + repeated
        if separate:
            spans += [
                PairSpan(start, prompt_length, chosen_length, 0),
                PairSpan(middle, prompt_length, rejected_length, 0),
            ]
        else:
            spans.append(PairSpan(start, prompt_length, chosen_length, rejected_length))
        before = first_rejected - 1 if separate else last
        second = (
            np.concatenate([[before], np.arange(first_rejected, first_rejected + rejected_length)])
            if has_rejected
            else np.arange(0)
        )
        first = np.arange(last, middle if has_chosen else last)
        scored.append(_ScoredPositions(first, second, np.arange(start, last)))
        start = first_rejected + rejected_length
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
    """Pad pairs to two right-padded sequences each, N chosen then N rejected, for models that cannot share a prompt.

    With `prompt` the prompt's tokens are scored once, in the chosen sequence; without `rejected` there are N sequences.
    An empty response has no sequence. `key` is that of `pack_pairs`.
    """
    _check_pairs(pairs, rejected)
    responses = [(index, pair.chosen) for index, pair in enumerate(pairs)]
    responses += [(len(pairs) + index, pair.rejected) for index, pair in enumerate(pairs) if rejected]
    responses = [(number, tokens) for number, tokens in responses if len(tokens)]
    row_of = {number: row for row, (number, _) in enumerate(responses)}
    sequences = [np.concatenate([pairs[number % len(pairs)].prompt, tokens[:-1]]) for number, tokens in responses]
    longest = max(len(sequence) for sequence in sequences)
    input_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    scored: list[_ScoredPositions] = []
    for index, pair in enumerate(pairs):
        first, second = (row_of.get(number) for number in (index, len(pairs) + index))
        prompt_end = len(pair.prompt) - 1
        begin = longest * (first if first is not None else second or 0)
        scored.append(
            _ScoredPositions(
                _row_positions(first, longest, prompt_end, len(pair.chosen)),
                _row_positions(second, longest, prompt_end, len(pair.rejected)),
                np.arange(begin, begin + prompt_end),
            )
        )
    if key is None:
        return _make_batch(pairs, scored, prompt, input_ids=input_ids, mask=mask)
    # The last token of a response predicts nothing and is not computed, but it counts towards the sequence's length.
    lengths = np.array([[len(sequence) + 1] for sequence in sequences]).repeat(longest, axis=1)
    positions = np.arange(longest)[None].repeat(len(sequences), axis=0)
    rotary = _rotary_plan(lengths, key)
    return _make_batch(pairs, scored, prompt, input_ids=input_ids, position_ids=positions, mask=mask, rotary=rotary)


def _row_positions(row: int | None, longest: int, begin: int, count: int) -> TokenArray:
    """Return the flat positions that predict a response which begins at `begin` of a padded row; none without row."""
    return np.arange(0) if row is None else np.arange(row * longest + begin, row * longest + begin + count)


def _rotary_plan(lengths: TokenArray, key: RotaryKey) -> RotaryPlan:
    """Return the plan of positions whose sequences have these lengths. `lengths`: [rows, length]."""
    tokens, scored = np.unique(lengths, return_inverse=True)
    keys = [key(int(each)) for each in tokens]
    longest = dict(zip(keys, map(int, tokens), strict=True))  # ascending, so the longest of each key remains
    numbers = {each: number for number, each in enumerate(longest)}
    which = np.array([numbers[each] for each in keys])[scored.reshape(lengths.shape)]
    return RotaryPlan(tuple(longest.values()), _tensor(which))


@dataclass(frozen=True, slots=True)
class _ScoredPositions:
    """Flat positions that predict a pair's chosen, rejected and prompt tokens; one of the first two may be empty."""

    chosen: TokenArray
    rejected: TokenArray
    prompt: TokenArray


def _check_pairs(pairs: Sequence[TokenPair], rejected: bool) -> None:
    if not pairs:
        raise ValueError("a batch needs at least one pair")
    for number, pair in enumerate(pairs):
        if len(pair.prompt) == 0:
            raise ValueError(f"pair {number} of the batch has an empty prompt")
        if not len(pair.chosen) and not (rejected and len(pair.rejected)):
            raise ValueError(f"pair {number} of the batch has no response")


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
    """Return the batch of these inputs with its targets."""
    rows: list[TokenArray] = []
    targets: list[TokenArray] = []
    pair_kinds: list[TokenArray] = []
    counts: list[int] = []
    for number, (pair, position) in enumerate(zip(pairs, scored, strict=True)):
        shared = min(len(pair.chosen), len(pair.rejected))
        first = number * len(TOKEN_KINDS)
        parts = [(0, position.chosen, pair.chosen), (2, position.rejected, pair.rejected[: len(position.rejected)])]
        if prompt:
            parts.append((4, position.prompt, pair.prompt[1:]))
        for kind, positions, tokens in parts:
            rows.append(positions)
            targets.append(tokens)
            tail = 0 if kind == 4 else np.arange(len(tokens)) >= shared
            pair_kinds.append(np.full(len(tokens), first + kind) + tail)
        counts.append(sum(len(positions) for _, positions, _ in parts))
    lengths = [
        tuple(len(position.chosen) for position in scored),
        tuple(len(position.rejected) for position in scored),
        tuple(len(pair.prompt) - 1 for pair in pairs),
    ]
    return Batch(
        input_ids=_tensor(input_ids),
        position_ids=None if position_ids is None else _tensor(position_ids),
        attention_mask=None if mask is None else _tensor(mask),
        plan=plan,
        rows=_tensor(np.concatenate(rows)),
        targets=_tensor(np.concatenate(targets)),
        pair_kinds=_tensor(np.concatenate(pair_kinds)),
        pair_rows=(0, *accumulate(counts)),
        chosen_tokens=lengths[0],
        rejected_tokens=lengths[1],
        prompt_tokens=lengths[2],
        token_counts=torch.tensor(lengths),
        prompt_scored=prompt,
        tokens=input_ids.size,
        rotary=rotary,
    )


def _tensor(values: TokenArray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
