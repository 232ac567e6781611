"""The search space: dotted path -> distribution, and how a drawn point becomes a trial.

Objectives are compared at matched data and updates: what decides those may not hang on the objective.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from orchestrator.spec.search.dimensions import (
    Axes,
    Axis,
    Choice,
    Circular,
    Dimension,
    IntUniform,
    LogUniform,
    Params,
    Scalar,
    Uniform,
    ends,
    in_order,
    same,
    values,
)
from orchestrator.spec.search.trial_params import KIND, place
from trainer.config.base import Frozen
from trainer.config.trial import TrialConfig

_UPDATES = frozenset({"training.pairs_per_update", "training.max_steps", "training.num_train_epochs"})


def unmatched(when: Mapping[str, Sequence[str]], groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Searched leaves of the data or of the updates that are drawn by `loss.kind`, each with a sentence.

    `when`: each leaf's conditions by name. `groups`: the leaves that are zipped.
    """
    problem = "objectives are compared at the same data and updates: this may not depend on loss.kind"
    for group in groups:
        if KIND in group:
            yield from ((path, problem) for path in group if _decides(path))
    for path in when:
        if _decides(path) and _hangs_on_kind(path, when, frozenset()):
            yield path, problem


def _decides(path: str) -> bool:
    return path.startswith("data.") or path in _UPDATES


def _hangs_on_kind(path: str, when: Mapping[str, Sequence[str]], seen: frozenset[str]) -> bool:
    if path in seen:  # a circle is told elsewhere
        return False
    return any(other == KIND or _hangs_on_kind(other, when, seen | {path}) for other in when.get(path, ()))


__all__ = [
    "Choice",
    "Dimension",
    "Grid",
    "IntUniform",
    "LogUniform",
    "Params",
    "Scalar",
    "SearchSpace",
    "Uniform",
]


class SearchSpace(Frozen):
    """What is searched. `zipped` holds groups of paths whose lists advance together."""

    TWICE: ClassVar = "says the same as loss.gamma, which is searched too (gamma = gamma_beta_ratio * beta); search one"

    dimensions: dict[str, Dimension] = Field(default_factory=dict[str, Any])
    zipped: tuple[dict[str, tuple[Scalar, ...]], ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Every searched leaf, in the file's order."""
        return (*self.dimensions, *(path for group in self.zipped for path in group))

    def size(self) -> int | None:
        """Combinations, equal ones counted as often as they come up; None: infinitely many."""
        axes = self.axes()
        return None if axes.endless else len(axes)

    def grid_point(self, index: int) -> Params:
        """The index-th combination of a finite space, the last leaf advancing fastest; see Grid for distinct ones."""
        return self.axes().point(index)

    def active(self, params: Mapping[str, Scalar]) -> Params:
        """Those of `params` whose `when` holds."""
        return self.axes().active(params)

    def place(self, base: TrialConfig, params: Mapping[str, Scalar]) -> TrialConfig:
        """The trial at this point: `base` with the active ones of these leaves."""
        return place(base, self.active(params))

    def corners(self) -> Axes:
        """The space of its extremes: of each range both ends, of each list every value."""
        return Axes([*(Axis((p,), ends(d), _conditions(d)) for p, d in self.dimensions.items()), *self._groups()])

    def axes(self) -> Axes:
        """All combinations."""
        return Axes([*(Axis((p,), values(d), _conditions(d)) for p, d in self.dimensions.items()), *self._groups()])

    def listed(self, path: str) -> tuple[Scalar, ...]:
        """What the file lists for this leaf: its values, or the ends of its range."""
        if path in self.dimensions:
            return ends(self.dimensions[path])
        return next((group[path] for group in self.zipped if path in group), ())

    def endless(self, path: str) -> bool:
        """Whether this leaf is drawn from a continuous range."""
        return path in self.dimensions and values(self.dimensions[path]) is None

    def _groups(self) -> list[Axis]:
        return [Axis(tuple(group), tuple(zip(*group.values(), strict=True))) for group in self.zipped]

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if problems := [f"{path}: {problem}" for path, problem in self.unsound()]:
            raise ValueError("; ".join(problems))
        return self

    def unsound(self) -> Iterator[tuple[str, str]]:
        """What makes no sense in itself, whatever the base: each a path and a sentence."""
        for path in sorted({p for p in self.paths if self.paths.count(p) > 1}):
            yield path, "searched twice"
        if "loss.gamma" in self.paths and "loss.gamma_beta_ratio" in self.paths:
            yield "loss.gamma_beta_ratio", self.TWICE
        for group in self.zipped:
            if len({len(v) for v in group.values()}) > 1:
                lengths = ", ".join(f"{path} has {len(v)}" for path, v in group.items())
                yield next(iter(group)), f"zip needs lists of equal length: {lengths}"
        for path, dimension in self.dimensions.items():
            for other, allowed in _conditions(dimension).items():
                if problem := self._never(other, allowed):
                    yield path, problem
        when = {path: tuple(_conditions(dimension)) for path, dimension in self.dimensions.items()}
        yield from unmatched(when, [tuple(group) for group in self.zipped])
        try:
            in_order(Axis((p,), None, _conditions(d)) for p, d in self.dimensions.items())
        except Circular as error:
            yield next(iter(self.dimensions)), str(error)

    def _never(self, other: str, allowed: tuple[Scalar, ...]) -> str:
        drawn = self.drawable(other)
        if drawn is None:
            return f"when names {other}, which is not searched with a list of values"
        for value in allowed:
            if not any(same(value, d) for d in drawn):
                return f"when waits for {other} = {value}, which is never drawn (only {', '.join(map(str, drawn))})"
        return ""

    def drawable(self, path: str) -> tuple[Scalar, ...] | None:
        """The listed values of a searched leaf; None for a range or a leaf that is not searched."""
        match self.dimensions.get(path):
            case Choice(choice=listed):
                return listed
            case None:
                return next((group[path] for group in self.zipped if path in group), None)
            case _:
                return None


class Grid:
    """The distinct points of a finite space over `base`, in order; equal trials come once, however written."""

    def __init__(self, space: SearchSpace, base: TrialConfig) -> None:
        self._base, self._axes = base, space.axes()
        self._size = len(self._axes)
        self._walked = 0
        self._points: list[Params] = []
        self._seen: dict[str, int] = {}
        self.equal: list[tuple[Params, Params]] = []
        """Points left out so far, each with the equal one that was kept."""

    def point(self, index: int) -> Params | None:
        """The index-th distinct point; None past the last."""
        while len(self._points) <= index and self._walked < self._size:
            self._step()
        return self._points[index] if index < len(self._points) else None

    def __iter__(self) -> Iterator[Params]:
        index = 0
        while (point := self.point(index)) is not None:
            yield point
            index += 1

    def count(self) -> int:
        """How many distinct points there are; walks them all."""
        return sum(1 for _ in self)

    def _step(self) -> None:
        params = self._axes.point(self._walked)
        self._walked += 1
        key = json.dumps(place(self._base, params).identity(), sort_keys=True)
        if key in self._seen:
            self.equal.append((params, self._points[self._seen[key]]))
            return
        self._seen[key] = len(self._points)
        self._points.append(params)


def _conditions(dimension: Dimension) -> dict[str, tuple[Scalar, ...]]:
    return {p: v if isinstance(v, tuple) else (v,) for p, v in dimension.when.items()}
