"""`Objective`: the metric a sweep is ranked by, and which metrics may rank it.

A ranking metric is measured on held-out data and not scaled by a searched setting. `eval_rows_have_answers` tells
whether held-out rows have a correct answer, as far as the first row shows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from orchestrator.errors import closest_match
from trainer.config.base import FrozenModel, NonEmptyStr
from trainer.config.trial import (
    DataConfig,
    EvaluationConfig,
    FileSource,
    GeneratedSource,
    HubSource,
    Source,
)
from trainer.metrics import COMPARISON_METRIC, EVAL_PREFIX, KL, MARGIN, METRICS, base_name, lookup, scaled_by


class Objective(FrozenModel):
    """The metric that ranks the trials and its direction; `check_metric` tells which metrics are allowed."""

    metric: NonEmptyStr
    direction: Literal["maximize", "minimize"]


ALTERNATIVES = (f"{EVAL_PREFIX}rewards/accuracies", MARGIN, COMPARISON_METRIC)
_COMPLETION_METRICS = ("exact_answers", "repetition", "answer_length", "kl_per_token")

MessageAndHint = tuple[str, str]
"""A message and a hint."""


def objective_metrics() -> list[str]:
    """Return every metric that may be an objective as long as no searched setting scales it."""
    return [EVAL_PREFIX + m.name for m in METRICS.values() if m.on_eval]


def check_metric(metric: str, direction: str, searched: Iterable[str]) -> MessageAndHint | None:
    """Return why `metric` cannot rank trials that differ in the settings `searched`; None if it can."""
    known = lookup(metric)
    if not metric.startswith(EVAL_PREFIX):
        if known is not None and known.on_eval:
            return (
                f"{metric} is measured on the training pairs of one update",
                f"use {EVAL_PREFIX}{metric}, on held-out pairs",
            )
        return f"there is no metric {metric!r}", _closest_metric_hint(metric)
    if known is None:
        return f"there is no metric {metric!r}", _closest_metric_hint(metric)
    scaling = scaled_by(metric, searched)
    fit = [m for m in ALTERNATIVES if not scaled_by(m, scaling)]
    if "loss.kind" in scaling:
        return (
            f"{metric} is scaled by the search ({', '.join(scaling)}), so it cannot rank the trials: each kind of loss "
            "measures it in its own way",
            f"use a comparison metric that all kinds share: {', '.join(reversed(fit))}",
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


def check_kind(metric: str, kinds: Iterable[object]) -> MessageAndHint | None:
    """Return why trials with these kinds of loss never report `metric`; None if they do."""
    known = lookup(metric)
    if known is None or known.kind is None or set(kinds) == {known.kind}:
        return None
    return f"{metric} is measured with loss.kind {known.kind} only", f"use {COMPARISON_METRIC}"


_HELD_OUT = (
    *("data.eval", "data.eval_share", "data.max_eval_rows", "data.confirm_share", "data.eval_on"),
    *("data.max_length", "data.max_prompt_length"),
    *("data.chat_template", "data.apply_template", "data.score", "data.bad_rows", "data.max_bad_share"),
    *("model.tokenizer", "evaluation"),
)


def check_fixed_evaluation(searched: Iterable[str]) -> list[str]:
    """Return the searched settings that change the held-out pairs; trials that differ in one cannot be ranked."""
    return [path for path in searched if any(path == prefix or path.startswith(f"{prefix}.") for prefix in _HELD_OUT)]


def check_completion_metric(metric: str, evaluation: EvaluationConfig) -> MessageAndHint | None:
    """Return why a metric of greedy completions is never measured; None if it is, or if it is another metric."""
    if base_name(metric) in _COMPLETION_METRICS and evaluation.prompts == 0:
        return f"{metric} is measured on greedy completions, and there are none", "set base.evaluation.prompts above 0"
    return None


def unmeasured_reason(metric: str, evaluation: EvaluationConfig) -> MessageAndHint | None:
    """Return why a trial cannot be pruned by `metric`; None if it can."""
    if metric == KL:
        return f"{metric} is measured at the end only, too late to prune", f"use {COMPARISON_METRIC}"
    if base_name(metric) in _COMPLETION_METRICS and evaluation.answer_steps == 0:
        return (
            f"with evaluation.answer_steps 0, {metric} is measured at the start and the end only, too late to prune",
            f"leave out base.evaluation.answer_steps, or use {COMPARISON_METRIC}",
        )
    return None


def needs_pairs(metric: str) -> bool:
    """Return whether the metric compares the two responses of a pair, which rows with one response (KTO) have not."""
    return base_name(metric) in ("accuracies/logp", "rewards/accuracies")


def requires_answers(metric: str) -> bool:
    """Return whether the metric needs rows with a correct answer."""
    return base_name(metric) == "exact_answers"


def _closest_metric_hint(metric: str) -> str:
    # Also compared without the prefix: `accuracies/logp` for `accuracy/logp`.
    near = closest_match(metric, objective_metrics(), 0.4) or closest_match(
        EVAL_PREFIX + metric, objective_metrics(), 0.4
    )
    return f"did you mean {near}?" if near else f"valid: {', '.join(objective_metrics())}"


ANSWER = "answer"


def eval_rows_have_answers(data: DataConfig, *, if_unknown: bool = True) -> bool:
    """Return whether the held-out rows have correct answers, `if_unknown` where a source is not read here."""
    return any(_has_answers(source, if_unknown) for source in (data.eval or data.train))


def _has_answers(source: Source, if_unknown: bool) -> bool:
    match source:
        case GeneratedSource():
            return True
        case HubSource(columns=columns):
            return ANSWER in columns if columns else if_unknown
        case FileSource(path=path, columns=columns):
            first = _first_row(Path(path))
            return if_unknown if first is None else columns.get(ANSWER, ANSWER) in first


def _first_row(path: Path) -> set[str] | None:
    """Columns of the first row; None for formats that are not read by line, or if the row cannot be read."""
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
        # The data check reports what is wrong with the file.
        return None
