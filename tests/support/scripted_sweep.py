"""Sweeps made by the real Study from scripted curves, with the files that trials leave: no training."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dashboards.analysis.load_frame import load_frame
from dashboards.analysis.sweep_frame import SweepFrame, TrialCurves, TrialFrame
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Event, FailureKind, Outcome, Trial, TrialState
from tests.support import specs
from tests.support.metrics import COMPLETE
from tests.support.specs import METRIC
from trainer.results import StepMetrics

BASE: dict[str, Any] = specs.BASE | {"training": {"pairs_per_update": 8, "max_steps": 40}}
GRID = {
    "loss.beta": {"choice": [2.0, 10.0]},
    "loss.gamma": {"choice": [0.3, 1.0, 1.6]},
    "training.learning_rate": {"choice": [3e-7, 1e-6]},
}
PRUNED = Outcome(TrialState.PRUNED, "pruned at update 20: in the lower half of the trials that got there")
DIVERGED = Outcome(TrialState.PRUNED, "diverged: loss is nan at step 8", diverged=True)
FAILED = Outcome(TrialState.FAILED, "RuntimeError: scripted <script>alert(1)</script>", FailureKind.BUG)


@dataclass
class Script:
    """What a trial does: final values (they begin at START's and move in a straight line), its end, its files.

    `quality` is the mean gap of log-probs per token over the held-out pairs; the accuracy follows from the pairs.
    """

    quality: float = 0.3
    chosen: float = -1.0
    last: Mapping[str, float] = field(default_factory=dict)
    outcome: Outcome | None = COMPLETE
    steps: int = 40
    every: int = 10
    samples: tuple[str, str] | None = ("a good answer", "a fine answer")
    files: bool = True
    loss: Callable[[int], float] | None = None


START_QUALITY, START_CHOSEN = 0.1, -1.0
PAIRS = 300


def held_out(quality: float, chosen: float, pairs: int = PAIRS, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns of eval_pairs.safetensors: the same noise in every trial, as the pairs are the same."""
    rng = np.random.default_rng(seed)
    chosen_tokens, rejected_tokens = rng.integers(5, 40, pairs), rng.integers(5, 40, pairs)
    noise, base = rng.normal(0, 0.5, pairs), rng.normal(0, 0.1, pairs)

    def columns(quality: float, chosen: float) -> tuple[np.ndarray, np.ndarray]:
        per_token = chosen + base
        return per_token * chosen_tokens, (per_token - quality - noise) * rejected_tokens

    after, before = columns(quality, chosen), columns(START_QUALITY, START_CHOSEN)
    return {
        "chosen": after[0],
        "rejected": after[1],
        "start_chosen": before[0],
        "start_rejected": before[1],
        "chosen_tokens": chosen_tokens.astype(np.int64),
        "rejected_tokens": rejected_tokens.astype(np.int64),
        "source": np.zeros(pairs, dtype=np.int64),
        "row": np.arange(1, pairs + 1, dtype=np.int64),
    }


def accuracy(columns: Mapping[str, np.ndarray], prefix: str = "") -> float:
    margins = columns[f"{prefix}chosen"] / columns["chosen_tokens"]
    return float(np.mean(margins > columns[f"{prefix}rejected"] / columns["rejected_tokens"]))


def make_spec(name: str = "s", search: Mapping[str, Any] | None = None, **more: Any) -> SweepSpec:
    base = BASE | more.pop("base", {})
    more = {"guard": "off"} | more  # what these scripts do, it would stop
    return specs.make_spec(GRID if search is None else search, name=name, base=base, **more)


def run_sweep(
    root: Path, spec: SweepSpec, script: Callable[[Trial], Script], *, trials: int | None = None, pairs: int = PAIRS
) -> SweepFolder:
    """Claim, observe and close every trial (or the first few) as scripted; two at a time."""
    folder = SweepFolder(root, spec.name)
    with Study.create(folder, spec) as study:
        folder.spec.write_text(dump_spec(spec), encoding="utf-8")
        held_trial: list[tuple[Trial, Script]] = []
        count = 0
        while True:
            while len(held_trial) < 2 and (trials is None or count < trials):
                trial = study.ask()
                if not isinstance(trial, Trial):
                    break
                count += 1
                held_trial.append((trial, script(trial)))
            if not held_trial:
                return folder
            trial, plan = held_trial.pop(0)
            _act(study, folder, trial, plan, pairs)


def _act(study: Study, folder: SweepFolder, trial: Trial, plan: Script, pairs: int) -> None:
    columns = held_out(plan.quality, plan.chosen, pairs)
    study.report(trial, points(plan, columns, trial.config.loss.beta if trial.config.loss.kind == "simpo" else 1.0))
    path = folder.attempt(trial.number, trial.attempt)
    if plan.files:
        path.mkdir(parents=True, exist_ok=True)
        if plan.samples is not None:
            rows = [
                {"step": step, "prompt": "<script>alert('p')</script> Say it.", "answer": text, "expected": "it"}
                | {"right": step > 0}
                for step, text in ((0, plan.samples[0]), (plan.steps, plan.samples[1]))
            ]
            (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if plan.outcome is COMPLETE:
            save_file(columns, path / "eval_pairs.safetensors")
        if plan.outcome is FAILED:
            (path / "failure.txt").write_text("Traceback\n  <script>alert('f')</script>\n", encoding="utf-8")
    if plan.outcome is not None:
        study.tell(trial, plan.outcome)
        study.add_event("worker", f"worker.pid={100 + trial.number % 2} worker.trials=1", trial.number)


def points(plan: Script, columns: Mapping[str, np.ndarray], beta: float) -> list[StepMetrics]:
    """Straight lines from the start's values to the trial's own, an evaluation every `every` updates."""
    before, after = accuracy(columns, "start_"), accuracy(columns)
    noise = float(np.mean(columns["start_chosen"] / columns["chosen_tokens"])) - START_CHOSEN
    first = {
        METRIC: before,
        "eval_margins/logp": START_QUALITY,
        "eval_rewards/margins": beta * START_QUALITY,
        "eval_logps_per_token/chosen": START_CHOSEN + noise,
        "eval_logps_per_token/rejected": START_CHOSEN - START_QUALITY,
        "eval_loss": 1.0,
        "eval_exact_answers": 0.5,
        "eval_repetition": 0.0,
        "eval_answer_length": 20.0,
    }
    last = {
        METRIC: after,
        "eval_margins/logp": plan.quality,
        "eval_rewards/margins": beta * plan.quality,
        "eval_logps_per_token/chosen": plan.chosen + noise,
        "eval_logps_per_token/rejected": plan.chosen - plan.quality,
        "eval_loss": 0.7,
        "eval_exact_answers": 0.55,
        "eval_repetition": 0.0,
        "eval_answer_length": 20.0,
        **plan.last,
    }
    ended_early = plan.outcome is not None and plan.outcome is not COMPLETE
    until = plan.steps // 2 if ended_early or plan.outcome is None else plan.steps
    out: list[StepMetrics] = []
    for step in range(until + 1):
        share = step / plan.steps
        metrics: dict[str, float] = {}
        if step:
            metrics |= {"loss": 1.0 - 0.3 * share, "grad_norm": 1.0, "tokens_per_second": 1000.0}
            metrics |= {"pairs_per_second": 10.0, "learning_rate": 1e-6}
        if step % plan.every == 0 or step == plan.steps:
            metrics |= {name: first.get(name, last[name]) * (1 - share) + last[name] * share for name in last}
            if plan.loss is not None:
                metrics["eval_loss"] = plan.loss(step)
        if metrics:
            out.append(StepMetrics(step, metrics))
    return out


def grown(frame: SweepFrame, times: int) -> SweepFrame:
    """The same sweep `times` as long: each trial again, later, with params a little apart."""
    count, lasted = len(frame.trials), max(event.at for event in frame.events) - frame.events[0].at + 1
    trials: list[TrialFrame] = []
    events: list[Event] = []
    for k in range(times):
        for trial_frame in frame.trials:
            number, old = trial_frame.number + k * count, trial_frame.record
            params = {path: value * (1 + 0.003 * k) for path, value in old.params.items()}
            value = None if old.value is None else old.value + 0.0003 * k
            record = replace(old, number=number, params=params, value=value)
            trials.append(
                replace(trial_frame, curves=TrialCurves(record, trial_frame.curves.curves), label=str(number))
            )
        for event in frame.events:
            trial = None if event.trial is None else event.trial + k * count
            events.append(replace(event, seq=len(events), at=event.at + k * lasted, trial=trial))
    return replace(frame, trials=tuple(trials), events=tuple(events))


def frame_of(folder: SweepFolder, state: str = "finished", steps: int | None = 40) -> SweepFrame:
    with Study.open(folder) as study:
        return load_frame(study, state=state, updates_of=None if steps is None else lambda _: steps)
