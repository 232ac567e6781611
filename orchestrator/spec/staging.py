"""Which leaves the staged sampler tunes together, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import nearest
from orchestrator.spec.dimensions import Choice, Dimension, IntUniform, LogUniform, Scalar, Uniform, values
from orchestrator.spec.samplers import StagedSampler
from orchestrator.spec.space import SearchSpace

FIRST = (
    ("loss.kind", "loss.loss_type"),
    ("training.learning_rate",),
    ("loss.gamma", "loss.gamma_beta_ratio"),
    ("loss.beta",),
)
"""The learning rate matters most, then the margin, then beta (SimPO's README and issues 50 and 69): one at a time."""


def stages(sampler: StagedSampler, search: SearchSpace) -> tuple[tuple[str, ...], ...]:
    """The leaves of each stage; leaves that advance together stay together."""
    if sampler.stages is not None:
        return sampler.stages
    left = list(search.paths)
    out: list[tuple[str, ...]] = []
    for wanted in (*FIRST, *((path,) for path in search.paths)):
        stage = tuple(p for path in wanted if path in left for p in _together(search, path))
        if stage:
            out.append(stage)
            left = [path for path in left if path not in stage]
    return tuple(out)


def check_stages(sampler: StagedSampler, search: SearchSpace) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """What is wrong with the stages: where below `sampler`, a sentence, a hint."""
    if sampler.stages is None:
        return
    seen: set[str] = set()
    for k, stage in enumerate(sampler.stages):
        for i, path in enumerate(stage):
            if path not in search.paths:
                near = nearest(path, search.paths)
                yield ("stages", k, i), f"{path} is not searched", f"did you mean {near}?" if near else ""
            elif path in seen:
                yield ("stages", k, i), f"{path} is in a stage already", ""
            elif set(_together(search, path)) - set(stage):
                yield ("stages", k, i), f"{path} advances together with {', '.join(_together(search, path))}", ""
            seen.add(path)
    if missing := [path for path in search.paths if path not in seen]:
        yield ("stages",), f"every searched leaf belongs to a stage; missing: {', '.join(missing)}", ""


def listed(dimension: Dimension, points: int) -> tuple[Scalar, ...]:
    """The values of a leaf that a stage tries: its list or lattice, of a range `points` values evenly over it."""
    match dimension:
        case Choice(choice=choice):
            return choice
        case Uniform(uniform=(low, high), step=None):
            return tuple(_tidy(low + (high - low) * i / (points - 1)) for i in range(points))
        case LogUniform(log_uniform=(low, high)):
            return tuple(_tidy(low * (high / low) ** (i / (points - 1))) for i in range(points))
        case IntUniform(int_uniform=(low, high), step=1, log=log) if high - low >= points:
            spread = (
                low * (high / low) ** (i / (points - 1)) if log else low + (high - low) * i / (points - 1)
                for i in range(points)
            )
            return tuple(dict.fromkeys(round(value) for value in spread))
        case Uniform() | IntUniform():
            return tuple(values(dimension) or ())


def most_trials(sampler: StagedSampler, search: SearchSpace) -> int:
    """Trials of all stages, those counted twice that a later stage need not run again."""
    return sum(_size(stage, sampler.points, search) for stage in stages(sampler, search))


def _size(stage: tuple[str, ...], points: int, search: SearchSpace) -> int:
    size = 1
    for path in stage:
        if path in search.dimensions:
            size *= len(listed(search.dimensions[path], points))
    for group in search.zipped:
        if next(iter(group)) in stage:
            size *= len(next(iter(group.values())))
    return size


def _together(search: SearchSpace, path: str) -> tuple[str, ...]:
    return next((tuple(group) for group in search.zipped if path in group), (path,))


def _tidy(value: float) -> float:
    return float(f"{value:.6g}")
