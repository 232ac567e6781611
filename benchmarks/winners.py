"""What a sweep ships by each rule, over seeds of the quickstart's task: `python -m benchmarks.winners --write`.

For each seed, a grid is trained once: its data, its data order and its initial model have that seed. Then three rules
choose from the same trials: the highest held-out accuracy; the highest of those that keep the requirements; and
finalists. The first two are measured on all held-out rows. With finalists the search is measured on the rows that
`data.confirm_share` leaves it, and its best trials are trained again with fresh seeds and compared on the others, by
the product's own comparison. Regret is the share of fresh prompts that the best trial of the grid answers right, less
that of the model that is shipped. Results are kept by seed, and an interrupted run continues.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.results import machine, markdown_table, put_between
from benchmarks.tiny_trials import Progress, TinyTrainer, TrainedTrial
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.requirements import find_violations
from orchestrator.spec.search.dimensions import Choice
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import CONFIRM_SHARE, Finalists, SweepSpec
from orchestrator.study.confirmation import FinalistSample, compare_finalists
from orchestrator.study.finalists import FIRST_SEED, with_confirm_rows
from trainer.config.trial import TrialConfig
from trainer.metrics import COMPARISON_METRIC, EXACT_ANSWERS, KL
from trainer.results import StepMetrics, unpack_floats
from trainer.storage.atomic_files import digest_of
from trainer.storage.jsonl_store import JsonlStore

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "search.md"
BEGIN, END = "<!-- tables: make winners -->", "<!-- end of the table of winners -->"
FRESH = 2000
SEEDS = 20
FINALISTS = Finalists()
SMALLER = (
    "base.model.generated={architecture: llama, hidden_size: 96, num_hidden_layers: 3}",
    "base.training.pairs_per_update=16",
    "base.evaluation.answer_steps=0",
    "base.evaluation.samples=0",
    "search={loss.beta: [2.0, 10.0], loss.sft_weight: [0.0, 1.0, 3.0], training.learning_rate: [3e-4, 1e-3]}",
)
"""The quickstart in a smaller size: half the pairs per update, a smaller model, and answers at the end only."""
ACCURACY, REQUIRED, CONFIRMED = RULES = ("accuracy alone", "with requirements", "with finalists")


def spec_of(seed: int, overrides: Sequence[str]) -> SweepSpec:
    """Return the sweep of one seed."""
    rows = [
        f"base.data.train.0.seed={seed}",
        f"base.data.eval.0.seed={seed}",
        f"base.model.generated.seed={seed}",
        f"base.training.seed={100 * seed}",
        f"sft.training.seed={100 * seed}",
    ]
    return load_spec(ROOT / "sweeps" / "quickstart.yaml", [*SMALLER, *overrides, *rows])


def grid_of(spec: SweepSpec) -> list[dict[str, Any]]:
    """Return the settings of every trial of the grid."""
    choices = {path: d.choice for path, d in spec.search.dimensions.items() if isinstance(d, Choice)}
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's held-out metrics on all rows and on those of the search, and its share of fresh prompts right."""

    rows: Mapping[str, float]
    search_rows: Mapping[str, float]
    fresh: float
    seconds: float = 0.0

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Measured:
        """Return what a store has."""
        return cls(stored["rows"], stored["search_rows"], stored["fresh"], stored["seconds"])


