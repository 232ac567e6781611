"""Output of the commands as tables on stdout; `--json` prints the same data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dashboards.formatting import (
    format_about,
    format_half_widths,
    format_measured,
    format_settings,
    table_width,
    tie_text,
    wide_console,
)
from dashboards.terminal.advice_output import print_advice_of_plan
from orchestrator.spec.estimates.published_sizes import NOT_COUNTED

if TYPE_CHECKING:
    from orchestrator.commands.doctor import Check
    from orchestrator.spec.estimates.sweep_plan import SweepPlan

_REASON_WIDTH = 30
"""Characters. Smallest readable width of the reason column."""
_PIPED_WIDTH = 200
"""Characters per line of piped output."""


def print_plan(plan: SweepPlan) -> None:
    """Print the plan, the estimate, the probe, the corner trials, the files to be written, and notices."""
    console = wide_console(_PIPED_WIDTH, highlight=False)
    table = _key_figures(f"plan of {plan.name}")
    table.add_row("objective", plan.goal.replace(", ", "\n"))
    table.add_row("required of the best", escape("\n".join(plan.require)) or "nothing")
    table.add_row("pruner", plan.pruner)
    for path, values in plan.searched.items():
        table.add_row(path, escape(values))
    unknown = "unknown until downloaded"
    grid = f" (the grid has {plan.grid:,} distinct points)" if plan.grid is not None else ""
    if plan.sampler == "staged" and plan.trials:
        grid = " at most"
    table.add_row("trials", f"{plan.trials:,}{grid}" if plan.trials else "until the budget's hours are spent")
    if plan.finalists is not None:
        table.add_row("trials of finalists", f"{plan.finalists:,}")
    for limit, value in plan.budget.items():
        table.add_row(f"budget.{limit}", f"{value:g}")
    table.add_row("concurrent trials", str(plan.concurrency or "none on this machine"))
    whose = f" ({NOT_COUNTED})" if plan.published else ""
    for name, pairs in (("training pairs", plan.train_pairs), ("held-out pairs", plan.eval_pairs)):
        table.add_row(name, f"{pairs:,}{whose}" if pairs is not None else unknown)
    table.add_row("updates per trial", str(plan.updates_per_trial or unknown))
    table.add_row("pairs per trial", str(plan.pairs_per_trial or unknown))
    tokens = plan.tokens_per_trial_at_most
    table.add_row("tokens per trial, at most", f"{tokens:,}" if tokens is not None else unknown)
    if plan.tokens_at_most is not None:
        table.add_row("tokens of the sweep, at most", f"{plan.tokens_at_most:,}")
    if plan.parameters is not None:
        table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("disk space, at most", unknown if plan.disk is None else plan.disk)
    table.add_row("hash of the sweep file", plan.sweep_identity[:12])
    if plan.arrangement is not None and plan.arrangement.gpus_per_trial:
        table.add_row("arrangement", "\n".join(plan.arrangement.reasons))
    console.print(table)
    _print_estimate(console, plan)
    _print_probe(console, plan)
    title = f"corner trials: {len(plan.corners):,}, all checked"
    corners = Table(title=title, box=None, title_justify="left", header_style="bold", min_width=len(title))
    paths = list(plan.searched)
    for path in paths:
        corners.add_column(path)
    shown = plan.corners[:32]
    columns = [format_settings([corner.get(path) for corner in shown]) for path in paths]
    for row in zip(*columns, strict=True):
        corners.add_row(*row)
    if paths:
        console.print(corners)
    if len(plan.corners) > 32:
        console.print(f"and {len(plan.corners) - 32} more corner trials (all of them: --json)")
    writes = _key_figures(f"files and folders to be written: {len(plan.writes)}")
    for file in plan.writes:
        writes.add_row(escape(file.path), file.what)
    console.print(writes)
    print_advice_of_plan(console, plan.advice)
    for notice in plan.notices:
        console.print(f"note: {notice}", markup=False)


def _print_estimate(console: Console, plan: SweepPlan) -> None:
    """Print memory, time and cost estimated by formula, without measurement."""
    made = plan.estimate
    if made is None and plan.parameters is not None:
        return  # trials train on the CPU, of which only a measurement tells something
    if made is None:
        console.print("no estimate: the model is not on this machine yet, or there is no formula for its architecture")
        return
    table = _key_figures("estimated by formula, not measured")
    parts = {f.name: getattr(made.memory, f.name) / 1e9 for f in fields(made.memory)}
    listed = ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if size)
    table.add_row("memory per GPU", f"{made.memory.total / 1e9:,.3g} GB: {listed}")
    if made.gpu_memory is not None:
        fits = f"{made.tokens_per_micro_batch:,} tokens" if made.tokens_per_micro_batch else "less than one pair"
        table.add_row("micro-batch that fits", f"{fits}, on {made.gpu_description}")
    if made.trials_on_a_gpu is not None:
        with_copies, shared = made.trials_on_a_gpu
        row = f"{with_copies} with one model each, {shared} sharing one frozen base model (trials_per_process)"
        table.add_row("trials that fit on a GPU", row)
    if made.gpu_hours_per_trial is not None:
        table.add_row("GPU-hours per trial", f"{made.gpu_hours_per_trial:,.3g}")
    if made.gpu_hours is not None:
        table.add_row("GPU-hours of the sweep", f"{made.gpu_hours:,.3g} if no trial is pruned")
    if made.cost is not None:
        table.add_row("cost of the sweep", f"{made.cost:,.2f}")
    table.add_row("assumed", made.assumed)
    console.print(table)


def _print_probe(console: Console, plan: SweepPlan) -> None:
    """Print the measured update, each figure with its estimate."""
    probe = plan.probe
    if probe is None:
        return
    measured = probe.measured
    processes = f", {measured.processes} processes" if measured.processes > 1 else ""
    table = _key_figures(f"measured on this machine, on {measured.device}{processes}")
    seconds = "" if probe.formula_seconds is None else f"; estimate {probe.formula_seconds:.3g} s"
    table.add_row(
        "one update", f"{measured.seconds:.3g} s for {measured.pairs:,} pairs, {measured.tokens:,} tokens{seconds}"
    )
    answers = f"; {measured.answer_seconds:.3g} s for its completions" if measured.answer_seconds else ""
    scoring = (
        f"{measured.eval_pairs * measured.scoring_seconds:.3g} s for {measured.eval_pairs:,} held-out pairs{answers}"
    )
    table.add_row("one evaluation", scoring)
    estimate = "" if probe.formula_bytes is None else f"; estimate {probe.formula_bytes / 1e9:.3g} GB"
    estimate += "" if probe.gpu or not estimate else " on a GPU"
    what = (
        f"{measured.peak_bytes / 1e9:.3g} GB with {measured.tokens_per_micro_batch:,} tokens per micro-batch{estimate}"
    )
    table.add_row("memory per GPU" if probe.gpu else "additional memory", what)
    if (right := probe.corrected) is not None and probe.gpu:
        if right.gpu_memory is not None:
            fits = f"{right.tokens_per_micro_batch:,} tokens" if right.tokens_per_micro_batch else "less than one pair"
            table.add_row("micro-batch that fits", f"{fits}, on {right.gpu_description}")
        if right.gpu_hours_per_trial is not None:
            table.add_row("GPU-hours per trial", f"{right.gpu_hours_per_trial:,.3g}")
        if right.gpu_hours is not None:
            table.add_row("GPU-hours of the sweep", f"{right.gpu_hours:,.3g} if no trial is pruned")
        if right.cost is not None:
            table.add_row("cost of the sweep", f"{right.cost:,.2f}")
        table.add_row("assumed", right.assumed)
    if (time := plan.wall_clock) is not None:
        table.add_row("time of a trial, at most", format_about(time.trial_seconds))
        if time.sft_seconds is not None:
            table.add_row("time of the SFT stage", format_about(time.sft_seconds))
        if time.sweep_seconds is not None:
            several = (
                f"{time.trials_at_a_time} trials at a time" if time.trials_at_a_time > 1 else "one trial at a time"
            )
            row = f"{format_about(time.sweep_seconds)} with {several}, if none is pruned"
            table.add_row("time of the sweep, at most", row)
        table.add_row("not counted", "starting and stopping processes, checkpoints, judging")
    console.print(table)


def print_status(status: Mapping[str, Any]) -> None:
    """Print one line for the sweep and one row per trial."""
    console = wide_console(_PIPED_WIDTH, highlight=False)
    objectives: Sequence[Mapping[str, Any]] = status.get("goals") or [status["goal"]]
    console.print(f"{status['name']}: {status['state']}, {', '.join(map(_goal, objectives))}", markup=False)
    finalists, requirements = (status.get("finalists") or {}).get("text", ""), status.get("requirements", "")
    notices = (_mirror(status.get("mirror")), _tracking(status.get("tracking"), status["state"]), _tie(status))
    notices = (*notices, f"finalists: {finalists}" if finalists else "", f"{requirements}." if requirements else "")
    for text in (_why(status), *status.get("waiting", ()), *notices):
        if text:
            console.print(text, markup=False)
    trials: Sequence[Mapping[str, Any]] = status.get("configurations") or status.get("trials", ())
    if failed := status.get("never_trained"):
        from orchestrator.study.retried_trials import numbers_text  # Optuna: not for `plan`

        text = f"{len(failed)} of {len(trials)} trials failed and were never trained to the end: {numbers_text(failed)}"
        console.print(f"{text}; orchestrate resume {status['name']} --retry-failed", markup=False)
    metrics = [str(objective["metric"]) for objective in objectives if isinstance(objective, Mapping)]
    paths = list(dict.fromkeys(path for trial in trials for path in trial.get("params", {})))
    settings = {path: format_settings([trial.get("params", {}).get(path) for trial in trials]) for path in paths}
    values = {m: format_measured([trial.get("metrics", {}).get(m) for trial in trials], 6) for m in metrics}
    for metric in metrics[:1]:
        values[metric] = [v + text for v, text in zip(values[metric], _seeds_texts(trials), strict=True)]
    if not trials:
        console.print("no trial has started yet")
        return
    table = Table(box=None, header_style="bold")
    for column in ("trial", "state", "step", *paths, *metrics, "reason"):
        table.add_column(column, overflow="fold", justify="right" if column in (*paths, *metrics) else "left")
    for k, trial in enumerate(trials):
        table.add_row(
            _trial_cell(trial, status),
            _state(trial),
            f"{trial.get('step', 0)}/{trial.get('steps') or '?'}",
            *(settings[path][k] for path in paths),
            *(values[metric][k] for metric in metrics),
            escape(_remark(trial)),
        )
    if not console.is_terminal or _needed_width(table, trials) <= console.width:
        console.print(table)
        return
    for k, trial in enumerate(trials):  # on a narrow terminal one row per trial would cut values
        reached = [f"{metric}={values[metric][k]}" for metric in metrics]
        progress = f"{trial.get('step', 0)}/{trial.get('steps') or '?'}"
        head = f"trial {_trial_cell(trial, status)} {_state(trial)} {progress}"
        one_line = "  ".join((head, *reached))
        fits = len(one_line) <= console.width
        console.print(one_line if fits else head, markup=False, style="bold")
        for line in (*([] if fits else reached), _params(trial.get("params", {})), _remark(trial)):
            if line:
                console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def _remark(trial: Mapping[str, Any]) -> str:
    """Return why the trial ended early or which requirements it breaks, and where it comes from."""
    complete = trial["state"] == "COMPLETE"
    broken = f"breaks: {'; '.join(trial['breaks'])}" if complete and trial.get("breaks") else ""
    return "; ".join(text for text in (trial.get("reason"), broken, trial.get("origin")) if text)


def _state(trial: Mapping[str, Any]) -> str:
    return "DIVERGED" if trial.get("diverged") else str(trial.get("idle") or trial["state"]).upper()


def _why(status: Mapping[str, Any]) -> str:
    """Return why the sweep is in its state, without the word that the line above has, and how to continue it."""
    why, state = str(status.get("why") or ""), str(status["state"])
    resume = f"resume it with: {resume_command(status['name'], why)}" if state == "interrupted" else ""
    return "\n".join(line for line in (without_state(why, state), resume) if line)


def without_state(why: str, state: str) -> str:
    """Return a reason without the state with which it begins, such as "interrupted" after "is interrupted"."""
    return why[len(state) :].lstrip(": ") if why.startswith(state) else why


def resume_command(name: str, why: str) -> str:
    """Return the command that continues a sweep, with the limit to raise where a used-up limit ended it."""
    limit = re.search(r"--set budget\.(?:gpu_)?hours=[\d.e+-]+", why)
    return f"orchestrate resume {name}{f' {limit[0]}' if limit else ''}"


def _tie(status: Mapping[str, Any]) -> str:
    """Return the sentence about trials with the same value as the best; empty without any."""
    front = status.get("front", ())
    if len(status.get("goals", ())) > 1 or len(front) < 2:
        return ""
    return tie_text(str(front[0]), [str(number) for number in front[1:]])


def _mirror(found: Mapping[str, Any] | None) -> str:
    """Return the number of mirror failures and the last one; empty without failures."""
    if not found or not found["told"]:
        return ""
    return f"mirror {found['url']}: {found['told']} notices, last: {found['last']} (all: orchestrate history)"


def _tracking(found: Mapping[str, Any] | None, state: str) -> str:
    """Return what MLflow did not get; empty if it has everything, or is about to."""
    if not found:
        return ""
    counts = [
        (found["waiting"] if state in ("interrupted", "finished") else 0, "wait for MLflow"),
        (found["deferred"], "could not be attached in MLflow and are tried again"),
        (found["refused"], "were refused by MLflow (outbox/refused.jsonl)"),
    ]
    listed = ", ".join(f"{count} messages {what}" for count, what in counts if count)
    return ": ".join(part for part in ("tracking", listed, str(found["reason"])) if part) if listed else ""


def _trial_cell(trial: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return the trial's label, with a star for the best trial or, with several objectives, one of the Pareto front."""
    label, front = trial.get("label") or str(trial["number"]), found.get("front", ())
    is_marked = trial["number"] in (front if len(found.get("goals", ())) > 1 else front[:1])
    return f"★ {label}" if is_marked else label


