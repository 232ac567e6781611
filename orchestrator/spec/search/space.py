"""`SearchSpace`: dotted path -> distribution; `Grid`: its distinct combinations; `mismatched_paths`.

Kinds of loss are compared at equal data and updates: settings of these must not depend on `loss.kind`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from orchestrator.spec.search.dimensions import (
    Choice,
    CircularConditions,
    Dimension,
    GridAxis,
    GridIndex,
    Params,
    Scalar,
    all_values,
    end_values,
    order_axes,
    values_equal,
)
from orchestrator.spec.search.trial_params import LOSS_KIND, apply_params
from trainer.config.base import FrozenModel
from trainer.config.trial import TrialConfig

_UPDATES = frozenset({"training.pairs_per_update", "training.max_steps", "training.num_train_epochs"})


def mismatched_paths(when: Mapping[str, Sequence[str]], groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Yield the searched settings of the data or of the updates that depend on `loss.kind`, each with a message.

    `when`: the settings that each setting's condition names. `groups`: the settings that are zipped.
    """
    problem = "kinds of loss are compared at the same data and updates: this may not depend on loss.kind"
    for group in groups:
        if LOSS_KIND in group:
            yield from ((path, problem) for path in group if _changes_updates_or_data(path))
    for path in when:
        if _changes_updates_or_data(path) and _depends_on_kind(path, when, frozenset()):
            yield path, problem


def _changes_updates_or_data(path: str) -> bool:
    return path.startswith("data.") or path in _UPDATES


def _depends_on_kind(path: str, when: Mapping[str, Sequence[str]], seen: frozenset[str]) -> bool:
    if path in seen:  # order_axes reports circular conditions
        return False
    return any(other == LOSS_KIND or _depends_on_kind(other, when, seen | {path}) for other in when.get(path, ()))


class SearchSpace(FrozenModel):
    """The searched settings and their distributions. `zipped`: groups of paths whose lists advance together."""

    TWICE: ClassVar = "is the same margin as loss.gamma, also searched (gamma = gamma_beta_ratio * beta); search one"

    dimensions: dict[str, Dimension] = Field(default_factory=dict[str, Any])
    zipped: tuple[dict[str, tuple[Scalar, ...]], ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All searched settings, in the file's order."""
        return (*self.dimensions, *(path for group in self.zipped for path in group))

    def size(self) -> int | None:
        """Return the number of combinations, repeated ones counted each time; None if infinite."""
        axes = self.grid_index()
        return None if axes.is_continuous else len(axes)

    def active(self, params: Mapping[str, Scalar]) -> Params:
        """Return those of `params` whose `when` holds."""
        return self.grid_index().active(params)

    def apply(self, base: TrialConfig, params: Mapping[str, Scalar]) -> TrialConfig:
        """Return the trial at this point: `base` with the active ones of `params`."""
        return apply_params(base, self.active(params))

    def corners(self) -> GridIndex:
        """Return the combinations of the extremes: both ends of each range, every value of each list."""
        return GridIndex(
            [
                *(
                    GridAxis((path,), end_values(dimension), _conditions(dimension))
                    for path, dimension in self.dimensions.items()
                ),
                *self._groups(),
            ]
        )

    def grid_index(self) -> GridIndex:
        """Return all combinations, numbered, the last setting advancing fastest; `Grid` has the distinct ones."""
        return GridIndex(
            [
                *(
                    GridAxis((path,), all_values(dimension), _conditions(dimension))
                    for path, dimension in self.dimensions.items()
                ),
                *self._groups(),
            ]
        )

    def listed_values(self, path: str) -> tuple[Scalar, ...]:
        """Return a setting's values as listed in the file, or the ends of its range."""
        if path in self.dimensions:
            return end_values(self.dimensions[path])
        return next((group[path] for group in self.zipped if path in group), ())

    def is_continuous(self, path: str) -> bool:
        """Return whether the setting has a continuous range."""
        return path in self.dimensions and all_values(self.dimensions[path]) is None

    def _groups(self) -> list[GridAxis]:
        return [GridAxis(tuple(group), tuple(zip(*group.values(), strict=True))) for group in self.zipped]

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if problems := [f"{path}: {problem}" for path, problem in self.find_problems()]:
            raise ValueError("; ".join(problems))
        return self

    def find_problems(self) -> Iterator[tuple[str, str]]:
        """Yield the problems that do not depend on the base, each a path and a message."""
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
                if problem := self._never_holds(other, allowed):
                    yield path, problem
        when = {path: tuple(_conditions(dimension)) for path, dimension in self.dimensions.items()}
        yield from mismatched_paths(when, [tuple(group) for group in self.zipped])
        try:
            order_axes(GridAxis((p,), None, _conditions(d)) for p, d in self.dimensions.items())
        except CircularConditions as error:
            yield next(iter(self.dimensions)), str(error)

    def _never_holds(self, other: str, allowed: tuple[Scalar, ...]) -> str:
        sampled = self.choices(other)
        if sampled is None:
            return f"when names {other}, which is not searched with a list of values"
        for value in allowed:
            if not any(values_equal(value, d) for d in sampled):
                return f"when needs {other} = {value}, which is never drawn (only {', '.join(map(str, sampled))})"
        return ""

    def choices(self, path: str) -> tuple[Scalar, ...] | None:
        """Return the listed values of a searched setting; None for a range or a setting that is not searched."""
        match self.dimensions.get(path):
            case Choice(choice=listed):
                return listed
            case None:
                return next((group[path] for group in self.zipped if path in group), None)
            case _:
                return None


class Grid:
    """The distinct points of a finite search space over `base`, in order; points that give equal trials count once."""

    def __init__(self, space: SearchSpace, base: TrialConfig) -> None:
        self._base, self._axes = base, space.grid_index()
        self._size = len(self._axes)
        self._enumerated = 0
        self._points: list[Params] = []
        self._seen: dict[str, int] = {}
        self.equal: list[tuple[Params, Params]] = []
        """Pairs of a dropped point and the equal point before it, as far as the grid was enumerated."""

    def params_at(self, index: int) -> Params | None:
        """Return the index-th distinct point; None past the last."""
        while len(self._points) <= index and self._enumerated < self._size:
            self._step()
        return self._points[index] if index < len(self._points) else None

    def __iter__(self) -> Iterator[Params]:
        index = 0
        while (point := self.params_at(index)) is not None:
            yield point
            index += 1

    def count(self) -> int:
        """Return the number of distinct points; enumerates all combinations."""
        return sum(1 for _ in self)

    def _step(self) -> None:
        params = self._axes.params_at(self._enumerated)
        self._enumerated += 1
        key = json.dumps(apply_params(self._base, params).canonical_params(), sort_keys=True)
        if key in self._seen:
            self.equal.append((params, self._points[self._seen[key]]))
            return
        self._seen[key] = len(self._points)
        self._points.append(params)


def _conditions(dimension: Dimension) -> dict[str, tuple[Scalar, ...]]:
    return {p: v if isinstance(v, tuple) else (v,) for p, v in dimension.when.items()}
