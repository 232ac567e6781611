"""What a sweep would do: pure, so that it can be read before anything is spent.

What a measured update says about a plan: the formulas beside it, and the plan's figures corrected by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError
from orchestrator.folders import SweepFolder
from orchestrator.spec.estimates.cost_estimate import Estimate, Machine, estimate, update_seconds
from orchestrator.spec.estimates.disk_space import disk_need
from orchestrator.spec.estimates.gpu_memory import memory, tokens_that_fit
from orchestrator.spec.estimates.input_sizes import Rows, Shape, shape_of
from orchestrator.spec.loading.serialization import spec_hash
from orchestrator.spec.samplers import GridSampler, StagedSampler, most_trials
from orchestrator.spec.search.corners import extremes, spread
from orchestrator.spec.search.dimensions import Params
from orchestrator.spec.search.space import Grid
from orchestrator.spec.search.trial_params import place
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import TrialConfig


@dataclass(frozen=True, slots=True)
class Update:
    """One update of the dearest trial, as it ran here; `tokens_per_micro_batch`: of the largest that did."""

    device: str
    processes: int
    pairs: int
    tokens: int
    seconds: float
    peak_bytes: int
    tokens_per_micro_batch: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Measured and by formula. `corrected` is the plan's estimate with its times, and on a GPU its memory, measured."""

    measured: Update
    formula_seconds: float | None
    formula_bytes: int | None
    corrected: Estimate | None

    @property
    def gpu(self) -> bool:
        """Whether it ran on a GPU: the formula of memory is of one."""
        return self.measured.device != "CPU"


def probed(
    measured: Update, config: TrialConfig, shape: Shape | None, machine: Machine, made: Estimate | None
) -> Probe:
    """`config` is the trial that was measured, `made` the plan's estimate by formula."""
    if shape is None or made is None:
        return Probe(measured, None, None, None)
    held = memory(config, shape, max(measured.tokens_per_micro_batch, 2 * config.data.max_length), measured.processes)
    seconds = update_seconds(config, shape, machine)
    return Probe(measured, seconds, held.total, _corrected(measured, config, shape, machine, made, seconds, held.total))


def _corrected(
    measured: Update, config: TrialConfig, shape: Shape, machine: Machine, made: Estimate, seconds: float, held: int
) -> Estimate:
    slower = measured.seconds / seconds
    gpu = measured.device != "CPU"
    fits = made.tokens_per_micro_batch
    if gpu and machine.room is not None:
        fits = tokens_that_fit(
            config, shape, machine.room * held / measured.peak_bytes, machine.processes, machine.trials
        )
    return replace(
        made,
        tokens_per_micro_batch=fits,
        gpu_hours_per_trial=_times(made.gpu_hours_per_trial, slower),
        gpu_hours=_times(made.gpu_hours, slower),
        cost=_times(made.cost, slower),
        assumed=f"every update takes {measured.seconds:.3g} s, as measured on {measured.device}",
        warnings=(),
    )


def _times(hours: float | None, slower: float) -> float | None:
    return None if hours is None else hours * slower


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
    from trainer.results import TrialError
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
