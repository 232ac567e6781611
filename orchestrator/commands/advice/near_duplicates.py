"""Shares of near-duplicate prompts and of nearly equal responses, from token ids.

Two prompts are near-duplicates if at least 0.8 of their shingles of three tokens are common (Jaccard). The tokens with
which all prompts begin or end, the template's, are cut off first. Candidates come from MinHash with banding (Broder
1997): of pairs at 0.8, 99.9 % are found; each candidate is compared exactly. Two responses are nearly equal if the
longest common prefix and suffix cover 0.9 of the longer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from orchestrator.spec.advice.pair_scores import Repetition
from trainer.data.pair_dataset import Pair, PairDataset

Tokens = npt.NDArray[np.int32]
PROMPT_SIMILARITY, ANSWER_SIMILARITY = 0.8, 0.9
MOST_PROMPTS = 20_000
"""Training prompts that are compared; of more, every n-th."""
_SHINGLE = 3
_BANDS, _ROWS = 16, 4
_MERSENNE = np.uint64((1 << 61) - 1)
_SEED = 7


def repetition_of(train: PairDataset, held_out: PairDataset) -> Repetition:
    """Return the shares of near-duplicates: of the responses of all pairs, of at most MOST_PROMPTS prompts."""
    step = -(-len(train) // MOST_PROMPTS) or 1
    prompts = [np.asarray(train.pair(i).prompt) for i in range(0, len(train), step)]
    others = [np.asarray(held_out.pair(i).prompt) for i in range(len(held_out))]
    begin, end = _common_ends([*prompts, *others])
    known = _Index()
    repeated = sum(known.add(shingles(prompt[begin : len(prompt) - end])) for prompt in prompts)
    leaked = sum(known.contains(shingles(prompt[begin : len(prompt) - end])) for prompt in others)
    equal = sum(similarity(pair.chosen, pair.rejected) >= ANSWER_SIMILARITY for pair in _pairs(train))
    return Repetition(
        prompts=repeated / max(1, len(prompts)),
        held_out=leaked / max(1, len(others)),
        answers=equal / max(1, len(train)),
        compared_prompts=len(prompts),
    )


def _pairs(data: PairDataset) -> Iterable[Pair]:
    return (data.pair(i) for i in range(len(data)))


def similarity(left: Tokens, right: Tokens) -> float:
    """Return the share of the longer response that the longest common prefix and suffix cover; 1 for equal ones."""
    least, most = sorted((len(left), len(right)))
    if most == 0:
        return 1.0
    prefix = _common_prefix(left[:least], right[:least])
    rest = least - prefix
    suffix = _common_prefix(left[len(left) - rest :][::-1], right[len(right) - rest :][::-1])
    return (prefix + suffix) / most


def _common_prefix(left: Tokens, right: Tokens) -> int:
    differing = np.flatnonzero(left != right)
    return int(differing[0]) if len(differing) else len(left)


def _common_ends(sequences: Sequence[Tokens]) -> tuple[int, int]:
    """Return how many tokens all sequences begin and end with, never all of one sequence."""
    if len(sequences) < 2:
        return 0, 0
    shortest = min(map(len, sequences))
    first, begin, end = sequences[0], shortest, shortest
    for other in islice(sequences, 1, None):
        begin = _common_prefix(first[:begin], other[:begin])
        end = _common_prefix(first[len(first) - end :][::-1], other[len(other) - end :][::-1])
    begin = min(begin, shortest - 1)
    return begin, min(end, shortest - 1 - begin)


def shingles(tokens: Tokens) -> frozenset[int]:
    """Return the hashed runs of three tokens; of a shorter sequence, the one of all its tokens."""
    ids = tokens.astype(np.uint64)
    if len(ids) < _SHINGLE:
        return frozenset([hash(tuple(int(i) for i in ids))])
    mixed = ids[:-2] * np.uint64(1_000_003) + ids[1:-1]
    mixed = (mixed * np.uint64(1_000_003) + ids[2:]) % _MERSENNE
    return frozenset(int(value) for value in mixed)


class _Index:
    """Sets of shingles with their MinHash bands."""

    def __init__(self) -> None:
        random = np.random.default_rng(_SEED)
        self._factors = random.integers(1, 1 << 31, _BANDS * _ROWS, dtype=np.uint64)
        self._terms = random.integers(0, 1 << 31, _BANDS * _ROWS, dtype=np.uint64)
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        self._sets: list[frozenset[int]] = []

    def add(self, found: frozenset[int]) -> bool:
        """Add a set and return whether a near-duplicate was there before."""
        bands = self._bands(found)
        repeated = self._matches(found, bands)
        if not repeated:  # a duplicate of a duplicate is one of the first too, nearly always
            for band in bands:
                self._buckets.setdefault(band, []).append(len(self._sets))
            self._sets.append(found)
        return repeated

    def contains(self, found: frozenset[int]) -> bool:
        """Return whether the index has a near-duplicate."""
        return self._matches(found, self._bands(found))

    def _matches(self, found: frozenset[int], bands: Sequence[tuple[int, bytes]]) -> bool:
        candidates = {number for band in bands for number in self._buckets.get(band, ())}
        return any(jaccard(found, self._sets[number]) >= PROMPT_SIMILARITY for number in candidates)

    def _bands(self, found: frozenset[int]) -> list[tuple[int, bytes]]:
        values = np.fromiter((value & 0xFFFFFFFF for value in found), dtype=np.uint64, count=len(found))
        hashed = (values[None, :] * self._factors[:, None] + self._terms[:, None]) % _MERSENNE
        least = hashed.min(axis=1).reshape(_BANDS, _ROWS)
        return [(band, least[band].tobytes()) for band in range(_BANDS)]


def jaccard(left: frozenset[int], right: frozenset[int]) -> float:
    """Return the share of common elements among all elements of two sets, one of them not empty."""
    common = len(left & right)
    return common / (len(left) + len(right) - common)
