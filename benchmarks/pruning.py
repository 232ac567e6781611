"""Simulate what pruners save, how often they keep the best trial, and the cost of the visibility rule.

`python -m benchmarks.pruning --seeds 100` writes the tables into docs/search.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean, median

from benchmarks.curves import SEARCH, CurveSimulator, Times
from benchmarks.results import markdown_table, put_between
from benchmarks.simulation import simulate
from orchestrator.spec.objectives import Objective
from orchestrator.spec.pruners import (
    HyperbandPruner,
    MedianPruner,
    NoPruner,
    PatientPruner,
    PercentilePruner,
    Pruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)
from orchestrator.spec.samplers import RandomSampler
from orchestrator.spec.sweep_spec import SweepSpec

TRIALS, SLOTS = 200, 16
NEAR = 0.005
"""Regret up to which two trials count as equal: half a point of held-out accuracy."""
PAGE = Path(__file__).parents[1] / "docs" / "search.md"
BEGIN, END = "<!-- tables: make simulate -->", "<!-- end of tables -->"
NONE = "none"
LAGS = (1, 2, 3, 4)
PRUNERS: dict[str, Pruner] = {
    NONE: NoPruner(),
    "hyperband": HyperbandPruner(),
    "successive_halving": SuccessiveHalvingPruner(),
    "median": MedianPruner(),
    "percentile (25)": PercentilePruner(),
    "percentile (50), warm-up 0.3": PercentilePruner(percentile=50.0, n_warmup_steps=0.3),
    "wilcoxon": WilcoxonPruner(),
    "patient (3)": PatientPruner(),
    "threshold (0.58 from 0.2 on)": ThresholdPruner(lower=0.58, n_warmup_steps=0.2),
}
TIMES: tuple[Times, ...] = ("equal", "varied", "heavy-tailed")


def spec_of(pruner: Pruner, seed: int) -> SweepSpec:
    """Return a sweep of simulated trials with random sampling, so that every pruner gets the same trials."""
    base = {"model": {"generated": {}}, "data": {"train": [{"generated": "instructions"}]}, "loss": {"kind": "simpo"}}
    return SweepSpec.model_validate(
        {
            "name": "simulation",
            "base": base,
            "search": {"dimensions": SEARCH},
            "sampler": RandomSampler(seed=seed),
            "goal": Objective(metric="eval_accuracies/logp", direction="maximize"),
            "pruner": pruner,
        }
    )


@dataclass(frozen=True, slots=True)
class Result:
    """Stored figures of one simulated sweep."""

    trained: int
    best: int
    value: float
    idle: float
    makespan: float


class SimulationCache:
    """Results of sweeps, each simulated once and stored in a file, so that an interrupted run continues."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._results: dict[str, Result] = {}
        for line in file.read_text().splitlines() if file is not None and file.is_file() else ():
            key, values = json.loads(line)
            self._results[key] = Result(*values)

    def run(self, name: str, seed: int, lag: int | None, times: Times = "varied") -> Result:
        """Return the result of one simulated sweep."""
        key = f"{name} {seed} {lag} {times}"
        if key not in self._results:
            curves = CurveSimulator(seed, times)
            ran = simulate(spec_of(PRUNERS[name], seed), curves, slots=SLOTS, lag=lag, trials=TRIALS)
            best = ran.best()
            assert best is not None
            assert best.values is not None
            result = Result(ran.trained, best.number, best.values[0], ran.idle_share, ran.makespan)
            self._results[key] = result
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps([key, astuple(result)]) + "\n")
            if sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[K{len(self._results)} sweeps: {key}")
        return self._results[key]


def pruner_table(seeds: Sequence[int], cache: SimulationCache) -> list[list[str]]:
    """Return rows per pruner: the updates it saves, and how often it keeps the best trial."""
    runs = {seed: {name: cache.run(name, seed, 2 * SLOTS) for name in PRUNERS} for seed in seeds}
    rows = []
    for name in PRUNERS:
        if name == NONE:
            continue
        pairs = [(runs[seed][name], runs[seed][NONE]) for seed in seeds]
        saved = [1 - ran.trained / total.trained for ran, total in pairs]
        regrets = [total.value - ran.value for ran, total in pairs]
        rows.append(
            [
                name,
                f"{_percent(saved)} ({min(saved):.0%} to {max(saved):.0%})",
                _percent([ran.best == total.best for ran, total in pairs]),
                _percent([regret <= NEAR for regret in regrets]),
                f"{mean(regrets):.4f}",
                _percent([ran.idle for ran, _ in pairs]),
                f"{median(total.makespan / ran.makespan for ran, total in pairs):.2f} times faster",
            ]
        )
    return rows


def order_table(seeds: Sequence[int], cache: SimulationCache) -> list[list[str]]:
    """Return rows per pruner and distribution of trial times: the share of idle slot time, by lag."""
    rows = []
    for name in ("hyperband", "successive_halving", "median"):
        for times in TIMES:
            row = [name, times]
            asap = [cache.run(name, seed, None, times) for seed in seeds]
            for lags in LAGS:
                rans = [cache.run(name, seed, lags * SLOTS, times) for seed in seeds]
                longer = median(r.makespan / a.makespan for r, a in zip(rans, asap, strict=True))
                row.append(f"{_percent([r.idle for r in rans])} ({longer:.2f})")
            rows.append(row)
    return rows


def _percent(shares: Iterable[float]) -> str:
    return f"{mean(shares):.0%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate both tables and write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="sweeps per pruner")
    parser.add_argument("--order-seeds", type=int, default=10, help="sweeps per cell of the table of the order")
    parser.add_argument("--keep", type=Path, help="file of results, from which an interrupted run continues")
    options = parser.parse_args(arguments)
    cache = SimulationCache(options.keep)
    order = order_table(range(options.order_seeds), cache)
    pruners = pruner_table(range(options.seeds), cache)
    head = ["pruner", "updates saved", "same winner", f"winner within {NEAR:g}", "mean regret", "slots idle", "sweep"]
    first = markdown_table(head, pruners)
    second = markdown_table(["pruner", "trial times", *(f"lag {k} x slots" for k in LAGS)], order)
    text = (
        f"`make simulate`: {TRIALS} trials over {SLOTS} slots, {options.seeds} seeds, lag {2 * SLOTS}.\n\n{first}\n\n"
        f"Slots idle by the order (and the length of the sweep against `order: asap`), "
        f"{options.order_seeds} seeds.\n\n{second}"
    )
    put_between(PAGE, BEGIN, END, text)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
