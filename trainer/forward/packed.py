"""Where pairs lie in a packed sequence, and the causal sequences that its attention consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PairSpan:
    """Where a pair lies in the packed sequence: prompt, chosen and rejected tokens from `start` on."""

    start: int
    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """The pairs of one packed sequence."""

    spans: tuple[PairSpan, ...]


@dataclass(frozen=True, slots=True)
class Strand:
    """One causal sequence of a pair: its queries lie at [begin, end), `shared` keys lie before them at `prompt`."""

    begin: int
    end: int
    prompt: int
    shared: int


def strands(plan: PackedPlan) -> Iterator[Strand]:
    """Each pair's prompt + chosen, then its rejected, which shares the prompt. In the order of the queries."""
    for span in plan.spans:
        middle = span.start + span.prompt + span.chosen
        yield Strand(span.start, middle, span.start, 0)
        if span.rejected:
            yield Strand(middle, middle + span.rejected, span.start, span.prompt)
