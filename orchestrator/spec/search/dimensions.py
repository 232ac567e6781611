"""Distributions of one searched setting: a list of values or a range, each optionally under a condition.

`GridIndex` counts the combinations of a search and returns one by number without building the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from trainer.config.base import FrozenModel, PositiveFloat, PositiveInt

Scalar = bool | int | float | str | None
Params = dict[str, Any]
"""A point of the search space: dotted path -> value, active settings only."""

_SLACK = 1e-9


def values_equal(value: Scalar, other: Scalar) -> bool:
    """Return whether two values of a setting are equal: 2 equals 2.0, but true does not equal 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


class _Conditional(FrozenModel):
    when: dict[str, Scalar | tuple[Scalar, ...]] = Field(
        default_factory=dict[str, Any],
        description="Searched only if these settings have one of these values in the trial.",
    )


class Choice(_Conditional):
    """One of these values. Shorthand: the list alone."""

    choice: Annotated[tuple[Scalar, ...], Field(min_length=1)] = Field(description="The values.")


class Uniform(_Conditional):
    """A float from low to high, both included; with `step` on the lattice low, low + step, ..."""

    uniform: tuple[float, float] = Field(description="[low, high].")
    step: PositiveFloat | None = Field(default=None, description="Distance between values; by default any value.")

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        low, high = self.uniform
        _check_order(low, high)
        if self.step is not None:
            _check_steps(low, high, self.step)
        return self


class LogUniform(_Conditional):
    """Uniform in the logarithm, both ends included."""

    log_uniform: tuple[PositiveFloat, PositiveFloat] = Field(description="[low, high].")

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        _check_order(*self.log_uniform)
        return self


class IntUniform(_Conditional):
    """Whole numbers from low to high, both included."""

    int_uniform: tuple[int, int] = Field(description="[low, high].")
    step: PositiveInt = Field(default=1, description="Distance between values.")
    log: bool = Field(default=False, description="Uniform in the logarithm.")

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        low, high = self.int_uniform
        _check_order(low, high)
        _check_steps(low, high, self.step)
        if self.log and low < 1:
            raise ValueError(f"log needs a range above 0, and this one begins at {low}")
        if self.log and self.step != 1:
            raise ValueError("log and step exclude each other; leave step out")
        return self


Dimension = Choice | Uniform | LogUniform | IntUniform
DIMENSION_KINDS: dict[str, type[Dimension]] = {
    "choice": Choice,
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "int_uniform": IntUniform,
}


class Lattice(Sequence[float]):
    """low, low + step, ..., high, computed on access and rounded so that 0.1 + 2 * 0.1 is 0.3."""

    def __init__(self, low: float, high: float, step: float) -> None:
        self._low, self._step = low, step
        self._length = round((high - low) / step) + 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return float(f"{self._low + index * self._step:.12g}")


def all_values(dimension: Dimension) -> Sequence[Scalar] | None:
    """Return every value in order; None if there are infinitely many."""
    match dimension:
        case Choice():
            return dimension.choice
        case Uniform(uniform=(low, high), step=step):
            return None if step is None else Lattice(low, high, step)
        case LogUniform():
            return None
        case IntUniform(int_uniform=(low, high), step=step):
            return range(low, high + 1, step)


def is_numeric_dimension(dimension: Dimension) -> bool:
    """Return whether the dimension is a range, or a list of two numbers or more, so that values have an order."""
    if not isinstance(dimension, Choice):
        return True
    listed = dimension.choice
    return len(listed) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in listed)


def end_values(dimension: Dimension) -> tuple[Scalar, ...]:
    """Return both ends of a range, or each value of a list."""
    match dimension:
        case Choice():
            return dimension.choice
        case Uniform():
            return dimension.uniform
        case LogUniform():
            return dimension.log_uniform
        case IntUniform():
            return dimension.int_uniform


