"""The search space for samplers: one column per setting or zipped group, each with an Optuna distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from orchestrator.spec.search.dimensions import (
    Choice,
    Dimension,
    GridAxis,
    IntUniform,
    LogUniform,
    Uniform,
    is_numeric_dimension,
    values_equal,
)
from orchestrator.spec.search.space import SearchSpace


class OutOfSpace(ValueError):
    """The value is outside of the search space, as an enqueued trial's may be."""


@dataclass(frozen=True, slots=True)
class SearchColumn:
    """One dimension to sample: a setting or a zipped group. `rows`: the values by index, if indexes are sampled."""

    name: str
    axis: GridAxis
    distribution: BaseDistribution
    rows: tuple[Any, ...] | None = None
    on_lattice: bool = False

    @property
    def numeric(self) -> bool:
        """Whether values have an order and a distance."""
        return not isinstance(self.distribution, CategoricalDistribution)

    def encode(self, params: Mapping[str, Any]) -> Any:
        """Return the sampled value that gives these params. Raises OutOfSpace."""
        values = tuple(params[path] for path in self.axis.paths)
        if self.rows is not None:
            found = next((i for i, row in enumerate(self.rows) if _equal(row, values)), None)
            if found is None:
                raise OutOfSpace(self.name)
            return found
        if not contains(self.distribution, values[0]):
            raise OutOfSpace(self.name)
        return values[0]

    def decode(self, sampled: Any) -> dict[str, Any]:
        """Return the settings of a sampled value."""
        if self.rows is not None:
            row = self.rows[sampled]
            return dict(zip(self.axis.paths, row if len(self.axis.paths) > 1 else (row,), strict=True))
        # Rounded, so that 0.1 + 2 * 0.1 on a lattice is 0.3.
        return {self.axis.paths[0]: float(f"{sampled:.12g}") if self.on_lattice else sampled}

    def suggest(self, trial: Trial) -> Any:
        """Return the value that Optuna suggests for this column."""
        match self.distribution:
            case FloatDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_float(self.name, low, high, step=step, log=log)
            case IntDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_int(self.name, low, high, step=step, log=log)
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(self.name, choices)
            case _:
                raise TypeError(self.distribution)

    def value_at(self, position: float) -> Any:
        """Return the value at `position` in [0, 1); discrete values have equal shares of the interval."""
        match self.distribution:
            case FloatDistribution(low=low, high=high, step=None, log=log):
                return (
                    math.exp(_between(math.log(low), math.log(high), position))
                    if log
                    else _between(low, high, position)
                )
            case FloatDistribution(low=low, high=high, step=step):
                assert step is not None
                return low + step * _index(position, round((high - low) / step) + 1)
            case IntDistribution(low=low, high=high, log=True):
                value = math.exp(_between(math.log(low - 0.5), math.log(high + 0.5), position))
                return min(high, max(low, round(value)))
            case IntDistribution(low=low, high=high, step=step):
                return low + step * _index(position, (high - low) // step + 1)
            case CategoricalDistribution(choices=choices):
                return choices[_index(position, len(choices))]
            case _:
                raise TypeError(self.distribution)

    def position_of(self, sampled: Any) -> float:
        """Return the position in [0, 1] of a sampled number: the middle of its share."""
        match self.distribution:
            case FloatDistribution(low=low, high=high, step=None, log=log):
                return _share(math.log(sampled), math.log(low), math.log(high)) if log else _share(sampled, low, high)
            case FloatDistribution(low=low, high=high, step=step):
                assert step is not None
                return (round((sampled - low) / step) + 0.5) / (round((high - low) / step) + 1)
            case IntDistribution(low=low, high=high, log=True):
                return _share(math.log(sampled), math.log(low - 0.5), math.log(high + 0.5))
            case IntDistribution(low=low, high=high, step=step):
                return ((sampled - low) // step + 0.5) / ((high - low) // step + 1)
            case _:
                raise TypeError(self.distribution)


def search_columns(space: SearchSpace, *, ordinal: bool = False) -> list[SearchColumn]:
    """Return every column, after those that its condition names. `ordinal`: sample lists of numbers by rank."""
    out: list[SearchColumn] = []
    for axis in space.grid_index().ordered:
        path, *others = axis.paths
        if others or path not in space.dimensions:
            assert axis.values is not None
            rows = tuple(axis.values)
            out.append(
                SearchColumn("+".join(axis.paths), axis, CategoricalDistribution(range(len(rows))), _group_rows(axis))
            )
            continue
        dimension = space.dimensions[path]
        if ordinal and isinstance(dimension, Choice) and is_numeric_dimension(dimension):
            ranked = tuple(sorted(dimension.choice))  # pyright: ignore[reportArgumentType]  numbers only
            out.append(SearchColumn(path, axis, IntDistribution(0, len(ranked) - 1), ranked))
            continue
        lattice = isinstance(dimension, Uniform) and dimension.step is not None
        out.append(SearchColumn(path, axis, to_distribution(dimension), on_lattice=lattice))
    return out


def space_distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return the Optuna distribution of each searched setting, as the study stores it."""
    found = {path: to_distribution(dimension) for path, dimension in space.dimensions.items()}
    for group in space.zipped:
        found |= {path: CategoricalDistribution(choices) for path, choices in group.items()}
    return found


def to_distribution(dimension: Dimension) -> BaseDistribution:
    """Return the Optuna distribution of a dimension."""
    match dimension:
        case Choice(choice=choices):
            return CategoricalDistribution(choices)
        case Uniform(uniform=(low, high), step=step):
            return FloatDistribution(low, high, step=step)
        case LogUniform(log_uniform=(low, high)):
            return FloatDistribution(low, high, log=True)
        case IntUniform(int_uniform=(low, high), step=step, log=log):
            return IntDistribution(low, high, step=step, log=log)
        case _:
            assert_never(dimension)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether the distribution contains the value."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return any(values_equal(choice, value) for choice in choices)
        case FloatDistribution(low=low, high=high, step=step) | IntDistribution(low=low, high=high, step=step):
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                return False
            positions = 0.0 if step is None else (value - low) / step
            return abs(positions - round(positions)) < 1e-6
        case _:
            raise TypeError(distribution)


def _group_rows(axis: GridAxis) -> tuple[Any, ...]:
    """Return the rows of a zipped group; the values of a group with one path."""
    assert axis.values is not None
    return tuple(row[0] if len(axis.paths) == 1 and isinstance(row, tuple) else row for row in axis.values)


def _equal(row: Any, expected: tuple[Any, ...]) -> bool:
    values: tuple[Any, ...] = row if len(expected) > 1 else (row,)
    return all(values_equal(value, expected_value) for value, expected_value in zip(values, expected, strict=True))


def _between(low: float, high: float, position: float) -> float:
    return low + (high - low) * position


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low)


def _index(position: float, count: int) -> int:
    return min(count - 1, max(0, int(position * count)))
