"""One searched leaf: a list of values or a range, each optionally only under a condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from trainer.frozen import Count, Frozen, Positive

Scalar = bool | int | float | str | None
Params = dict[str, Any]
"""A drawn point: dotted path -> value, active leaves only."""

_SLACK = 1e-9


def same(a: Scalar, b: Scalar) -> bool:
    """Equal as values of a leaf: 2 is 2.0, but true is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


class _Conditional(Frozen):
    when: dict[str, Scalar | tuple[Scalar, ...]] = Field(
        default_factory=dict[str, Any],
        description="Searched only where these leaves were drawn as one of these values.",
    )


class Choice(_Conditional):
    """One of these values. Shorthand: the list alone."""

    choice: Annotated[tuple[Scalar, ...], Field(min_length=1)]


class Uniform(_Conditional):
    """Between low and high, both included; with `step` on that lattice."""

    uniform: tuple[float, float]
    step: Positive | None = None

    @model_validator(mode="after")
    def _range(self) -> Self:
        low, high = self.uniform
        _ordered(low, high)
        if self.step is not None:
            _whole_steps(low, high, self.step)
        return self


class LogUniform(_Conditional):
    """Uniform in the logarithm, both ends included."""

    log_uniform: tuple[Positive, Positive]

    @model_validator(mode="after")
    def _range(self) -> Self:
        _ordered(*self.log_uniform)
        return self


class IntUniform(_Conditional):
    """Whole numbers from low to high, both included."""

    int_uniform: tuple[int, int]
    step: Count = 1
    log: bool = False

    @model_validator(mode="after")
    def _range(self) -> Self:
        low, high = self.int_uniform
        _ordered(low, high)
        _whole_steps(low, high, self.step)
        if self.log and low < 1:
            raise ValueError(f"log needs a range above 0, and it begins at {low}")
        if self.log and self.step != 1:
            raise ValueError("log and step exclude each other; leave step out")
        return self


Dimension = Choice | Uniform | LogUniform | IntUniform
KINDS: dict[str, type[Dimension]] = {
    "choice": Choice,
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "int_uniform": IntUniform,
}


class Lattice(Sequence[float]):
    """low, low + step, ..., high; made as asked for, each rounded so that 0.1 + 2 * 0.1 is 0.3."""

    def __init__(self, low: float, high: float, step: float) -> None:
        self._low, self._step = low, step
        self._length = round((high - low) / step) + 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return float(f"{self._low + index * self._step:.12g}")


def values(dimension: Dimension) -> Sequence[Scalar] | None:
    """Every value in order; None where there are infinitely many."""
    match dimension:
        case Choice():
            return dimension.choice
        case Uniform(uniform=(low, high), step=step):
            return None if step is None else Lattice(low, high, step)
        case LogUniform():
            return None
        case IntUniform(int_uniform=(low, high), step=step):
            return range(low, high + 1, step)


def is_numeric(dimension: Dimension) -> bool:
    """Whether it is a range, or a list of two numbers or more: nearby values mean similar trials."""
    if not isinstance(dimension, Choice):
        return True
    listed = dimension.choice
    return len(listed) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in listed)


def ends(dimension: Dimension) -> tuple[Scalar, ...]:
    """Both ends of a range; of a list, each value."""
    match dimension:
        case Choice():
            return dimension.choice
        case Uniform():
            return dimension.uniform
        case LogUniform():
            return dimension.log_uniform
        case IntUniform():
            return dimension.int_uniform


def _ordered(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(
            f"the range [{low:g}, {high:g}] is not from low to high; for one value write a list: [{low:g}]"
        )


def _whole_steps(low: float, high: float, step: float) -> None:
    steps = (high - low) / step
    if steps < 1 - _SLACK or abs(steps - round(steps)) > _SLACK * max(1.0, steps):
        last = low + int(steps + _SLACK) * step
        raise ValueError(f"from {low:g} in steps of {step:g} the last value is {last:.12g}, not {high:g}; change one")
