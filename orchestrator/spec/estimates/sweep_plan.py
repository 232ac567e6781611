"""`SweepPlan`: trials, updates, memory, time and disk space of a sweep, computed from its spec without running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import DataError
from orchestrator.folders import SweepFolder
from orchestrator.spec.estimates.cost_estimate import CostEstimate, GpuAssumptions, estimate_cost
from orchestrator.spec.estimates.disk_space import DiskNeed, disk_need
from orchestrator.spec.estimates.gpu_layouts import Arrangement
from orchestrator.spec.estimates.input_sizes import RowCounts, model_shape
from orchestrator.spec.estimates.measured_update import ProbeResult, WallClock
from orchestrator.spec.estimates.plan_notices import (
    kept_models_notices,
    late_pruning_notices,
    moving_reference_notices,
)
from orchestrator.spec.loading.serialization import sweep_identity
from orchestrator.spec.samplers import GridSampler, StagedSampler, max_trials, stage_paths
from orchestrator.spec.search.corners import valid_corners
from orchestrator.spec.search.dimensions import Params, values_equal
from orchestrator.spec.search.manual_trials import short_value
from orchestrator.spec.search.space import Grid
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import TrialConfig

if TYPE_CHECKING:
    from orchestrator.spec.advice.advice_lines import AdviceLine

JSON_NAMES = {"gpu_description": "place", "optimizer": "optimiser"}
"""Field -> its name in JSON, where the two differ."""
MAX_GRID_POINTS = 100_000
"""A larger grid is not enumerated to count its equal points."""


@dataclass(frozen=True, slots=True)
class IntRange:
    """Smallest and largest value of a number that differs between trials."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least:,}" if self.least == self.most else f"{self.least:,} to {self.most:,}"


_LISTED_POINTS = 1_000
_SHOWN_VALUES = 8


@dataclass(frozen=True, slots=True)
class GridPart:
    """The part of a grid that the budget lets a sweep try.

    `seed`: of the shuffled order, None for the file's; `tried`: the points in their order, at most 1,000; `values`: how
    many of the points have each value of each setting.
    """

    seed: int | None
    trials: int
    points: int
    tried: list[Params]
    values: dict[str, list[tuple[Any, int]]]

    def __str__(self) -> str:
        order = (
            f"shuffled with sampler.seed {self.seed}" if self.seed is not None else "the first ones in the file's order"
        )
        counts = "; ".join(f"{path} {self._counts(listed)}" for path, listed in self.values.items())
        return f"budget.trials has {self.trials:,} of the grid's {self.points:,} points, {order}: {counts}"

    def _counts(self, listed: list[tuple[Any, int]]) -> str:
        if len(listed) > _SHOWN_VALUES:
            return f"{sum(count > 0 for _, count in listed)} of {len(listed)} values"
        return ", ".join(
            f"{value if isinstance(value, str) else short_value(value)} ({f'{count}x' if count else 'never'})"
            for value, count in listed
        )