def _seeds_texts(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the half widths of the means' intervals and the numbers of seeds; "" for single trials."""
    widths = format_half_widths([trial["interval"] if trial.get("complete_seeds") else None for trial in trials])
    counts = [trial.get("complete_seeds") for trial in trials]
    return [
        f"{width} ({count} seed{'s' if count > 1 else ''})" if count else ""
        for width, count in zip(widths, counts, strict=True)
    ]


def _needed_width(table: Table, trials: Sequence[Mapping[str, Any]]) -> int:
    """Return the width of the table in characters with wrapped reasons."""
    reason = max((len(_remark(trial)) for trial in trials), default=0)
    return table_width(table).maximum - max(0, reason - _REASON_WIDTH)


def print_history(found: Mapping[str, Any]) -> None:
    """Print one row per event of the sweep and per action in the service's queue, in the order of their times."""
    table = Table(box=None, header_style="bold")
    for column in ("time", "trial", "event", "details"):
        table.add_column(column, overflow="fold")
    rows = [(event["at"], event["trial"], event["kind"], _event_text(event)) for event in found["events"]]
    rows += [(action["at"], None, "queue", _action_text(action)) for action in found.get("queue", ())]
    for at, trial, kind, text in sorted(rows, key=lambda row: row[0]):
        when = datetime.fromtimestamp(at).astimezone().strftime("%F %T")
        table.add_row(when, "" if trial is None else str(trial), kind, escape(text))
    console = wide_console(_PIPED_WIDTH, highlight=False)
    console.print(table)
    if problem := found.get("queue_problem"):
        console.print(f"note: {problem}", markup=False)


def _action_text(action: Mapping[str, Any]) -> str:
    text, by = action["action"], f"by {action['person']}"
    return text if not action["person"] or by in text else f"{text} ({by})"


def _event_text(event: Mapping[str, Any]) -> str:
    """Return an event's text; of a worker's counters (all: --json) its process and how many trials it has trained."""
    counters = dict(re.findall(r"worker\.(\w+)=(\S+)", event["text"])) if event["kind"] == "worker" else {}
    if not {"pid", "trials"} <= counters.keys():
        return event["text"]
    return f"process {counters['pid']}, trials so far: {counters['trials']}"


_MAX_FRONT = 4
"""Trials of a Pareto front that `best` prints without `--metrics`."""


def print_best(found: Mapping[str, Any], *, metrics: bool = False) -> None:
    """Print the winner in about ten lines: objectives, settings, the Pareto front, model. `metrics`: all metrics too.

    Values of the initial model stand beside those of the trial.
    """
    initial: Mapping[str, Any] = found.get("initial") or {}
    front: Sequence[Mapping[str, Any]] = found.get("front") or ()
    which = f"first of {len(front)} trials of the Pareto front" if len(front) > 1 else "best"
    table = _key_figures(f"{which}: trial {found['number']}, after {found['step']} updates")
    objectives: Sequence[Mapping[str, Any]] = found.get("goals") or [found["goal"]]
    for objective, value in zip(objectives, found.get("values") or [found["value"]], strict=True):
        text = f"{_short(value)}{_initial_text(initial, objective['metric'])}, to {objective['direction']}"
        table.add_row(escape(str(objective["metric"])), escape(text))
    table.add_row("settings", escape(_params(found["params"]) or "the only configuration"))
    if finalists := found.get("finalists"):
        value = finalists["search_values"].get(str(finalists["recommended"]))
        table.add_row("value in the search", _short(value))
        table.add_row("finalists", escape(finalists["text"]))
    shown = front if metrics else front[:_MAX_FRONT]
    if found.get("interval") is not None:
        low, high = map(_short, found["interval"])
        is_confirmed = found.get("finalist_of") in [value["of"] for value in (finalists or {}).get("values", ())]
        what = _counted(finalists["pairs"]) if finalists and is_confirmed else "of this configuration by itself"
        table.add_row("95% interval of the mean", f"{low} to {high}, {what}")
    if seeds := found.get("seeds"):
        each = (f"{s['seed']} (trial {s['trial']} {s['state']} {_short(s['value'])})" for s in seeds)
        table.add_row("seeds", escape(", ".join(each)))
    columns = [format_measured(values, 6) for values in zip(*(member["values"] for member in shown), strict=True)]
    for k, member in enumerate(shown):
        texts = ", ".join(column[k] for column in columns) + "  " + _params(member["params"])
        table.add_row(escape(f"front trial {member['number']}"), escape(texts))
    if len(front) > len(shown):
        table.add_row("", f"and {len(front) - len(shown)} more trials of the front (--metrics)")
    origin = "" if "finalist_of" in found else "origin"  # the line of the finalists says it
    for name, key in (("enqueued", origin), ("clone of trial", "parent"), ("from update", "from_update")):
        if found.get(key) not in (None, ""):
            table.add_row(name, escape(str(found[key])))
    table.add_row("model", escape(found["model"] or "the weights were removed"))
    for name, key in (("exported to", "exported"), ("MLflow run", "run_id")):
        if found.get(key):
            table.add_row(name, escape(str(found[key])))
    for name, value in sorted(found["metrics"].items()) if metrics else ():
        table.add_row(escape(name), escape(f"{_short(value)}{_initial_text(initial, name)}"))
    wide_console(_PIPED_WIDTH, highlight=False).print(table)


def _counted(pairs: int) -> str:
    return f"which counts seeds and {pairs:,} held-out pairs" if pairs else "which counts seeds alone"


def _initial_text(initial: Mapping[str, Any], metric: str) -> str:
    return f" (initial model {_short(initial[metric])})" if metric in initial else ""


def print_checks(checks: Sequence[Check]) -> None:
    """Print one row per check with its level, result and fix."""
    table = Table(box=None, header_style="bold")
    for column in ("", "check", "result", "fix"):
        table.add_column(column, overflow="fold")
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        level = check.level.value
        table.add_row(f"[{colors[level]}]{level}[/]", check.what, escape(check.found), escape(check.fix))
    console = wide_console(_PIPED_WIDTH, highlight=False)
    console.print(table)
    listed = [(sum(check.level.value == level for check in checks), level) for level in colors]
    console.print(f"checks: {len(checks)} ({', '.join(f'{count} {level}' for count, level in listed if count)})")


def _params(params: Mapping[str, Any]) -> str:
    return " ".join(f"{path}={_short(value)}" for path, value in params.items())


def _goal(objective: Any) -> str:
    return f"{objective['direction']} {objective['metric']}" if isinstance(objective, Mapping) else str(objective)


def _key_figures(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _short(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
