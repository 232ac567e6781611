"""Replay recorded learning curves through the real samplers and pruners: `python -m benchmarks.replay --write`.

Pruners decide about the recorded trials in another order in each sweep. Samplers propose any settings; the recorded
trial nearest to them, in shares of each setting's range (of its logarithm where that is searched), stands for them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.pruning import PAGE, PRUNERS
from benchmarks.recorded import FILE, FRESH, RecordedTask, RecordedTrial, read_tasks, task_spec
from benchmarks.results import markdown_table, put_between
from benchmarks.simulation import Curve, SimulatedSweep, simulate
from benchmarks.tiny_trials import Progress
from orchestrator.spec.pruners import Pruner
from orchestrator.spec.requirements import find_violations
from orchestrator.spec.samplers import (
    CmaEsSampler,
    GpSampler,
    NsgaIISampler,
    QmcSampler,
    RandomSampler,
    Sampler,
    StagedSampler,
    TpeSampler,
)
from orchestrator.spec.search.dimensions import LogUniform, Uniform
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.metrics import COMPARISON_METRIC
from trainer.storage.atomic_files import digest_of

SLOTS, LAG = 4, 8
SAMPLED = 30
"""Trials of a sweep of the table of samplers."""
SIZES = (8, 12, 16, 20, 30, 40)
"""Trials of the sweeps of the table of sizes, with settings drawn at random."""
BEGIN, END = "<!-- tables: make replay -->", "<!-- end of the replay's tables -->"
NONE = "none"
REPLAYED: dict[str, Pruner] = {name: pruner for name, pruner in PRUNERS.items() if not name.startswith("threshold")}
"""The threshold of the scripted curves means nothing here."""
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "qmc": lambda seed: QmcSampler(seed=seed),
    "tpe": lambda seed: TpeSampler(seed=seed),
    "gp": lambda seed: GpSampler(seed=seed),
    "cmaes": lambda seed: CmaEsSampler(seed=seed),
    "nsgaii": lambda seed: NsgaIISampler(seed=seed),
    "staged": lambda _: StagedSampler(),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replayed sweep cost and chose; `winner`: the recorded trial, None where none keeps the requirements."""

    saved: float
    winner: int | None


def keeps_requirements(spec: SweepSpec, trial: RecordedTrial) -> bool:
    """Return whether a recorded trial ran to its end and keeps the sweep's requirements there."""
    last = max(trial.metrics)
    missed = find_violations(spec.require, trial.metrics[last], trial.metrics[0])
    return trial.confirmed is not None and all(value <= 0 for value in missed.values())


def final_value(trial: RecordedTrial) -> float:
    """Return the objective at the end of a trial."""
    return trial.metrics[max(trial.metrics)][COMPARISON_METRIC]


def best_of(spec: SweepSpec, task: RecordedTask) -> int | None:
    """Return the recorded trial with the highest objective of those that keep the requirements."""
    kept = [k for k, trial in enumerate(task.trials) if keeps_requirements(spec, trial)]
    return max(kept, key=lambda k: (final_value(task.trials[k]), -k), default=None)


def replay_pruner(spec: SweepSpec, task: RecordedTask, pruner: Pruner, seed: int) -> Outcome:
    """Run the recorded trials, in the order of `seed`, under a pruner."""
    order = [int(k) for k in np.random.default_rng(seed).permutation(len(task.trials))]
    run = spec.model_copy(update={"pruner": pruner, "sampler": RandomSampler(seed=seed)})
    sweep = simulate(run, lambda number, _: task.trials[order[number]].curve, slots=SLOTS, lag=LAG, trials=len(order))
    return _outcome(sweep, order)


def replay_sampler(
    spec: SweepSpec, task: RecordedTask, sampler: Sampler, pruner: Pruner, trials: int = SAMPLED
) -> Outcome:
    """Run a sweep of so many trials, each as the recorded one nearest to what the sampler proposes."""
    points = [unit_point(spec, trial.params) for trial in task.trials]
    used: list[int] = []

    def nearest(number: int, params: Mapping[str, Any]) -> Curve:
        """Return the curve of the recorded trial nearest to a proposal."""
        point = unit_point(spec, params)
        assert number == len(used)
        used.append(min(range(len(points)), key=lambda k: math.dist(point, points[k])))
        return task.trials[used[-1]].curve

    run = spec.model_copy(update={"pruner": pruner, "sampler": sampler})
    return _outcome(simulate(run, nearest, slots=SLOTS, lag=LAG, trials=trials), used)