@dataclass(frozen=True, slots=True)
class WrittenPath:
    """A path or URL that the sweep writes to, and what it writes."""

    path: str
    what: str


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The figures of a sweep that are known before it starts; None for those that are not."""

    name: str
    sweep_identity: str
    goal: str
    sampler: str
    pruner: str
    searched: dict[str, str]
    trials: int | None
    grid: int | None
    equal_points: list[dict[str, Any]]
    grid_part: GridPart | None
    corners: list[Params]
    concurrency: int | None
    budget: dict[str, Any]
    train_pairs: int | None
    eval_pairs: int | None
    updates_per_trial: IntRange | None
    pairs_per_trial: IntRange | None
    tokens_per_trial_at_most: int | None
    tokens_at_most: int | None
    disk_bytes: int | None
    arrangement: Arrangement | None
    """What was chosen for the settings left to `auto`."""
    estimate: CostEstimate | None
    writes: list[WrittenPath]
    notices: list[str]
    published: tuple[str, ...] = ()
    """Data sets whose rows are published numbers and were not counted here, each with its source."""
    parameters: int | None = None
    disk: str | None = None
    """`disk_bytes` with its parts, in words."""
    device: str | None = None
    """What trials train on here: CPU or GPU; None where no trial fits this machine."""
    probe: ProbeResult | None = None
    """One measured update, with `plan --probe`."""
    wall_clock: WallClock | None = None
    """Time on this machine, with `plan --probe`."""
    require: tuple[str, ...] = ()
    """What the best trial must keep: metric and bound."""
    advice: tuple[AdviceLine, ...] = ()
    """Advice that needs no model run: on settings, and on pairs that `advise` has scored before."""
    finalists: int | None = None
    """Trainings of the finalists, on top of `trials` and counted in tokens, time and cost; None in a sweep without."""
    trainings: int | None = None
    """Trials of the search and of the finalists; None if only time limits the search."""

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values; `sweep_identity` has the key `identity`."""
        written = {
            "identity" if name == "sweep_identity" else name: value
            for name, value in asdict(
                self, dict_factory=lambda items: {JSON_NAMES.get(name, name): value for name, value in items}
            ).items()
        }
        if self.finalists is None:
            del written["finalists"], written["trainings"]
        return written


def make_plan(
    spec: SweepSpec,
    root: Path,
    rows: RowCounts,
    *,
    concurrency: int | None,
    tracking: str,
    notices: Sequence[str] = (),
    assumptions: GpuAssumptions | None = None,
    chosen: SweepSpec | None = None,
    arrangement: Arrangement | None = None,
    device: str | None = None,
    about_gpus: bool = True,
) -> SweepPlan:
    """Return the plan of a sweep under the runs folder `root`.

    Args:
        spec: The sweep.
        root: The runs folder.
        rows: Rows of its data.
        concurrency: Trials at a time; None if unknown.
        tracking: MLflow's tracking URI.
        notices: Notices to include, such as the loader's.
        assumptions: Assumptions about GPUs and data.
        chosen: The sweep with the arrangement's values in place of `auto`; None where no arrangement fits.
        arrangement: The arrangement; None if nothing is `auto`, or where none fits.
        device: What trials train on here.
        about_gpus: Whether to estimate memory, time and cost on GPUs.

    Raises:
        DataError: The data has fewer pairs than one update.
    """
    notices_out = [*notices, *kept_models_notices(spec)]
    grid = _grid(spec)
    trials, distinct = _trials(spec, grid, notices_out)
    finalists = None if spec.finalists is None else spec.finalists.trials
    trainings = None if trials is None else trials + (finalists or 0)
    notices_out += [] if spec.finalists is None else [spec.finalists.plan_text(spec.base.data.confirm_share or 0.0)]
    part = None if grid is None or trials is None or distinct is None else _grid_part(spec, grid, trials, distinct)
    if part is not None:
        notices_out.append(str(part))
    if grid is not None and grid.invalid:
        text = ", ".join(f"{path}={value}" for path, value in grid.invalid[0][0].items())
        notices_out.append(
            f"{len(grid.invalid)} of the grid's points are no valid trial and are left out, first {text}"
        )
    valid = valid_corners(spec.search, (chosen or spec).base)
    corners, configs = [params for params, _ in valid], [config for _, config in valid]
    updates = list(_updates(configs, rows.train))
    notices_out += moving_reference_notices(configs, updates, model_shape(spec.base.model))
    notices_out += late_pruning_notices(spec, updates)
    pairs = [u * c.training.pairs_per_update for u, c in zip(updates, configs, strict=False)]
    # Both responses at full length with their own prompt; packing computes a shared prompt once, so it needs less.
    tokens = [p * 2 * c.data.max_length for p, c in zip(pairs, configs, strict=False)]
    need = _disk_need(spec, concurrency, trials)
    shape = model_shape(spec.base.model)
    by_formula = None
    if shape is not None and about_gpus:
        eval_pairs = rows.eval if rows.train is not None else None
        by_formula = estimate_cost(
            configs, updates, shape, assumptions or GpuAssumptions(), trainings, eval_pairs=eval_pairs
        )
        notices_out += by_formula.warnings if chosen is not None or not spec.auto else ()
    return SweepPlan(
        name=spec.name,
        sweep_identity=sweep_identity(spec),
        goal=", ".join(f"{objective.direction} {objective.metric}" for objective in spec.objectives),
        sampler=spec.sampler.kind,
        pruner=spec.pruner.kind,
        searched=_searched(spec),
        trials=trials,
        grid=distinct,
        equal_points=[{"dropped": d, "equal_to": k} for d, k in grid.equal] if grid else [],
        grid_part=part,
        corners=corners,
        concurrency=min(concurrency, trials) if concurrency and trials else concurrency,
        budget=spec.budget.model_dump(exclude_none=True),
        train_pairs=rows.train,
        eval_pairs=rows.eval,
        updates_per_trial=_int_range(updates),
        pairs_per_trial=_int_range(pairs),
        tokens_per_trial_at_most=max(tokens, default=None),
        tokens_at_most=max(tokens) * trainings if tokens and trainings else None,
        disk_bytes=None if need is None else need.bytes,
        arrangement=arrangement,
        disk=None if need is None else str(need),
        estimate=by_formula,
        writes=_writes(spec, root, tracking),
        notices=notices_out,
        published=rows.published,
        parameters=None if shape is None else shape.parameters,
        device=device,
        require=tuple(requirement.name for requirement in spec.require),
        finalists=finalists,
        trainings=trainings,
    )