def _check_order(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(
            f"the range [{low:g}, {high:g}] is not from low to high; for one value write a list: [{low:g}]"
        )


def _check_steps(low: float, high: float, step: float) -> None:
    steps = (high - low) / step
    if steps < 1 - _SLACK or abs(steps - round(steps)) > _SLACK * max(1.0, steps):
        last = low + int(steps + _SLACK) * step
        raise ValueError(f"from {low:g} in steps of {step:g} the last value is {last:.12g}, not {high:g}; change one")


@dataclass(frozen=True, slots=True)
class GridAxis:
    """One setting, or several that are zipped. `values` is None for a continuous range."""

    paths: tuple[str, ...]
    values: Sequence[Scalar | tuple[Scalar, ...]] | None
    when: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict[str, tuple[Scalar, ...]])

    def params_at(self, index: int) -> Params:
        """Return the settings of the index-th value."""
        assert self.values is not None
        value = self.values[index]
        return dict(zip(self.paths, value, strict=True)) if isinstance(value, tuple) else {self.paths[0]: value}

    def is_active(self, sampled: Mapping[str, Scalar]) -> bool:
        """Return whether the axis's condition holds for the values of the axes before it."""
        return all(
            path in sampled and any(values_equal(sampled[path], value) for value in allowed)
            for path, allowed in self.when.items()
        )


class CircularConditions(ValueError):
    """Conditions (`when`) that depend on each other."""


def order_axes(axes: Iterable[GridAxis]) -> list[GridAxis]:
    """Return the axes in the file's order, each conditional axis after those that its condition names.

    Raises CircularConditions.
    """
    waiting, ordered, ordered_paths = list(axes), list[GridAxis](), set[str]()
    searched = {path for axis in waiting for path in axis.paths}
    while waiting:
        ready = next((a for a in waiting if ordered_paths >= a.when.keys() & searched), None)
        if ready is None:
            raise CircularConditions(
                "the conditions of " + ", ".join(p for a in waiting for p in a.paths) + " are circular"
            )
        waiting.remove(ready)
        ordered.append(ready)
        ordered_paths.update(ready.paths)
    return ordered


class GridIndex:
    """Numbers the combinations of the axes in mixed radix, the last axis fastest; an inactive axis has no digit."""

    def __init__(self, axes: Iterable[GridAxis]) -> None:
        self._axes = order_axes(axes)
        self._deciding = {path for axis in self._axes for path in axis.when}
        self._counted: dict[tuple[object, ...], int] = {}

    @property
    def ordered(self) -> Sequence[GridAxis]:
        """The axes, each after those that its condition names."""
        return self._axes

    @property
    def is_continuous(self) -> bool:
        """Whether some axis is a continuous range."""
        return any(axis.values is None for axis in self._axes)

    def __len__(self) -> int:
        return self._count(0, {})

    def params_at(self, index: int) -> Params:
        """Return the index-th combination."""
        if not 0 <= index < len(self):
            raise IndexError(f"combination {index} of {len(self)}")
        sampled: Params = {}
        for axis_index, axis in enumerate(self._axes):
            if not axis.is_active(sampled):
                continue
            digit, index = self._digit(axis_index, sampled, index)
            sampled |= axis.params_at(digit)
        return sampled

    def active(self, params: Mapping[str, Scalar]) -> Params:
        """Return those of `params` whose conditions hold."""
        remaining: Params = {}
        for axis in self._axes:
            if axis.is_active(remaining):
                remaining |= {path: params[path] for path in axis.paths if path in params}
        return remaining

    def _digit(self, axis_index: int, sampled: Params, index: int) -> tuple[int, int]:
        axis = self._axes[axis_index]
        assert axis.values is not None
        if self._deciding.isdisjoint(axis.paths):
            return divmod(index, self._count(axis_index + 1, sampled))
        for digit in range(len(axis.values)):
            below = self._count(axis_index + 1, sampled | axis.params_at(digit))
            if index < below:
                return digit, index
            index -= below
        raise AssertionError("an index below the count has a digit")

    def _count(self, axis_index: int, sampled: Params) -> int:
        if axis_index == len(self._axes):
            return 1
        key = (axis_index, *((p, type(v), v) for p, v in sampled.items() if p in self._deciding))
        if key not in self._counted:
            self._counted[key] = self._count_new(axis_index, sampled)
        return self._counted[key]

    def _count_new(self, axis_index: int, sampled: Params) -> int:
        axis = self._axes[axis_index]
        if not axis.is_active(sampled):
            return self._count(axis_index + 1, sampled)
        if axis.values is None:
            raise ValueError(f"{axis.paths[0]} is a continuous range: it has no combinations")
        if self._deciding.isdisjoint(axis.paths):
            return len(axis.values) * self._count(axis_index + 1, sampled)
        return sum(self._count(axis_index + 1, sampled | axis.params_at(i)) for i in range(len(axis.values)))
