"""The search space: dotted path -> distribution, and how a drawn point becomes a trial."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.frozen import Frozen

Scalar = bool | int | float | str | None


class Choice(Frozen):
    """One of these values. Shorthand: the list alone."""

    choice: Annotated[tuple[Scalar, ...], Field(min_length=1)]
    when: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict[str, Any])


class Uniform(Frozen):
    """Between low and high, both included; with `step` on that lattice."""

    uniform: tuple[float, float]
    step: float | None = None
    when: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict[str, Any])


class LogUniform(Frozen):
    """Uniform in the logarithm."""

    log_uniform: tuple[float, float]
    when: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict[str, Any])


class IntUniform(Frozen):
    """Whole numbers from low to high, both included."""

    int_uniform: tuple[int, int]
    step: int = 1
    log: bool = False
    when: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict[str, Any])


Dimension = Choice | Uniform | LogUniform | IntUniform
Params = dict[str, Any]


class SearchSpace(Frozen):
    """What is searched. `zipped` holds groups of paths whose lists advance together."""

    dimensions: dict[str, Dimension] = Field(default_factory=dict[str, Any])
    zipped: tuple[dict[str, tuple[Scalar, ...]], ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Every searched leaf, in the file's order."""
        return (*self.dimensions, *(path for group in self.zipped for path in group))


SamplerKind = Literal["grid", "random"]