def total_trials(spec: SweepSpec) -> int | None:
    """Return the number of trials of the sweep, the lower of budget and grid; None if only time limits it."""
    return _trials(spec, _grid(spec), [])[0]


def planned_trials(spec: SweepSpec) -> int | None:
    """Return the number of trials with those of the finalists; None if only time limits the search."""
    trials = total_trials(spec)
    return trials if trials is None or spec.finalists is None else trials + spec.finalists.trials


def sweep_disk_need(spec: SweepSpec, slots: int | None) -> DiskNeed | None:
    """Return the sweep's disk space with up to `slots` trials at a time, one if None; None if the initial model's size
    is unknown.
    """
    return _disk_need(spec, slots, total_trials(spec))


def _disk_need(spec: SweepSpec, slots: int | None, trials: int | None) -> DiskNeed | None:
    return disk_need(spec, min(slots or 1, trials or slots or 1))


def _grid(spec: SweepSpec) -> Grid | None:
    if not isinstance(spec.sampler, GridSampler):
        return None
    return Grid(spec.search, spec.base, spec.sampler.shuffle_seed)


def _grid_part(spec: SweepSpec, grid: Grid, trials: int, distinct: int) -> GridPart | None:
    """Return the points that the budget lets the sweep try; None if it is walked to its end."""
    assert isinstance(spec.sampler, GridSampler)
    outside = _count_outside_grid(grid, spec) if distinct <= MAX_GRID_POINTS else 0
    points, distinct = trials // spec.repeats - outside, distinct - outside
    if points >= distinct or points < 1:
        return None
    tried = [point for index in range(points) if (point := grid.params_at(index)) is not None]
    values: dict[str, list[tuple[Any, int]]] = {}
    for path in spec.search.paths:
        found = sorted({point[path] for point in tried if path in point}, key=str)
        listed = list(dict.fromkeys(spec.search.choices(path) or found))
        values[path] = [(value, sum(path in p and values_equal(p[path], value) for p in tried)) for value in listed]
    return GridPart(spec.sampler.shuffle_seed, points, distinct, tried[:_LISTED_POINTS], values)


