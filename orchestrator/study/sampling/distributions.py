"""The search space as samplers see it: one column per leaf or zipped group, each with Optuna's distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from orchestrator.spec.search.dimensions import Axis, is_numeric, same
from orchestrator.spec.search.space import Choice, Dimension, IntUniform, LogUniform, SearchSpace, Uniform


class Outside(ValueError):
    """A value that the search does not hold: somebody gave it."""


@dataclass(frozen=True, slots=True)
class Column:
    """One thing to draw. `rows` are the values behind the indexes that are drawn instead of them."""

    name: str
    axis: Axis
    distribution: BaseDistribution
    rows: tuple[Any, ...] | None = None
    on_lattice: bool = False

    @property
    def numeric(self) -> bool:
        """Whether nearby values mean similar trials."""
        return not isinstance(self.distribution, CategoricalDistribution)

    def encode(self, params: Mapping[str, Any]) -> Any:
        """What a sampler would have drawn for these params; Outside where it could not."""
        values = tuple(params[path] for path in self.axis.paths)
        if self.rows is not None:
            found = next((i for i, row in enumerate(self.rows) if _equal(row, values)), None)
            if found is None:
                raise Outside(self.name)
            return found
        if not holds(self.distribution, values[0]):
            raise Outside(self.name)
        return values[0]

    def decode(self, drawn: Any) -> dict[str, Any]:
        """The leaves of a drawn value."""
        if self.rows is not None:
            row = self.rows[drawn]
            return dict(zip(self.axis.paths, row if len(self.axis.paths) > 1 else (row,), strict=True))
        # On a lattice 0.1 + 2 * 0.1 is 0.3, as a person writes it.
        return {self.axis.paths[0]: float(f"{drawn:.12g}") if self.on_lattice else drawn}

    def suggest(self, trial: Trial) -> Any:
        """Have Optuna draw it."""
        match self.distribution:
            case FloatDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_float(self.name, low, high, step=step, log=log)
            case IntDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_int(self.name, low, high, step=step, log=log)
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(self.name, choices)
            case _:
                raise TypeError(self.distribution)

    def at(self, place: float) -> Any:
        """The value at `place` in [0, 1), every value with its share of it."""
        match self.distribution:
            case FloatDistribution(low=low, high=high, step=None, log=log):
                return math.exp(_between(math.log(low), math.log(high), place)) if log else _between(low, high, place)
            case FloatDistribution(low=low, high=high, step=step):
                assert step is not None
                return low + step * _index(place, round((high - low) / step) + 1)
            case IntDistribution(low=low, high=high, log=True):
                value = math.exp(_between(math.log(low - 0.5), math.log(high + 0.5), place))
                return min(high, max(low, round(value)))
            case IntDistribution(low=low, high=high, step=step):
                return low + step * _index(place, (high - low) // step + 1)
            case CategoricalDistribution(choices=choices):
                return choices[_index(place, len(choices))]
            case _:
                raise TypeError(self.distribution)

    def place(self, drawn: Any) -> float:
        """Where in [0, 1] a drawn number lies: the middle of its share."""
        match self.distribution:
            case FloatDistribution(low=low, high=high, step=None, log=log):
                return _share(math.log(drawn), math.log(low), math.log(high)) if log else _share(drawn, low, high)
            case FloatDistribution(low=low, high=high, step=step):
                assert step is not None
                return (round((drawn - low) / step) + 0.5) / (round((high - low) / step) + 1)
            case IntDistribution(low=low, high=high, log=True):
                return _share(math.log(drawn), math.log(low - 0.5), math.log(high + 0.5))
            case IntDistribution(low=low, high=high, step=step):
                return ((drawn - low) // step + 0.5) / ((high - low) // step + 1)
            case _:
                raise TypeError(self.distribution)


def columns(space: SearchSpace, *, ordinal: bool = False) -> list[Column]:
    """Every column, each behind those its condition waits for. `ordinal`: lists of numbers are drawn by their rank."""
    out: list[Column] = []
    for axis in space.axes().ordered:
        path, *others = axis.paths
        if others or path not in space.dimensions:
            assert axis.values is not None
            rows = tuple(axis.values)
            out.append(Column("+".join(axis.paths), axis, CategoricalDistribution(range(len(rows))), _unwrapped(axis)))
            continue
        dimension = space.dimensions[path]
        if ordinal and isinstance(dimension, Choice) and is_numeric(dimension):
            ranked = tuple(sorted(dimension.choice))  # pyright: ignore[reportArgumentType]  numbers only
            out.append(Column(path, axis, IntDistribution(0, len(ranked) - 1), ranked))
            continue
        lattice = isinstance(dimension, Uniform) and dimension.step is not None
        out.append(Column(path, axis, distribution(dimension), on_lattice=lattice))
    return out


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Each searched leaf as the study records it."""
    found = {path: distribution(dimension) for path, dimension in space.dimensions.items()}
    for group in space.zipped:
        found |= {path: CategoricalDistribution(choices) for path, choices in group.items()}
    return found


def distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's name for a dimension."""
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


def holds(distribution: BaseDistribution, value: Any) -> bool:
    """Whether the search holds this value."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return any(same(choice, value) for choice in choices)
        case FloatDistribution(low=low, high=high, step=step) | IntDistribution(low=low, high=high, step=step):
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                return False
            places = 0.0 if step is None else (value - low) / step
            return abs(places - round(places)) < 1e-6
        case _:
            raise TypeError(distribution)


def _unwrapped(axis: Axis) -> tuple[Any, ...]:
    """Rows of a group; of a group of one path, its values."""
    assert axis.values is not None
    return tuple(row[0] if len(axis.paths) == 1 and isinstance(row, tuple) else row for row in axis.values)


def _equal(row: Any, wanted: tuple[Any, ...]) -> bool:
    values: tuple[Any, ...] = row if len(wanted) > 1 else (row,)
    return all(same(a, b) for a, b in zip(values, wanted, strict=True))


def _between(low: float, high: float, place: float) -> float:
    return low + (high - low) * place


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low)


def _index(place: float, count: int) -> int:
    return min(count - 1, max(0, int(place * count)))
