"""Checks that every corner of a search space is a valid trial, when the file is loaded.

A corner is a configuration at an extreme of the search space: an end of each range, a value of each list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from pydantic import ValidationError

from orchestrator.spec.loading.validation_errors import describe_value, first_error
from orchestrator.spec.search.dimensions import Choice, GridIndex, Params, Scalar, values_equal
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import (
    LOSS_KIND,
    UnknownPath,
    all_settings,
    apply_params,
    default_loss,
    list_as_text,
    list_settings,
)
from trainer.config.trial import TrialConfig, flatten

MAX_CORNERS = 512
"""Corners that are checked; of a larger search, this many at even distances."""


class CornerProblem(ValueError):
    """A searched setting that makes a corner invalid, the value at fault if it is one value, and the problem."""

    def __init__(self, path: str, value: Scalar, problem: str, hint: str = "") -> None:
        self.path, self.value, self.problem, self.hint = path, value, problem, hint
        super().__init__(f"{path}: {problem}")


def find_corner_problems(space: SearchSpace, base: TrialConfig, *, is_new: bool = True) -> list[CornerProblem]:
    """Return the distinct problems that make corners invalid trials. `is_new`: see `apply_params`."""
    unknown = list(_unknown_paths(space, base))
    if unknown:
        return unknown
    corners = space.corners()
    found: dict[tuple[str, str], CornerProblem] = {}
    failures: list[tuple[Params, ValueError]] = []
    legal: list[Params] = []
    checked = [*sample_corners(corners)]
    if len(corners) > MAX_CORNERS:
        checked += sample_corners(extreme_space(space))
    for params in checked:
        try:
            config = apply_params(base, params, is_new=is_new)
        except ValueError as error:
            failures.append((params, error))
            continue
        legal.append(params)
        flat = config.flat_params()
        for path, value in params.items():
            typed = list_as_text(path, flat.get(path))
            if not _is_as_written(value, typed):
                problem = CornerProblem(
                    path,
                    value,
                    f"{describe_value(value)} is not of the setting's type; write {describe_value(typed)}",
                )
                found.setdefault((path, repr(value)), problem)
    for params, error in failures:
        problem = _find_cause(params, error, legal)
        found.setdefault((problem.path, repr(problem.value)), problem)
    return list(found.values())


def with_typed_values(space: SearchSpace, base: TrialConfig) -> SearchSpace:
    """Return the space with each listed value in its setting's type: 2 becomes 2.0 if the setting is a float."""
    typed: dict[tuple[str, str], Scalar] = {}
    for params in sample_corners(space.corners()):
        typed_params = apply_params(base, params).flat_params()
        typed |= {(p, repr(v)): list_as_text(p, typed_params[p]) for p, v in params.items() if v is not None}

    def to_setting_type(path: str, listed: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        return tuple(typed.get((path, repr(value)), value) for value in listed)

    dimensions = {
        path: dimension.model_copy(update={"choice": to_setting_type(path, dimension.choice)})
        if isinstance(dimension, Choice)
        else dimension
        for path, dimension in space.dimensions.items()
    }
    zipped = tuple({path: to_setting_type(path, listed) for path, listed in group.items()} for group in space.zipped)
    return SearchSpace(dimensions=dimensions, zipped=zipped)


def extreme_space(space: SearchSpace) -> GridIndex:
    """Return the corners, with only the smallest and the largest value of each list of numbers."""
    narrowed = {
        path: dimension.model_copy(update={"choice": extreme_values(dimension.choice)})
        if isinstance(dimension, Choice)
        else dimension
        for path, dimension in space.dimensions.items()
    }
    return space.model_copy(update={"dimensions": narrowed}).corners()


def corner_configs(space: SearchSpace, base: TrialConfig) -> list[TrialConfig]:
    """Return the trial configurations at the corners of `extreme_space`."""
    return [config for _, config in valid_corners(space, base)]


def valid_corners(space: SearchSpace, base: TrialConfig) -> list[tuple[Params, TrialConfig]]:
    """Return the corners of `extreme_space` that are trials, each with its configuration.

    All of them are, unless there are more corners than are checked when the file is loaded.
    """
    found: list[tuple[Params, TrialConfig]] = []
    for params in sample_corners(extreme_space(space)):
        with suppress(ValidationError):
            found.append((params, space.apply(base, params)))
    return found


def extreme_values(listed: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    """Return the smallest and the largest of a list of numbers; of other values all."""
    numbers = [v for v in listed if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(listed):
        return listed
    return tuple(dict.fromkeys((min(numbers), max(numbers))))


def sample_corners(corners: GridIndex) -> Iterator[Params]:
    """Yield all corners, or MAX_CORNERS of them at even distances, including the first and the last."""
    count = len(corners)
    if count <= MAX_CORNERS:
        yield from (corners.params_at(i) for i in range(count))
        return
    yield from (corners.params_at(i * (count - 1) // (MAX_CORNERS - 1)) for i in range(MAX_CORNERS))


def _unknown_paths(space: SearchSpace, base: TrialConfig) -> Iterator[CornerProblem]:
    typed_params = dict(flatten(all_settings(base)))
    for kind in space.choices(LOSS_KIND) or ():
        try:
            typed_params |= flatten({"loss": default_loss(str(kind))})
        except ValueError:
            continue  # Not a kind of loss: the corner with this value reports it.
    for path in space.paths:
        is_list = isinstance(typed_params.get(path), (tuple, list, dict)) and path not in list_settings()
        if path not in typed_params or is_list:
            if path in typed_params:
                yield CornerProblem(path, None, "is a list and cannot be searched")
            else:
                error = UnknownPath(path, typed_params)
                yield CornerProblem(path, None, error.problem, error.hint)


def _find_cause(params: Params, error: ValueError, legal: list[Params]) -> CornerProblem:
    """Return the setting at fault: the one that the error names, else one whose value occurs in no valid corner."""
    if isinstance(error, UnknownPath):
        kind = params.get(LOSS_KIND)
        hint = f"it is no setting of loss.kind {kind}; give it `when: {{loss.kind: ...}}`" if kind else error.hint
        return CornerProblem(error.path, params[error.path], error.problem, hint)
    loc, sentence, hint = (
        first_error(TrialConfig, error) if isinstance(error, ValidationError) else ((), str(error), "")
    )
    named = ".".join(str(part) for part in loc)
    if named in params:
        return CornerProblem(named, params[named], sentence, hint)
    suspects = [p for p, v in params.items() if not any(p in other and values_equal(other[p], v) for other in legal)]
    path = next((p for p in suspects if p.startswith(named)), next(iter(suspects or params)))
    point = ", ".join(f"{p}={v}" for p, v in params.items())
    return CornerProblem(path, params[path], f"not a valid trial at {point}: {sentence}", hint)


def _is_as_written(value: Scalar, config: object) -> bool:
    """Pydantic would convert the text '2' to 2 and true to 1; a sweep file must have the setting's own type."""
    if isinstance(value, bool) or isinstance(config, bool):
        return value is config
    if isinstance(value, str) != isinstance(config, str):
        return value is None or config is None
    return True
