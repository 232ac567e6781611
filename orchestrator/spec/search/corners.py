"""Whether every extreme of a search is a legal trial: found at load, not at the third trial of a night."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from orchestrator.spec.loading.validation_errors import first_sentence, show
from orchestrator.spec.search.dimensions import Axes, Params, Scalar, same
from orchestrator.spec.search.space import Choice, SearchSpace
from orchestrator.spec.search.trial_params import KIND, NoSuchLeaf, of_kind, place
from trainer.config.trial import TrialConfig, flatten

MOST = 512
"""Corners that are tried together; of a larger search, evenly spread ones."""


class Problem(ValueError):
    """A searched leaf, the value of it that is at fault (if it is one), and what is wrong."""

    def __init__(self, path: str, value: Scalar, problem: str, hint: str = "") -> None:
        self.path, self.value, self.problem, self.hint = path, value, problem, hint
        super().__init__(f"{path}: {problem}")


def problems(space: SearchSpace, base: TrialConfig) -> list[Problem]:
    """What keeps corners from being trials, each said once."""
    unknown = list(_unknown(space, base))
    if unknown:
        return unknown
    corners = space.corners()
    found: dict[tuple[str, str], Problem] = {}
    failures: list[tuple[Params, ValueError]] = []
    legal: list[Params] = []
    for params in spread(corners):
        try:
            placed = place(base, params)
        except ValueError as error:
            failures.append((params, error))
            continue
        legal.append(params)
        for path, value in params.items():
            if not _as_written(value, placed.leaves().get(path)):
                wanted = placed.leaves().get(path)
                problem = Problem(path, value, f"{show(value)} is not written as the leaf's type; write {show(wanted)}")
                found.setdefault((path, repr(value)), problem)
    for params, error in failures:
        problem = _blame(params, error, legal)
        found.setdefault((problem.path, repr(problem.value)), problem)
    return list(found.values())


def as_leaves(space: SearchSpace, base: TrialConfig) -> SearchSpace:
    """The same space, each listed value as its leaf holds it: 2 becomes 2.0 where the leaf is a number."""
    typed: dict[tuple[str, str], Scalar] = {}
    for params in spread(space.corners()):
        leaves = place(base, params).leaves()
        typed |= {(p, repr(v)): leaves[p] for p, v in params.items() if v is not None}

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


def extremes(space: SearchSpace) -> Axes:
    """Like `SearchSpace.corners`, but of a list of numbers only the least and the most."""
    narrowed = {
        p: d.model_copy(update={"choice": outer(d.choice)}) if isinstance(d, Choice) else d
        for p, d in space.dimensions.items()
    }
    return space.model_copy(update={"dimensions": narrowed}).corners()


def placed(space: SearchSpace, base: TrialConfig) -> list[TrialConfig]:
    """The trials at the extremes."""
    return [space.place(base, params) for params in spread(extremes(space))]


def outer(listed: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    """Of numbers the least and the most, of other values all."""
    numbers = [v for v in listed if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(listed):
        return listed
    return tuple(dict.fromkeys((min(numbers), max(numbers))))


def spread(corners: Axes) -> Iterator[Params]:
    """All corners, or MOST of them at even distances; of many, the first and the last are among them."""
    count = len(corners)
    if count <= MOST:
        yield from (corners.point(i) for i in range(count))
        return
    yield from (corners.point(i * (count - 1) // (MOST - 1)) for i in range(MOST))


def _unknown(space: SearchSpace, base: TrialConfig) -> Iterator[Problem]:
    leaves = dict(flatten(base.model_dump()))
    for kind in space.drawable(KIND) or ():
        try:
            leaves |= flatten({"loss": of_kind(str(kind))})
        except ValueError:
            continue  # Not a kind of loss: the corner that has it says so.
    for path in space.paths:
        if path not in leaves or isinstance(leaves[path], (tuple, list, dict)):
            if path in leaves:
                yield Problem(path, None, "holds a list and cannot be searched")
            else:
                error = NoSuchLeaf(path, leaves)
                yield Problem(path, None, error.problem, error.hint)


def _blame(params: Params, error: ValueError, legal: list[Params]) -> Problem:
    """The drawn leaf that is at fault: the one the error names, else one that no legal corner shares."""
    if isinstance(error, NoSuchLeaf):
        kind = params.get(KIND)
        hint = f"it is no leaf of loss.kind {kind}; give it `when: {{loss.kind: ...}}`" if kind else error.hint
        return Problem(error.path, params[error.path], error.problem, hint)
    loc, sentence, hint = (
        first_sentence(TrialConfig, error) if isinstance(error, ValidationError) else ((), str(error), "")
    )
    named = ".".join(str(part) for part in loc)
    if named in params:
        return Problem(named, params[named], sentence, hint)
    suspects = [p for p, v in params.items() if not any(p in other and same(other[p], v) for other in legal)]
    path = next((p for p in suspects if p.startswith(named)), next(iter(suspects or params)))
    point = ", ".join(f"{p}={v}" for p, v in params.items())
    return Problem(path, params[path], f"not a legal trial at {point}: {sentence}", hint)


def _as_written(value: Scalar, placed: object) -> bool:
    """Pydantic would read the text '2' as 2 and true as 1; a file should say what it means."""
    if isinstance(value, bool) or isinstance(placed, bool):
        return value is placed
    if isinstance(value, str) != isinstance(placed, str):
        return value is None or placed is None
    return True