class SeedRun:
    """The trials of one seed, each trained once and stored."""

    def __init__(
        self, seed: int, spec: SweepSpec, fresh: int, store: JsonlStore, scratch: Path, progress: Progress
    ) -> None:
        from orchestrator.driver.sft_stage import with_model

        self.seed, self.spec, self._fresh, self._store, self._progress = seed, spec, fresh, store, progress
        self._trainer = TinyTrainer(scratch)
        self._initial = self._trainer.initial_model(spec)
        self._base = with_model(spec.base, self._initial)

    def initial(self) -> Measured:
        """Return the initial model's measurements."""
        return self._measured("initial", None)

    def trial(self, number: int, params: Mapping[str, Any]) -> Measured:
        """Return a trial of the grid."""
        return self._measured(f"trial {number}", apply_params(self._base, params))

    def finalist(self, number: int, params: Mapping[str, Any], place: int) -> dict[str, Any]:
        """Return a finalist: its `metrics` and `pairs` (margins) on the rows kept for finalists. Its weights stay."""
        key = f"{self.seed} finalist {number} seed {place}"
        if key not in self._store.values:
            trained = self._train_finalist(key, params, place)
            last = _last(trained)
            found = {
                "metrics": dict(last.metrics),
                "pairs": last.pair_margins,
                "initial": dict(trained.history[0].metrics),
                "model": None if trained.model is None else str(trained.model),
                "finished": trained.model is not None,
            }
            self._put(key, found)
        return self._store.values[key]

    def confirmed(self, number: int, params: Mapping[str, Any], place: int) -> float:
        """Return the share of fresh prompts that a finalist answers right."""
        key = f"{self.seed} finalist {number} seed {place}"
        confirmed = f"{key} on fresh prompts"
        if confirmed not in self._store.values:
            model = Path(self._store.values[key]["model"])
            if not model.exists():  # removed by a run that chose another one
                model = self._train_finalist(key, params, place).model
                assert model is not None
            self._put(confirmed, {"fresh": self._trainer.confirm(self._base, model, self._fresh)})
        return self._store.values[confirmed]["fresh"]

    def _train_finalist(self, key: str, params: Mapping[str, Any], place: int) -> TrainedTrial:
        seed = self.spec.base.training.seed + FIRST_SEED + place
        config = with_confirm_rows(self._halves(apply_params(self._base, params)))
        config = config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})
        return self._trainer.train(config, key)

    def remove_models(self) -> None:
        """Remove the weights of all finalists."""
        self._trainer.forget_all()

    def _halves(self, config: TrialConfig) -> TrialConfig:
        data = config.data.model_copy(update={"confirm_share": CONFIRM_SHARE})
        return config.model_copy(update={"data": data})

    def _measured(self, name: str, config: TrialConfig | None) -> Measured:
        """Measure the initial model, or train a trial and measure it; {} where it diverged."""
        key = f"{self.seed} {name}"
        if key not in self._store.values:
            began, rows, model = time.process_time(), {}, self._initial
            if config is not None:
                trained = self._trainer.train(config, "trial")
                if trained.model is None:
                    self._put(key, {"rows": {}, "search_rows": {}, "fresh": 0.0, "seconds": 0.0})
                    return Measured.read(self._store.values[key])
                rows, model = dict(_last(trained).metrics), trained.model
            else:
                rows = dict(self._trainer.measure(self._base, model).metrics)
            search_rows = dict(self._trainer.measure(self._halves(self._base), model).metrics)
            fresh = self._trainer.confirm(self._base, model, self._fresh)
            self._put(
                key,
                {
                    "rows": rows,
                    "search_rows": search_rows,
                    "fresh": fresh,
                    "seconds": round(time.process_time() - began, 1),
                },
            )
            self._trainer.forget("trial")
        return Measured.read(self._store.values[key])

    def _put(self, key: str, found: Mapping[str, Any]) -> None:
        self._store.put({key: found})
        self._progress.advance(f"seed {key}")


def _last(trained: TrainedTrial) -> StepMetrics:
    evaluated = [point for point in trained.history if COMPARISON_METRIC in point.metrics]
    return evaluated[-1]


@dataclass(frozen=True, slots=True)
class SeedResult:
    """Shares of fresh prompts answered right: the initial model's, the best of the grid, and what each rule ships."""

    initial: float
    best: float
    shipped: Mapping[str, float]
    finalists: int


def run_seed(run: SeedRun) -> SeedResult:
    """Train a seed's grid and finalists, and apply the rules."""
    spec, start = run.spec, run.initial()
    grid = grid_of(spec)
    trials = [run.trial(number, params) for number, params in enumerate(grid)]
    done = [number for number, trial in enumerate(trials) if trial.rows]

    def ranked(rows: str, *, required: bool) -> list[int]:
        metrics = {number: getattr(trials[number], rows) for number in done}
        kept = [n for n in done if not required or keeps(spec, metrics[n], getattr(start, rows))]
        return sorted(kept, key=lambda n: (-metrics[n][COMPARISON_METRIC], n))

    alone, required = ranked("rows", required=False), ranked("rows", required=True)
    # Where no trial keeps the requirements, the initial model is what is left.
    shipped = {
        ACCURACY: trials[alone[0]].fresh if alone else start.fresh,
        REQUIRED: trials[required[0]].fresh if required else start.fresh,
    }
    finalists = ranked("search_rows", required=True)[: FINALISTS.top]
    shipped[CONFIRMED] = confirm(run, finalists, grid, trials, start)
    run.remove_models()
    best = max([start.fresh, *(trials[number].fresh for number in done)])
    return SeedResult(start.fresh, best, shipped, len(finalists))


def keeps(spec: SweepSpec, metrics: Mapping[str, float], initial: Mapping[str, float]) -> bool:
    """Return whether metrics keep every requirement of the sweep."""
    return all(missed <= 0 for missed in find_violations(spec.require, metrics, initial).values())


