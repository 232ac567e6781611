"""A study and its folder into a SweepFrame. Reads only; what is missing or damaged is said, not fatal."""

from __future__ import annotations

import json
import time
from itertools import groupby
from pathlib import Path

from dashboards.analysis.held_out_pairs import DamagedPairs, HeldOut, read_held_out
from dashboards.analysis.sweep_frame import Sample, SweepFrame, TrialCase, TrialView, short_names
from orchestrator.folders import DATA_FILE, ENVIRONMENT_FILE, FAILURE_FILE, SweepFolder
from orchestrator.interfaces import StepsOf
from orchestrator.judge.judgements import Verdict, read_verdicts
from orchestrator.spec.estimates.sweep_plan import total_trials
from orchestrator.spec.search.trial_params import place
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from trainer.data.data_report import DataReport

PAIRS_FILE = "eval_pairs.safetensors"
SAMPLES_FILE = "samples.jsonl"
_LAST_LINES = 12
_DAMAGED = (OSError, ValueError, KeyError, TypeError)


def gather(study: Study, *, state: str, steps: StepsOf | None = None) -> SweepFrame:
    """Everything the sweep left. `state` as `status` says it; `steps`: updates of a trial by its params."""
    folder, spec = study.folder, study.spec
    notices: list[str] = []
    records = study.trials()
    judged = _judged(study, notices)
    cases = tuple(_case(study, record, steps, judged.get(record.number, ()), notices) for record in records)
    gone = [r.number for r in records if r.state is TrialState.COMPLETE and not folder.trial(r.number).is_dir()]
    if gone:
        told = "all trials" if len(gone) == len(records) else f"{len(gone)} trials"
        notices.append(
            f"The folders of {told} are gone: their answers and their held-out pairs cannot be shown, and differences "
            "between them are estimated without pairing."
        )
    data = folder.path / DATA_FILE
    return SweepFrame(
        name=spec.name,
        description=spec.description,
        goal=spec.goal,
        paths=spec.search.paths,
        space=spec.search,
        trials=cases,
        spec=spec,
        state=state,
        at=time.time(),
        hours=study.spent().hours,
        planned=total_trials(spec),
        data=DataReport.model_validate_json(data.read_text(encoding="utf-8")) if data.is_file() else None,
        events=tuple(study.events()),
        gpus=_gpus(folder, spec.resources.gpus_per_trial),
        notices=tuple(notices),
        also=spec.also,
        short=short_names(spec.search.paths),
    )


def _judged(study: Study, notices: list[str]) -> dict[int, tuple[Verdict, ...]]:
    """Judges' verdicts by trial."""
    try:
        found = read_verdicts(study.judged())
    except ValueError as why:
        notices.append(f"the judge's verdicts cannot be read: {why}")
        return {}
    return {number: tuple(each) for number, each in groupby(found, key=lambda verdict: verdict.trial)}


def _case(
    study: Study, record: TrialRecord, steps: StepsOf | None, judged: tuple[Verdict, ...], notices: list[str]
) -> TrialCase:
    view = TrialView(record)
    view.add(study.points(record.number))
    attempts = [study.folder.attempt(record.number, k) for k in range(record.attempts, 0, -1)]
    return TrialCase(
        view=view,
        config=place(study.spec.base, record.params),
        label=str(record.number),
        sweep=study.spec.name,
        steps=None if steps is None else steps(record.params),
        samples=_samples(_newest(attempts, SAMPLES_FILE), notices),
        pairs=_pairs(_newest(attempts, PAIRS_FILE), notices),
        judged=judged,
        failure=_failure(_newest(attempts, FAILURE_FILE)) if record.state is TrialState.FAILED else "",
    )


def _newest(attempts: list[Path], name: str) -> Path | None:
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
    except _DAMAGED as why:
        notices.append(f"{path} cannot be read: {why}")
        return ()


def _pairs(path: Path | None, notices: list[str]) -> HeldOut | None:
    if path is None:
        return None
    try:
        return read_held_out(path)
    except DamagedPairs as why:
        notices.append(str(why))
        return None


def _failure(path: Path | None) -> str:
    if path is None:
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(lines[-_LAST_LINES:])


def _gpus(folder: SweepFolder, asked: float | None) -> bool:
    """Whether a slot is a GPU: as asked, else by what the machine had."""
    if asked is not None:
        return asked > 0
    path = folder.path / ENVIRONMENT_FILE
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("gpus"))