def unit_point(spec: SweepSpec, params: Mapping[str, Any]) -> list[float]:
    """Return settings as shares of their ranges."""
    point: list[float] = []
    for path, dimension in spec.search.dimensions.items():
        # The staged sampler leaves the settings of later stages at the base's value.
        value = params.get(path, spec.base.flat_params().get(path))
        match dimension:
            case Uniform(uniform=(low, high)):
                share = (value - low) / (high - low)
            case LogUniform(log_uniform=(low, high)):
                share = math.log(value / low) / math.log(high / low)
            case _:
                raise ValueError(f"{path} is no range")
        point.append(min(1.0, max(0.0, share)))
    return point


def _outcome(sweep: SimulatedSweep, trials: Sequence[int]) -> Outcome:
    best = sweep.best()
    return Outcome(1 - sweep.trained / sweep.full_updates, None if best is None else trials[best.number])


class ReplayCache:
    """Outcomes by task, sampler, pruner and seed, kept in a file if there is one."""

    def __init__(self, tasks: Mapping[str, RecordedTask], file: Path | None, count: int) -> None:
        self._tasks, self._file = tasks, file
        self._digests = {name: digest_of([trial.as_json for trial in task.trials])[:12] for name, task in tasks.items()}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        self._specs = {name: task_spec(name) for name in tasks}
        self._found: dict[str, Outcome] = {}
        for line in file.read_text().splitlines() if file is not None and file.is_file() else ():
            key, values = json.loads(line)
            self._found[key] = Outcome(**values)
        current = sum(any(f" {digest}, " in key for digest in self._digests.values()) for key in self._found)
        self._progress = Progress(count - current)

    def run(self, name: str, sampler: str, pruner: str, seed: int, trials: int = SAMPLED) -> Outcome:
        """Return one outcome; sampler "": the recorded trials in another order, all of them."""
        task = self._tasks[name]
        size = "" if not sampler or trials == SAMPLED else f" {trials} trials"
        key = f"{name} {self._digests[name]}, {sampler or 'recorded order'}{size}, {pruner}, {seed}"
        if key not in self._found:
            spec, rule = self._specs[name], REPLAYED[pruner]
            found = (
                replay_sampler(spec, task, SAMPLERS[sampler](seed), rule, trials)
                if sampler
                else replay_pruner(spec, task, rule, seed)
            )
            self._found[key] = found
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps([key, asdict(found)]) + "\n")
            self._progress.advance(key)
        return self._found[key]

    def regrets(self, name: str, outcomes: Sequence[Outcome]) -> tuple[float, float]:
        """Return mean regrets against the best recorded trial: in the objective and in the confirmed metric.

        Where no trial keeps the requirements, the initial model is what is shipped.
        """
        task, spec = self._tasks[name], self._specs[name]
        best = best_of(spec, task)

        def values(winner: int | None) -> tuple[float, float]:
            """Return the objective and the confirmed metric of what is shipped."""
            if winner is None:
                return task.trials[0].metrics[0][COMPARISON_METRIC], task.initial
            confirmed = task.trials[winner].confirmed
            assert confirmed is not None
            return final_value(task.trials[winner]), confirmed

        top = values(best)
        found = [values(outcome.winner) for outcome in outcomes]
        return mean(top[0] - value for value, _ in found), mean(top[1] - value for _, value in found)

    def about(self, name: str) -> str:
        """Return a sentence about a task: its trials, and its best trial's values with their intervals."""
        task, spec = self._tasks[name], self._specs[name]
        kept = sum(keeps_requirements(spec, trial) for trial in task.trials)
        head = f"{name}: {len(task.trials)} trials, of which {kept} keep the requirements"
        best = best_of(spec, task)
        if best is None:
            return head
        value, confirmed = final_value(task.trials[best]), task.trials[best].confirmed or 0.0
        highest = max(trial.confirmed or 0.0 for trial in task.trials)
        rows = spec.base.data.eval[0].rows if spec.base.data.eval else 0  # type: ignore[union-attr]
        return (
            f"{head}; the best has accuracy {value:.3f} +- {half_width(value, rows):.3f} and answers {confirmed:.3f} "
            f"+- {half_width(confirmed, FRESH):.3f} of the fresh prompts right (initial model {task.initial:.3f}, "
            f"highest of all trials {highest:.3f})"
        )


def half_width(share: float, count: int) -> float:
    """Return half of the 95 % interval of a share of `count` cases."""
    return 1.96 * math.sqrt(share * (1 - share) / count)


