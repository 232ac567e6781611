"""Load a study and its folder into a SweepFrame. Reads only; missing or damaged files become notices, not errors."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from dashboards.analysis.held_out_pairs import DamagedPairs, HeldOutPairs, metric_by_pair, read_held_out
from dashboards.analysis.seed_means import compared_paths, merge_frames
from dashboards.analysis.sweep_frame import Sample, SweepFrame, TrialCurves, TrialFrame
from dashboards.formatting import short_names
from orchestrator.folders import DATA_FILE, ENVIRONMENT_FILE, FAILURE_FILE, SweepFolder
from orchestrator.interfaces import UpdatesOf
from orchestrator.judge.judgements import Judgement, parse_judgements
from orchestrator.spec.estimates.sweep_plan import planned_trials
from orchestrator.study.finalists import trial_config
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from trainer.data.data_report import DataReport

PAIRS_FILE = "eval_pairs.safetensors"
SAMPLES_FILE = "samples.jsonl"
_TRACEBACK_LINES = 12
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError)


def load_frame(study: Study, *, state: str, updates_of: UpdatesOf | None = None) -> SweepFrame:
    """Return the sweep's frame.

    Args:
        study: the study to read.
        state: the sweep's state as `status` prints it.
        updates_of: returns the updates of a trial from its params; None where the data is not known.
    """
    folder, spec = study.folder, study.spec
    notices: list[str] = []
    records = study.trials()
    judgements = _judgements(study, notices)
    trials = tuple(
        _trial_frame(study, record, updates_of, judgements.get(record.number, ()), notices) for record in records
    )
    deleted = [r.number for r in records if r.state is TrialState.COMPLETE and not folder.trial(r.number).is_dir()]
    if deleted:
        which = "all trials" if len(deleted) == len(records) else f"{len(deleted)} trials"
        notices.append(
            f"The folders of {which} were deleted: their answers and held-out pairs cannot be shown, and differences "
            "between them are estimated without pairing."
        )
    data = folder.path / DATA_FILE
    finalists = tuple(trial for trial in trials if trial.record.finalist_of is not None)
    trials = tuple(trial for trial in trials if trial.record.finalist_of is None)
    configurations, paths = merge_frames(trials, spec), compared_paths(spec)
    has_seeds = any(trial.record.seeds for trial in configurations)
    if has_seeds:
        notices.append(
            "Trials that differ in training.seed only are one configuration: its values and curves are means over the "
            "complete seeds, its answers those of its best seed."
        )
    return SweepFrame(
        name=spec.name,
        description=spec.description,
        objective=spec.first_objective,
        paths=paths,
        space=spec.search,
        trials=configurations,
        seed_trials=trials if has_seeds else (),
        finalists=merge_frames(finalists, spec),
        finalist_trials=finalists,
        confirmation=study.confirmation() if finalists else None,
        spec=spec,
        state=state,
        at=time.time(),
        hours=study.usage().hours,
        planned=planned_trials(spec),
        data=DataReport.model_validate_json(data.read_text(encoding="utf-8")) if data.is_file() else None,
        events=tuple(study.events()),
        gpus=_gpus(folder, spec.resources.gpus_per_trial),
        notices=tuple(notices),
        further_objectives=spec.also,
        short_names=short_names(paths),
    )


def pair_values(study: Study, records: Sequence[TrialRecord], *, initial: bool = False) -> dict[int, list[float]]:
    """Return trial number -> the first objective on each held-out pair; empty if the trials' pairs are not the same.

    `initial`: under the initial model, where a trial's file has that.
    """
    found: dict[int, list[float]] = {}
    first: HeldOutPairs | None = None
    for record in records:
        attempts = attempt_folders(study.folder, record)
        pairs = _pairs(newest_file(attempts, PAIRS_FILE), [])
        if pairs is None:
            continue
        first = first or pairs
        if not pairs.same_pairs(first):
            return {}
        known = pairs.initial() if initial else pairs
        config, metric = trial_config(study.spec, record), study.spec.first_objective.metric
        values = None if known is None else metric_by_pair(metric, known, config.loss)
        if values is not None:
            found[record.number] = values.tolist()
    return found


def _judgements(study: Study, notices: list[str]) -> dict[int, tuple[Judgement, ...]]:
    """Return the judgements by trial number; a notice where they are unreadable."""
    try:
        found = parse_judgements(study.judgements())
    except ValueError as error:
        notices.append(f"the judgements cannot be read: {error}")
        return {}
    return {number: tuple(each) for number, each in groupby(found, key=lambda judgement: judgement.trial)}


def _trial_frame(
    study: Study,
    record: TrialRecord,
    updates_of: UpdatesOf | None,
    judgements: tuple[Judgement, ...],
    notices: list[str],
) -> TrialFrame:
    curves = TrialCurves(record)
    curves.add(study.metric_history(record.number))
    attempts = attempt_folders(study.folder, record)
    return TrialFrame(
        curves=curves,
        config=trial_config(study.spec, record),
        label=str(record.number),
        sweep=study.spec.name,
        planned_updates=None if updates_of is None else updates_of(record.params),
        samples=_samples(newest_file(attempts, SAMPLES_FILE), notices),
        held_out_pairs=_pairs(newest_file(attempts, PAIRS_FILE), notices),
        judgements=judgements,
        failure=_failure(newest_file(attempts, FAILURE_FILE)) if record.state is TrialState.FAILED else "",
    )


def trial_samples(folder: SweepFolder, record: TrialRecord) -> tuple[tuple[Sample, ...], list[str]]:
    """Return the stored completions of a trial, those of the initial model at step 0, and notices about its file."""
    notices: list[str] = []
    return _samples(newest_file(attempt_folders(folder, record), SAMPLES_FILE), notices), notices


def attempt_folders(folder: SweepFolder, record: TrialRecord) -> list[Path]:
    """Return the folders of a trial's attempts, the newest first."""
    return [folder.attempt(record.number, k) for k in range(record.attempts, 0, -1)]


def newest_file(attempts: list[Path], name: str) -> Path | None:
    """Return the first of these folders' files of this name; None if there is none."""
    return next((folder / name for folder in attempts if (folder / name).is_file()), None)


def _samples(path: Path | None, notices: list[str]) -> tuple[Sample, ...]:
    if path is None:
        return ()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return tuple(
            Sample(int(row["step"]), str(row["prompt"]), str(row["answer"]), row.get("expected"), row.get("right"))
            for row in rows
        )
    except _READ_ERRORS as error:
        notices.append(f"{path} cannot be read: {error}")
        return ()


def _pairs(path: Path | None, notices: list[str]) -> HeldOutPairs | None:
    if path is None:
        return None
    try:
        return read_held_out(path)
    except DamagedPairs as error:
        notices.append(str(error))
        return None


def _failure(path: Path | None) -> str:
    if path is None:
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(lines[-_TRACEBACK_LINES:])


def _gpus(folder: SweepFolder, gpus_per_trial: float | None) -> bool:
    """Return whether trials run on GPUs: as configured, else by the GPUs of the recorded environment."""
    if gpus_per_trial is not None:
        return gpus_per_trial > 0
    path = folder.path / ENVIRONMENT_FILE
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("gpus"))