def confirm(
    run: SeedRun, numbers: Sequence[int], grid: Sequence[Mapping[str, Any]], trials: Sequence[Measured], start: Measured
) -> float:
    """Return the share of fresh prompts right of the model that finalists ship, as the finalists' stage chooses it.

    The recommended configuration's best seed that keeps the requirements; where all finalists break one, the best
    trial of the search that is no finalist would stand, so that the next of its ranking is shipped.
    """
    samples: list[FinalistSample] = []
    seeds = {
        number: [run.finalist(number, grid[number], place) for place in range(FINALISTS.seeds)] for number in numbers
    }
    for number, found in seeds.items():
        if not all(each["finished"] for each in found):
            continue
        names = found[0]["metrics"]
        means = {name: mean(each["metrics"][name] for each in found) for name in names}
        if not keeps(run.spec, means, found[0]["initial"]):
            continue
        values = _right_pairs(found)
        updates = run.spec.base.training.max_steps or 0
        cost = updates * run.spec.base.training.pairs_per_update
        samples.append(FinalistSample(number, values, cost, means.get(KL)))
    if not samples:
        metrics = {n: t.search_rows for n, t in enumerate(trials) if t.rows and n not in numbers}
        left = [n for n, found in metrics.items() if keeps(run.spec, found, start.search_rows)]
        best = max(left, key=lambda n: metrics[n][COMPARISON_METRIC], default=None)
        return start.fresh if best is None else trials[best].fresh
    recommended = compare_finalists(samples, [sample.of for sample in samples], 1.0).recommended
    found = seeds[recommended]
    keeping = [p for p, each in enumerate(found) if keeps(run.spec, each["metrics"], each["initial"])]
    best = max(keeping or range(len(found)), key=lambda place: found[place]["metrics"][COMPARISON_METRIC])
    return run.confirmed(recommended, grid[recommended], best)


def _right_pairs(found: Sequence[Mapping[str, Any]]) -> Any:
    """Return whether each seed ranks each held-out pair right, [S, N]."""
    import numpy as np

    return np.array([[float(margin > 0) for margin in unpack_floats(each["pairs"])] for each in found])


def table(results: Mapping[int, SeedResult]) -> str:
    """Return the table of regrets, in points of fresh prompts answered right."""
    found = list(results.values())
    rows = []
    for rule in RULES:
        regrets = [100 * (result.best - result.shipped[rule]) for result in found]
        gains = [100 * (result.shipped[rule] - result.initial) for result in found]
        error = stdev(regrets) / len(regrets) ** 0.5 if len(regrets) > 1 else 0.0
        worse = sum(gain < 0 for gain in gains)
        rows.append(
            [
                rule,
                f"{mean(regrets):.1f} +- {error:.1f}",
                f"{max(regrets):.1f}",
                f"{mean(gains):+.1f}",
                f"{worse} of {len(found)}",
            ]
        )
    head = ["rule", "regret, points", "largest", "change against the initial model", "worse than the initial model"]
    return markdown_table(head, rows)


def seeds_table(results: Mapping[int, SeedResult]) -> str:
    """Return the table of shares of fresh prompts answered right, a row for each seed."""
    rows = [
        [str(seed), *(f"{value:.3f}" for value in (r.initial, r.best, *(r.shipped[rule] for rule in RULES)))]
        for seed, r in results.items()
    ]
    return markdown_table(["seed", "initial model", "best of the grid", *RULES], rows)


def main() -> None:
    """Run the seeds, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first-seed", type=int, default=0, help="several processes share the seeds, each its scratch")
    parser.add_argument("--fresh", type=int, default=FRESH, help="fresh prompts")
    parser.add_argument("--scratch", type=Path, default=Path("runs/winners"), help="models, data and results by seed")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as of orchestrate sweep")
    parser.add_argument("--write", action="store_true", help="put the table into docs/search.md")
    options = parser.parse_args()
    results: dict[int, SeedResult] = {}
    trials = len(grid_of(spec_of(0, options.set)))
    settings = digest_of([SMALLER, options.set, options.fresh, FINALISTS.model_dump()])[:12]
    with JsonlStore(options.scratch / f"results-{settings}.jsonl") as store:
        progress = Progress(options.seeds * (2 + trials + FINALISTS.trials) - len(store.values))
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            # A session a seed: data and models of earlier seeds do not stay loaded.
            run = SeedRun(seed, spec_of(seed, options.set), options.fresh, store, options.scratch, progress)
            results[seed] = run_seed(run)
    initial, best = mean(r.initial for r in results.values()), mean(r.best for r in results.values())
    text = (
        f"`make winners`: {options.seeds} seeds, grids of {trials} trials, {FINALISTS.top} finalists of "
        f"{FINALISTS.seeds} seeds, exact answers on {options.fresh:,} fresh prompts ({EXACT_ANSWERS}); on average the "
        f"initial model answers {initial:.3f} right and the best of the grid {best:.3f}. Means with their standard "
        f"errors; {machine()}.\n\n{table(results)}\n\nEach seed, as the share of prompts answered right:\n\n"
        f"{seeds_table(results)}"
    )
    if options.write:
        put_between(PAGE, BEGIN, END, text)
    print(text)


if __name__ == "__main__":
    main()
