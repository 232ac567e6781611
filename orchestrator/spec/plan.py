"""What a sweep would do: pure, so that it can be read before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError
from orchestrator.folders import SweepFolder
from orchestrator.spec.corners import extremes, spread
from orchestrator.spec.cost import Estimate, Machine, estimate
from orchestrator.spec.dimensions import Params
from orchestrator.spec.disk import disk_need
from orchestrator.spec.dump import spec_hash
from orchestrator.spec.place import place
from orchestrator.spec.probed import Probe
from orchestrator.spec.rows import Rows
from orchestrator.spec.samplers import GridSampler, StagedSampler
from orchestrator.spec.sizes import shape_of
from orchestrator.spec.space import Grid
from orchestrator.spec.staging import most_trials
from orchestrator.spec.sweep import SweepSpec
from trainer.config import TrialConfig

MOST_POINTS = 100_000
"""A grid beyond this is not walked to count its equal points."""


@dataclass(frozen=True, slots=True)
class Span:
    """A number that may differ from trial to trial."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least:,}" if self.least == self.most else f"{self.least:,} to {self.most:,}"


@dataclass(frozen=True, slots=True)
class Written:
    """A place that the sweep writes to, and what."""

    path: str
    what: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All numbers of a sweep that are known before it starts; None where one is not."""

    name: str
    identity: str
    goal: str
    sampler: str
    searched: dict[str, str]
    trials: int | None
    grid: int | None
    equal_points: list[dict[str, Any]]
    corners: list[Params]
    concurrency: int | None
    budget: dict[str, Any]
    train_pairs: int | None
    eval_pairs: int | None
    updates_per_trial: Span | None
    pairs_per_trial: Span | None
    tokens_per_trial_at_most: int | None
    tokens_at_most: int | None
    disk_bytes: int | None
    estimate: Estimate | None
    writes: list[Written]
    notices: list[str]
    probe: Probe | None = None
    """One update measured here, where that was asked for."""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def plan(
    spec: SweepSpec,
    root: Path,
    rows: Rows,
    *,
    concurrency: int | None,
    tracking: str,
    notices: Sequence[str] = (),
    machine: Machine | None = None,
) -> Plan:
    """The plan of this sweep under the runs folder `root`. DataError where the data cannot fill one update."""
    said = list(notices)
    grid = Grid(spec.search, spec.base) if isinstance(spec.sampler, GridSampler) else None
    trials, distinct = _trials(spec, grid, said)
    corners = list(spread(extremes(spec.search)))
    configs = [spec.search.place(spec.base, params) for params in corners]
    updates = list(_updates(configs, rows.train))
    pairs = [u * c.training.pairs_per_update for u, c in zip(updates, configs, strict=False)]
    # Prompt once for each of two responses: what the plain layout computes; the packed one computes less.
    tokens = [p * 2 * c.data.max_length for p, c in zip(pairs, configs, strict=False)]
    need = disk_need(spec, min(concurrency or 1, trials or concurrency or 1))
    shape = shape_of(spec.base.model)
    by_formula = None
    if shape is not None:
        pairs_held = rows.eval if rows.train is not None else None
        by_formula = estimate(configs, updates, shape, machine or Machine(), trials, eval_pairs=pairs_held)
        said += by_formula.warnings
    return Plan(
        name=spec.name,
        identity=spec_hash(spec),
        goal=f"{spec.goal.direction} {spec.goal.metric}",
        sampler=spec.sampler.kind,
        searched=_searched(spec),
        trials=trials,
        grid=distinct,
        equal_points=[{"dropped": d, "equal_to": k} for d, k in grid.equal] if grid else [],
        corners=corners,
        concurrency=min(concurrency, trials) if concurrency and trials else concurrency,
        budget=spec.budget.model_dump(exclude_none=True),
        train_pairs=rows.train,
        eval_pairs=rows.eval,
        updates_per_trial=_span(updates),
        pairs_per_trial=_span(pairs),
        tokens_per_trial_at_most=max(tokens, default=None),
        tokens_at_most=max(tokens) * trials if tokens and trials else None,
        disk_bytes=None if need is None else need.bytes,
        estimate=by_formula,
        writes=_writes(spec, root, tracking),
        notices=said,
    )


def total_trials(spec: SweepSpec) -> int | None:
    """How many trials the whole sweep will have: budget or grid, whichever is less; None where only time ends it."""
    grid = Grid(spec.search, spec.base) if isinstance(spec.sampler, GridSampler) else None
    return _trials(spec, grid, [])[0]


def _trials(spec: SweepSpec, grid: Grid | None, said: list[str]) -> tuple[int | None, int | None]:
    """How many trials will run, and how many distinct points the grid has."""
    budget = spec.budget.trials
    if isinstance(spec.sampler, StagedSampler):
        most = most_trials(spec.sampler, spec.search) + len(spec.enqueue)
        return min(budget or most, most), None
    if grid is None:
        return budget, None
    size = spec.search.size() or 0
    if size > MOST_POINTS:
        said.append(f"the grid has {size:,} combinations; they are not compared with each other here")
        return budget or size, size
    distinct = grid.count() + _beside(grid, spec)
    if grid.equal:
        said.append(f"{len(grid.equal)} of {size} grid points equal another one and are left out")
    if budget is not None and budget > distinct:
        said.append(f"budget.trials {budget} is above the grid's {distinct} points; {distinct} trials will run")
    return min(budget or distinct, distinct), distinct


def _beside(grid: Grid, spec: SweepSpec) -> int:
    """How many of the given trials are no points of the grid."""
    points = [place(spec.base, point).identity() for point in grid] if spec.enqueue else []
    return sum(place(spec.base, given).identity() not in points for given in spec.enqueue)


def _updates(configs: Sequence[TrialConfig], pairs: int | None) -> Iterator[int]:
    from trainer.errors import TrialError
    from trainer.training.schedule import total_updates

    for config in configs:
        if pairs is not None:
            try:
                yield total_updates(config.training, pairs)
            except TrialError as error:
                raise DataError(str(error)) from None
        elif config.training.max_steps is not None:
            yield config.training.max_steps
        else:
            return


def _span(numbers: Sequence[int]) -> Span | None:
    return Span(min(numbers), max(numbers)) if numbers else None


def _searched(spec: SweepSpec) -> dict[str, str]:
    out: dict[str, str] = {}
    for path, dimension in spec.search.dimensions.items():
        body = dimension.model_dump(mode="json", exclude_none=True)
        when = body.pop("when", {})
        kind, listed = next((k, v) for k, v in body.items() if isinstance(v, list))
        text = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in listed)
        out[path] = text if kind == "choice" else f"{kind} [{text}]"
        if "step" in body and kind != "choice":
            out[path] += f" step {body['step']:g}"
        if when:
            out[path] += " when " + ", ".join(f"{p} = {v}" for p, v in when.items())
    for group in spec.search.zipped:
        for path, listed in group.items():
            out[path] = "zip " + ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in listed)
    return out


def _writes(spec: SweepSpec, root: Path, tracking: str) -> list[Written]:
    folder = SweepFolder(root, spec.name)
    models = f"final weights of the best {spec.kept}" if spec.kept > 1 else "final weights of the best one"
    out = [
        Written(str(folder.spec), "the resolved sweep"),
        Written(str(folder.database), "the study: every trial, metric and event"),
        Written(str(folder.path / "trials"), f"one folder per trial and attempt: checkpoints, samples, {models}"),
        Written(str(folder.outbox), "tracking messages until they are delivered"),
        Written(tracking, f"MLflow: the experiment {spec.tracking.experiment}, one run a sweep and one a trial"),
        Written(str(folder.cache), "tokenised data and start weights, shared by all sweeps"),
    ]
    if spec.sft is not None:
        out.append(Written(str(folder.cache), "the start model after its supervised stage"))
    if spec.tracking.artifacts is not None:
        out.append(Written(spec.tracking.artifacts, "the files of the experiment"))
    if spec.mirror is not None:
        what = f"copies: the two newest checkpoints of each running trial, endings, {models}"
        out.append(Written(f"{spec.mirror}/{spec.name}", what))
    return out