def pruner_rows(cache: ReplayCache, names: Sequence[str], seeds: Sequence[int]) -> list[list[str]]:
    """Return rows of task and pruner: updates saved, winner kept and regrets."""
    rows = []
    for name in names:
        best = cache.run(name, "", NONE, 0).winner
        for pruner in REPLAYED:
            found = [cache.run(name, "", pruner, seed) for seed in seeds]
            value, confirmed = cache.regrets(name, found)
            saved = [outcome.saved for outcome in found]
            rows.append(
                [
                    name,
                    pruner,
                    f"{mean(saved):.0%} ({min(saved):.0%} to {max(saved):.0%})",
                    _share(outcome.winner == best for outcome in found),
                    f"{value:.4f}",
                    f"{100 * confirmed:.1f}",
                ]
            )
    return rows


def sampler_rows(cache: ReplayCache, names: Sequence[str], seeds: Sequence[int], pruner: str) -> list[list[str]]:
    """Return rows of task and sampler: regrets without a pruner and with one."""
    rows = []
    for name in names:
        for sampler in SAMPLERS:
            row = [name, sampler]
            for rule in (NONE, pruner):
                found = [cache.run(name, sampler, rule, seed) for seed in seeds]
                value, confirmed = cache.regrets(name, found)
                row += [f"{mean(outcome.saved for outcome in found):.0%}"] if rule != NONE else []
                row += [f"{value:.4f}", f"{100 * confirmed:.1f}"]
            rows.append(row)
    return rows


def size_rows(cache: ReplayCache, names: Sequence[str], seeds: Sequence[int], pruner: str) -> list[list[str]]:
    """Return rows of task and number of trials: updates saved, and by how much the regrets grow by pruning."""
    rows = []
    for name in names:
        for trials in SIZES:
            free = cache.regrets(name, [cache.run(name, "random", NONE, seed, trials) for seed in seeds])
            found = [cache.run(name, "random", pruner, seed, trials) for seed in seeds]
            pruned = cache.regrets(name, found)
            saved = [outcome.saved for outcome in found]
            rows.append(
                [
                    name,
                    str(trials),
                    f"{mean(saved):.0%} ({min(saved):.0%} to {max(saved):.0%})",
                    f"{pruned[0] - free[0]:.4f}",
                    f"{100 * (pruned[1] - free[1]):.1f}",
                ]
            )
    return rows


def _share(flags: Iterable[bool]) -> str:
    return f"{mean(flags):.0%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay all recorded tasks and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="sweeps per pruner and task")
    parser.add_argument("--sampler-seeds", type=int, default=20, help="sweeps per sampler and task")
    parser.add_argument("--with-pruner", default="median", choices=[p for p in REPLAYED if p != NONE])
    parser.add_argument("--keep", type=Path, help="file of outcomes, from which an interrupted run continues")
    parser.add_argument("--file", type=Path, default=FILE, help="recorded curves")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/search.md")
    options = parser.parse_args(arguments)
    tasks = read_tasks(options.file)
    if not tasks:
        parser.error(f"{options.file} has no curves: record them with `make curves`")
    names = list(tasks)
    each = len(REPLAYED) * options.seeds + 2 * (len(SAMPLERS) + len(SIZES)) * options.sampler_seeds
    cache = ReplayCache(tasks, options.keep, len(names) * each)
    pruners = pruner_rows(cache, names, range(options.seeds))
    samplers = sampler_rows(cache, names, range(options.sampler_seeds), options.with_pruner)
    sizes = size_rows(cache, names, range(options.sampler_seeds), options.with_pruner)
    head = ["task", "pruner", "updates saved", "same winner", "regret, accuracy", "regret, answers (points)"]
    second = ["task", "sampler", "regret, accuracy", "regret, answers (points)"]
    second += [f"{options.with_pruner}: updates saved", "regret, accuracy", "regret, answers (points)"]
    third = ["task", "trials", "updates saved", "regret by pruning, accuracy", "regret by pruning, answers (points)"]
    text = (
        f"`make replay`: {SLOTS} slots, lag {LAG}. " + ". ".join(cache.about(name) for name in names) + ".\n\n"
        f"All recorded trials in {options.seeds} random orders:\n\n{markdown_table(head, pruners)}\n\n"
        f"Sweeps of {SAMPLED} trials, {options.sampler_seeds} seeds, against the best recorded trial:\n\n"
        f"{markdown_table(second, samplers)}\n\n"
        f"Sweeps of random settings with {options.with_pruner}, {options.sampler_seeds} seeds, against the same sweeps "
        f"without a pruner:\n\n{markdown_table(third, sizes)}"
    )
    if options.write:
        put_between(PAGE, BEGIN, END, text)
    print(text)


if __name__ == "__main__":
    main()
