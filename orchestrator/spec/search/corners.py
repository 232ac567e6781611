"""Checks at load that every corner of a search space is a valid trial."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from orchestrator.spec.loading.validation_errors import first_error, format_value
from orchestrator.spec.search.dimensions import Choice, GridIndex, Params, Scalar, values_equal
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import LOSS_KIND, UnknownPath, apply_params, default_loss
from trainer.config.trial import TrialConfig, flatten

MAX_CORNERS = 512
"""Corners that are tried together; of a larger search, evenly spread ones."""


class CornerProblem(ValueError):
    """A searched leaf, the value of it that is at fault (if it is one), and what is wrong."""

    def __init__(self, path: str, value: Scalar, problem: str, hint: str = "") -> None:
        self.path, self.value, self.problem, self.hint = path, value, problem, hint
        super().__init__(f"{path}: {problem}")


def find_corner_problems(space: SearchSpace, base: TrialConfig, *, is_new: bool = True) -> list[CornerProblem]:
    """What keeps corners from being trials, each said once. is_new: as of `apply_params`."""
    unknown = list(_unknown_paths(space, base))
    if unknown:
        return unknown
    corners = space.corners()
    found: dict[tuple[str, str], CornerProblem] = {}
    failures: list[tuple[Params, ValueError]] = []
    legal: list[Params] = []
    for params in sample_corners(corners):
        try:
            config = apply_params(base, params, is_new=is_new)
        except ValueError as error:
            failures.append((params, error))
            continue
        legal.append(params)
        for path, value in params.items():
            if not _is_as_written(value, config.flat_params().get(path)):
                typed = config.flat_params().get(path)
                problem = CornerProblem(
                    path, value, f"{format_value(value)} is not written as the leaf's type; write {format_value(typed)}"
                )
                found.setdefault((path, repr(value)), problem)
    for params, error in failures:
        problem = _find_cause(params, error, legal)
        found.setdefault((problem.path, repr(problem.value)), problem)
    return list(found.values())


def with_typed_values(space: SearchSpace, base: TrialConfig) -> SearchSpace:
    """The same space, each listed value as its setting holds it: 2 becomes 2.0 where the setting is a number."""
    typed: dict[tuple[str, str], Scalar] = {}
    for params in sample_corners(space.corners()):
        typed_params = apply_params(base, params).flat_params()
        typed |= {(p, repr(v)): typed_params[p] for p, v in params.items() if v is not None}

    def as_leaf(path: str, listed: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        return tuple(typed.get((path, repr(value)), value) for value in listed)

    dimensions = {
        path: dimension.model_copy(update={"choice": as_leaf(path, dimension.choice)})
        if isinstance(dimension, Choice)
        else dimension
        for path, dimension in space.dimensions.items()
    }
    zipped = tuple({path: as_leaf(path, listed) for path, listed in group.items()} for group in space.zipped)
    return SearchSpace(dimensions=dimensions, zipped=zipped)


def extreme_space(space: SearchSpace) -> GridIndex:
    """Like `SearchSpace.corners`, but of a list of numbers only the least and the most."""
    narrowed = {
        p: d.model_copy(update={"choice": extreme_values(d.choice)}) if isinstance(d, Choice) else d
        for p, d in space.dimensions.items()
    }
    return space.model_copy(update={"dimensions": narrowed}).corners()


def corner_configs(space: SearchSpace, base: TrialConfig) -> list[TrialConfig]:
    """The trials at the extremes."""
    return [space.apply(base, params) for params in sample_corners(extreme_space(space))]


def extreme_values(listed: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    """Of numbers the least and the most, of other values all."""
    numbers = [v for v in listed if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(listed):
        return listed
    return tuple(dict.fromkeys((min(numbers), max(numbers))))


def sample_corners(corners: GridIndex) -> Iterator[Params]:
    """All corners, or MAX_CORNERS of them at even distances; of many, the first and the last are among them."""
    count = len(corners)
    if count <= MAX_CORNERS:
        yield from (corners.params_at(i) for i in range(count))
        return
    yield from (corners.params_at(i * (count - 1) // (MAX_CORNERS - 1)) for i in range(MAX_CORNERS))


def _unknown_paths(space: SearchSpace, base: TrialConfig) -> Iterator[CornerProblem]:
    typed_params = dict(flatten(base.model_dump()))
    for kind in space.choices(LOSS_KIND) or ():
        try:
            typed_params |= flatten({"loss": default_loss(str(kind))})
        except ValueError:
            continue  # Not a kind of loss: the corner that has it says so.
    for path in space.paths:
        if path not in typed_params or isinstance(typed_params[path], (tuple, list, dict)):
            if path in typed_params:
                yield CornerProblem(path, None, "holds a list and cannot be searched")
            else:
                error = UnknownPath(path, typed_params)
                yield CornerProblem(path, None, error.problem, error.hint)


def _find_cause(params: Params, error: ValueError, legal: list[Params]) -> CornerProblem:
    """The drawn setting that is at fault: the one the error names, else one that no legal corner shares."""
    if isinstance(error, UnknownPath):
        kind = params.get(LOSS_KIND)
        hint = f"it is no leaf of loss.kind {kind}; give it `when: {{loss.kind: ...}}`" if kind else error.hint
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
    return CornerProblem(path, params[path], f"not a legal trial at {point}: {sentence}", hint)


def _is_as_written(value: Scalar, config: object) -> bool:
    """Pydantic would read the text '2' as 2 and true as 1; a file should say what it means."""
    if isinstance(value, bool) or isinstance(config, bool):
        return value is config
    if isinstance(value, str) != isinstance(config, str):
        return value is None or config is None
    return True
