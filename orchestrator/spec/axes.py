"""The combinations of a search, counted and reached by number without building the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.spec.dimensions import Params, Scalar, same


@dataclass(frozen=True, slots=True)
class Axis:
    """Leaves that advance together. `values` is None for a continuous range."""

    paths: tuple[str, ...]
    values: Sequence[Scalar | tuple[Scalar, ...]] | None
    when: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict[str, tuple[Scalar, ...]])

    def row(self, index: int) -> Params:
        """The leaves of its index-th value."""
        assert self.values is not None
        value = self.values[index]
        return dict(zip(self.paths, value, strict=True)) if isinstance(value, tuple) else {self.paths[0]: value}

    def active(self, drawn: Mapping[str, Scalar]) -> bool:
        """Whether its condition holds, given the axes before it."""
        return all(p in drawn and any(same(drawn[p], v) for v in allowed) for p, allowed in self.when.items())


class Circular(ValueError):
    """Conditions that wait for each other."""


def in_order(axes: Iterable[Axis]) -> list[Axis]:
    """The file's order, each conditional axis moved behind those it waits for. Conditions on no axis are left last."""
    waiting, ready, known = list(axes), list[Axis](), set[str]()
    searched = {path for axis in waiting for path in axis.paths}
    while waiting:
        free = next((a for a in waiting if known >= a.when.keys() & searched), None)
        if free is None:
            raise Circular("the conditions of " + ", ".join(p for a in waiting for p in a.paths) + " go in a circle")
        waiting.remove(free)
        ready.append(free)
        known.update(free.paths)
    return ready


class Axes:
    """Mixed-radix numbers over the axes, the last advancing fastest; an inactive axis has no digit."""

    def __init__(self, axes: Iterable[Axis]) -> None:
        self._axes = in_order(axes)
        self._deciding = {path for axis in self._axes for path in axis.when}
        self._counted: dict[tuple[object, ...], int] = {}

    @property
    def ordered(self) -> Sequence[Axis]:
        """The axes, each behind those its condition waits for."""
        return self._axes

    @property
    def endless(self) -> bool:
        """Whether some axis is a continuous range."""
        return any(axis.values is None for axis in self._axes)

    def __len__(self) -> int:
        return self._count(0, {})

    def point(self, index: int) -> Params:
        """The index-th combination."""
        if not 0 <= index < len(self):
            raise IndexError(f"combination {index} of {len(self)}")
        drawn: Params = {}
        for k, axis in enumerate(self._axes):
            if not axis.active(drawn):
                continue
            digit, index = self._digit(k, drawn, index)
            drawn |= axis.row(digit)
        return drawn

    def active(self, params: Mapping[str, Scalar]) -> Params:
        """Those of `params` whose conditions hold."""
        kept: Params = {}
        for axis in self._axes:
            if axis.active(kept):
                kept |= {path: params[path] for path in axis.paths if path in params}
        return kept

    def _digit(self, k: int, drawn: Params, index: int) -> tuple[int, int]:
        axis = self._axes[k]
        assert axis.values is not None
        if self._deciding.isdisjoint(axis.paths):
            return divmod(index, self._count(k + 1, drawn))
        for digit in range(len(axis.values)):
            below = self._count(k + 1, drawn | axis.row(digit))
            if index < below:
                return digit, index
            index -= below
        raise AssertionError("an index below the count has a digit")

    def _count(self, k: int, drawn: Params) -> int:
        if k == len(self._axes):
            return 1
        key = (k, *((p, type(v), v) for p, v in drawn.items() if p in self._deciding))
        if key not in self._counted:
            self._counted[key] = self._count_new(k, drawn)
        return self._counted[key]

    def _count_new(self, k: int, drawn: Params) -> int:
        axis = self._axes[k]
        if not axis.active(drawn):
            return self._count(k + 1, drawn)
        if axis.values is None:
            raise ValueError(f"{axis.paths[0]} is a continuous range: it has no combinations")
        if self._deciding.isdisjoint(axis.paths):
            return len(axis.values) * self._count(k + 1, drawn)
        return sum(self._count(k + 1, drawn | axis.row(i)) for i in range(len(axis.values)))
