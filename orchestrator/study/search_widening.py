"""Checks that a changed search of a begun sweep only grew: lists with more values, ranges with lower or higher ends.

What was tried stays in the search, so that samplers and pruners still learn from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.spec.samplers import StagedSampler
from orchestrator.spec.search.dimensions import (
    DIMENSION_KINDS,
    Choice,
    Dimension,
    IntUniform,
    LogUniform,
    Scalar,
    Uniform,
    end_values,
    values_equal,
)
from orchestrator.spec.sweep_spec import SweepSpec

_SLACK = 1e-9


def widening_problems(old: SweepSpec, new: SweepSpec) -> list[str]:
    """Return why the search of `new` is no widened search of `old`, a sentence for each setting; empty if it is."""
    if old.search == new.search:
        return []
    if isinstance(new.sampler, StagedSampler):
        return [
            "search: sampler staged continues from the best trial of stages that have ended, with the values they had"
        ]
    found = list(_path_problems(old, new))
    for path, dimension in old.search.dimensions.items():
        if path in new.search.dimensions and (problem := _problem(dimension, new.search.dimensions[path])):
            found.append(f"search.{path}: {problem}")
    for before, after in zip(old.search.zipped, new.search.zipped, strict=False):
        rows = list(_rows(after))
        missing = [row for row in _rows(before) if before.keys() == after.keys() and row not in rows]
        if missing:
            found.append(f"search.zip: {', '.join(map(_text, missing))} is left out, and may have been tried")
    return found


def _path_problems(old: SweepSpec, new: SweepSpec) -> Iterator[str]:
    before, after = set(old.search.paths), set(new.search.paths)
    for path in sorted(after - before):
        yield f"search.{path}: is searched in addition; the trials so far all have its value in base"
    for path in sorted(before - after):
        yield f"search.{path}: is no longer searched, and trials so far differ in it"
    groups = [[sorted(group) for group in spec.search.zipped] for spec in (old, new)]
    if before == after and groups[0] != groups[1]:
        yield "search.zip: zips other settings than before"


def _problem(old: Dimension, new: Dimension) -> str:
    """Return why `new` is not `old` with more values or a wider range; "" if it is."""
    if old.when != new.when:
        return "its condition (when) cannot change"
    match old, new:
        case Choice(choice=before), Choice(choice=after):
            missing = [v for v in before if not any(values_equal(v, w) for w in after)]
            return f"{', '.join(map(_text, missing))} is left out, and may have been tried" if missing else ""
        case (Uniform(step=a), Uniform(step=b)) | (IntUniform(step=a), IntUniform(step=b)) if a == b and _log(
            old
        ) == _log(new):
            return _narrower(old, new) or _off_lattice(old, new, a)
        case LogUniform(), LogUniform():
            return _narrower(old, new)
        case _ if type(old) is type(new):
            return "its step and its scale cannot change, only its ends"
        case _:
            return f"was {_kind(old)} and cannot become {_kind(new)}"


def _log(dimension: Dimension) -> bool:
    return isinstance(dimension, IntUniform) and dimension.log


def _narrower(old: Dimension, new: Dimension) -> str:
    (low, high), (new_low, new_high) = _ends(old), _ends(new)
    if new_low <= low and new_high >= high:
        return ""
    return f"[{new_low:g}, {new_high:g}] leaves out a part of [{low:g}, {high:g}], where trials may have been"


def _off_lattice(old: Dimension, new: Dimension, step: float | None) -> str:
    if step is None:
        return ""
    steps = (_ends(old)[0] - _ends(new)[0]) / step
    if abs(steps - round(steps)) <= _SLACK * max(1.0, abs(steps)):
        return ""
    return f"from {_ends(new)[0]:g} in steps of {step:g} the values so far are left out; move the end by whole steps"


def _ends(dimension: Dimension) -> tuple[float, float]:
    low, high = end_values(dimension)
    assert isinstance(low, (int, float))
    assert isinstance(high, (int, float))
    return low, high


def _kind(dimension: Dimension) -> str:
    kind = next(name for name, made in DIMENSION_KINDS.items() if isinstance(dimension, made))
    return "a list" if kind == "choice" else f"a range ({kind})"


def _rows(group: Mapping[str, Sequence[Scalar]]) -> Iterator[tuple[Scalar, ...]]:
    paths = sorted(group)
    return zip(*(group[path] for path in paths), strict=True)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)
