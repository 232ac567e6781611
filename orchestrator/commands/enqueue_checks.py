"""Checks of a trial that a user enqueues: what `plan` checks of a file, and whether a trial has its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.execution.slots import gpu_memory, machine_gpus
from orchestrator.spec.estimates.arrangement import arranged
from orchestrator.spec.estimates.cost_estimate import GpuAssumptions, check_share, gpu_share
from orchestrator.spec.estimates.input_sizes import count_rows
from orchestrator.spec.estimates.sweep_plan import make_plan
from orchestrator.spec.loading.loader import load_document
from orchestrator.spec.loading.position_checks import check_lengths
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.loading.validation_errors import ErrorCollector, parse_document
from orchestrator.spec.loading.variables import expand_variables
from orchestrator.spec.samplers import GridSampler
from orchestrator.spec.search.manual_trials import resolve_params
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.search.trial_params import SEED, apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.reader import StudyReader
from orchestrator.study.repeats import configuration_key, free_seed
from orchestrator.study.trial_records import TrialRecord, TrialState
from trainer.config.trial import config_fingerprint


def check_like_plan(
    spec: SweepSpec, root: Path, params: Mapping[str, Any], options: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Check a trial as `plan` checks a file: paths, lengths, rows for one update, memory.

    Args:
        spec: The sweep.
        root: The runs folder.
        params: Settings over the base, valid ones.
        options: The `--set` option of each setting, for messages.

    Returns:
        The settings, with file names made absolute (the working directory first), and warnings about them.

    Raises:
        SpecError: a path does not exist, a length exceeds the model's positions, or the memory does not suffice.
        DataError: there are fewer pairs than one update takes.
    """
    alone = {"search": SearchSpace(), "enqueue": (), "sampler": GridSampler(), "warm_start": None, "repeats": 1}
    one_trial = spec.model_copy(update={"base": apply_params(spec.base, params), **alone})
    document = parse_document(dump_spec(one_trial), f"{spec.name}/sweep.yaml")
    document.lines |= {("base", *path.split(".")): f"--set {option}" for path, option in options.items()}
    loaded, _ = arranged(load_document(document, Path.cwd()), [machine_gpus()], is_new=False)
    warnings = [text for text in check_lengths(loaded, document) if text.startswith("--set ")]
    memory = gpu_memory()
    check_share(loaded, memory)
    machine = gpu_share(loaded, memory, GpuAssumptions(gpu_memory=memory))
    made = make_plan(loaded, root, count_rows(loaded.base.data), concurrency=1, tracking="", assumptions=machine)
    if made.estimate is not None:
        warnings += made.estimate.warnings
    resolved = loaded.base.flat_params()
    return {path: resolved[path] if isinstance(value, str) else value for path, value in params.items()}, warnings


def expand_options(params: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of `--set` options with the variables of paths and names expanded.

    Raises:
        SpecError: a variable is not set, looks like a secret, or stands where a file expands none.
    """
    document = parse_document("{}", "--set")
    problems = ErrorCollector(document, is_new=True)
    expanded: dict[str, Any] = {}
    for path, value in params.items():
        loc = ("base", *path.split("."))
        document.lines[loc] = f"--set {options[path]}"
        tree: Any = value
        for part in reversed(loc):
            tree = {part: tree}
        expand_variables(problems, tree)
        for part in loc:
            tree = tree[part]
        expanded[path] = tree
    if problems.items:
        raise SpecError(problems.items)
    return expanded


def equal_trial(study: StudyReader, params: Mapping[str, Any]) -> TrialRecord | None:
    """Return the trial with exactly these settings that has not failed; None if there is none. Forks do not count."""
    fingerprint = config_fingerprint(apply_params(study.spec.base, params))
    equal = {trial.number for trial in study.snapshots() if trial.fingerprint == fingerprint and not trial.is_fork}
    return next((r for r in study.trials() if r.number in equal and r.state is not TrialState.FAILED), None)


def waits_already(study: StudyReader, params: Mapping[str, Any]) -> bool:
    """Return whether a trial with exactly these settings is enqueued and was not issued yet."""
    fingerprint = config_fingerprint(apply_params(study.spec.base, params))
    return any(
        waiting.trial is None
        and waiting.fork is None
        and config_fingerprint(apply_params(study.spec.base, waiting.settings)) == fingerprint
        for waiting in study.enqueued_trials()
    )


def with_another_seed(study: StudyReader, equal: TrialRecord) -> dict[str, Any]:
    """Return the trial's settings with a seed that no trial of its configuration has or will have."""
    spec, key = study.spec, configuration_key(equal.params)
    search = [r for r in study.trials() if r.fork is None and r.finalist_of is None]
    group = [r for r in search if configuration_key(r.params) == key]
    waiting = [
        int(enqueued.settings[SEED])
        for enqueued in study.enqueued_trials()
        if enqueued.trial is None
        and SEED in enqueued.settings
        and configuration_key(resolve_params(spec.base, spec.search, enqueued.settings)) == key
    ]
    begun = int(group[0].params.get(SEED, spec.base.training.seed))
    planned = range(begun, begun + spec.repeats)
    return {**equal.params, SEED: free_seed(group, spec.base.training.seed, [*waiting, *planned])}


def options_of(overrides: Sequence[str]) -> dict[str, str]:
    """Return the `--set` option of each setting."""
    return {one.partition("=")[0].strip().removeprefix("base."): one for one in overrides}
