"""`Objective`: the metric a sweep is ranked by, and which metrics may rank it.

A ranking metric is measured on held-out data and not scaled by the search itself. `eval_rows_have_answers`: whether
held-out rows carry their right answer, as far as that can be known without reading the data.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from orchestrator.errors import closest_match
from trainer.config.base import FrozenModel, NonEmptyStr
from trainer.config.trial import DataConfig, EvaluationConfig, FileSource, GeneratedSource, HubSource, Source
from trainer.metrics import COMPARISON_METRIC, EVAL, METRICS, base_name, lookup, scaled_by


class Objective(FrozenModel):
    """What the sweep is ranked by: a held-out metric that the search does not scale (`check_metric` refuses others)."""

    metric: NonEmptyStr
    direction: Literal["maximize", "minimize"]


ALTERNATIVES = (f"{EVAL}rewards/accuracies", f"{EVAL}margins/logp", COMPARISON_METRIC)
_COMPLETION_METRICS = ("exact_answers", "repetition", "answer_length")

Problem = tuple[str, str]
"""A sentence and a hint."""


def objective_metrics() -> list[str]:
    """Every metric that may be an objective where nothing scales it."""
    return [EVAL + m.name for m in METRICS.values() if m.on_eval]


def check_metric(metric: str, direction: str, searched: Iterable[str]) -> Problem | None:
    """Why this metric cannot rank the trials of this search; None where it can."""
    known = lookup(metric)
    if not metric.startswith(EVAL):
        if known is not None and known.on_eval:
            return f"{metric} is measured on the training pairs of one update", f"use {EVAL}{metric}, the held-out one"
        return f"there is no metric {metric!r}", _closest_metric_hint(metric)
    if known is None:
        return f"there is no metric {metric!r}", _closest_metric_hint(metric)
    scaling = scaled_by(metric, searched)
    fit = [m for m in ALTERNATIVES if not scaled_by(m, scaling)]
    if "loss.kind" in scaling:
        return (
            f"{metric} is scaled by the search ({', '.join(scaling)}), so it cannot rank the trials: each kind of loss "
            "measures it in its own way",
            f"use the same ruler for all: {', '.join(reversed(fit))}",
        )
    if scaling:
        return (
            f"{metric} is scaled by the search ({', '.join(scaling)}), so it cannot rank the trials: on identical "
            "preference gaps, changing only beta and gamma moved eval loss from 0.69 to 2.75 while every pair was "
            "ordered the same",
            f"use {', '.join(fit)}",
        )
    if known.better is not None and known.better != direction:
        return f"{metric} is better when {'high' if known.better == 'maximize' else 'low'}", f"write {known.better}:"
    return None


def check_kind(metric: str, kinds: Iterable[object]) -> Problem | None:
    """Why trials of these kinds of loss would never report this metric."""
    known = lookup(metric)
    if known is None or known.kind is None or set(kinds) == {known.kind}:
        return None
    return f"{metric} is measured with loss.kind {known.kind} alone", f"use {COMPARISON_METRIC}"


_HELD_OUT = (
    *("data.eval", "data.eval_share", "data.max_eval_rows", "data.max_length", "data.max_prompt_length"),
    *("data.chat_template", "data.apply_template", "data.score", "data.bad_rows", "data.max_bad_share"),
    *("model.tokenizer", "evaluation"),
)


def check_fixed_evaluation(searched: Iterable[str]) -> list[str]:
    """Which searched settings change what is held out: trials measured on different pairs cannot be ranked."""
    return [path for path in searched if any(path == prefix or path.startswith(f"{prefix}.") for prefix in _HELD_OUT)]


def check_completion_metric(metric: str, evaluation: EvaluationConfig) -> Problem | None:
    """Why a metric of greedy answers would never be measured."""
    if base_name(metric) in _COMPLETION_METRICS and evaluation.prompts == 0:
        return f"{metric} is measured on greedy answers, and there are none", "set base.evaluation.prompts above 0"
    return None


def unmeasured_reason(metric: str) -> Problem | None:
    """Why a trial cannot be judged by this metric before its end; None where it can."""
    if base_name(metric) in _COMPLETION_METRICS:
        return (
            f"{metric} is measured at the start and the end only, too late to stop a trial",
            f"use {COMPARISON_METRIC}",
        )
    return None


def requires_answers(metric: str) -> bool:
    """Whether the rows must say the right answer."""
    return base_name(metric) == "exact_answers"


def _closest_metric_hint(metric: str) -> str:
    # A word that is nearest without the prefix counts too: `accuracies/logp` for `accuracy/logp`.
    near = closest_match(metric, objective_metrics(), 0.4) or closest_match(EVAL + metric, objective_metrics(), 0.4)
    return f"did you mean {near}?" if near else f"valid: {', '.join(objective_metrics())}"


ANSWER = "answer"


def eval_rows_have_answers(data: DataConfig) -> bool:
    """False only where a source certainly has no answers."""
    return any(_may_have_answers(source) for source in (data.eval or data.train))


def _may_have_answers(source: Source) -> bool:
    match source:
        case GeneratedSource():
            return True
        case HubSource(columns=columns):
            return ANSWER in columns or not columns
        case FileSource(path=path, columns=columns):
            first = _first_row(Path(path))
            return first is None or columns.get(ANSWER, ANSWER) in first


def _first_row(path: Path) -> set[str] | None:
    """The first row's columns; None where that takes more than a glance, or the row cannot be read here."""
    try:
        with path.open(encoding="utf-8") as file:
            match path.suffix.lower():
                case ".jsonl":
                    row = json.loads(next((line for line in file if line.strip()), "null"))
                    return set(row) if isinstance(row, dict) else None
                case ".csv":
                    return set(next(csv.reader(file), []))
                case _:
                    return None
    except (OSError, ValueError, csv.Error):
        # The data's own check says what is wrong with the file.
        return None