def _trials(spec: SweepSpec, grid: Grid | None, notices_out: list[str]) -> tuple[int | None, int | None]:
    """Return the number of trials (trainings), and the number of distinct grid points."""
    trials, distinct = _limited_trials(spec, grid, notices_out)
    if trials is not None and trials % spec.repeats:
        notices_out.append(
            f"{trials} trials are no multiple of repeats {spec.repeats}: the last configuration gets fewer seeds"
        )
    return trials, distinct


def _limited_trials(spec: SweepSpec, grid: Grid | None, notices_out: list[str]) -> tuple[int | None, int | None]:
    budget, repeats = spec.budget.trials, spec.repeats
    if repeats > 1:
        notices_out.append(
            f"each configuration is trained with {repeats} seeds (training.seed {spec.base.training.seed} to "
            f"{spec.base.training.seed + repeats - 1}); budget.trials counts each training"
        )
    if isinstance(spec.sampler, StagedSampler):
        most = (max_trials(spec.sampler, spec.search) + len(spec.enqueue)) * repeats
        if len(stage_paths(spec.sampler, spec.search)) > 1:
            notices_out.append(
                f"{min(budget or most, most)} trials at most: a stage does not repeat a point that an earlier one tried"
            )
        return min(budget or most, most), None
    size = spec.search.size()
    if size is None:
        return budget, None
    if grid is None and size > MAX_GRID_POINTS:
        return budget or size * repeats, None
    if size > MAX_GRID_POINTS:
        notices_out.append(f"the grid has {size:,} combinations, too many to count equal ones")
        return budget or size * repeats, size
    points = grid or Grid(spec.search, spec.base)
    distinct = points.count() + _count_outside_grid(points, spec)
    if points.equal and grid is not None:
        notices_out.append(f"{len(points.equal)} of {size} grid points equal another one and are left out")
    most = distinct * repeats
    if budget is not None and budget > most:
        whose = "grid" if grid is not None else "search space"
        times = f" with {repeats} seeds each" if repeats > 1 else ""
        notices_out.append(
            f"budget.trials {budget} is above the {whose}'s {distinct} points{times}; {most} trials will run"
        )
    return min(budget or most, most), None if grid is None else distinct


def _count_outside_grid(grid: Grid, spec: SweepSpec) -> int:
    """Return the number of enqueued trials that are not points of the grid."""
    points = [apply_params(spec.base, point).canonical_params() for point in grid] if spec.enqueue else []
    return sum(apply_params(spec.base, given).canonical_params() not in points for given in spec.enqueue)


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


def _int_range(numbers: Sequence[int]) -> IntRange | None:
    return IntRange(min(numbers), max(numbers)) if numbers else None


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


def _writes(spec: SweepSpec, root: Path, tracking: str) -> list[WrittenPath]:
    folder = SweepFolder(root, spec.name)
    models = (
        f"final weights of the best {spec.models_kept}" if spec.models_kept > 1 else "final weights of the best one"
    )
    out = [
        WrittenPath(str(folder.spec), "the resolved sweep"),
        WrittenPath(str(folder.database), "the study: every trial, metric and event"),
        WrittenPath(str(folder.path / "trials"), f"one folder per trial and attempt: checkpoints, samples, {models}"),
        WrittenPath(str(folder.outbox), "tracking messages until they are delivered"),
        WrittenPath(tracking, f"MLflow: the experiment {spec.tracking.experiment}, one run a sweep and one a trial"),
        WrittenPath(
            str(folder.cache),
            "tokenized data and initial weights"
            + (", the initial model after the SFT stage" if spec.sft is not None else "")
            + ", shared by all sweeps",
        ),
    ]
    if spec.tracking.artifacts is not None:
        out.append(WrittenPath(spec.tracking.artifacts, "the files of the experiment"))
    if spec.mirror is not None:
        what = f"copies: the two newest checkpoints of each running trial, results, {models}"
        out.append(WrittenPath(f"{spec.mirror}/{spec.name}", what))
    return out
