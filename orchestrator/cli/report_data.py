"""report and suggest: a sweep's frame into a page, a diagnosis, a follow-up sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dashboards.analysis.comparison import Comparison
from dashboards.analysis.comparison import compare as side_by_side
from dashboards.analysis.follow_up import as_yaml, follow_up
from dashboards.analysis.load_frame import gather
from dashboards.analysis.sweep_frame import SweepFrame
from dashboards.diagnosis.diagnose import Insight, insight
from dashboards.report.comparison_page import compare_page
from dashboards.report.html_page import write_page, write_report
from orchestrator.commands.status import state_of
from orchestrator.driver.data_stage import load_report, steps_by_params
from orchestrator.errors import OrchestrateError, StorageRefused
from orchestrator.folders import SweepFolder, existing, known_sweeps
from orchestrator.judge.judgements import as_json as verdicts_as_json
from orchestrator.study.study import Study
from trainer.storage.atomic_files import write_text


class NothingToReport(OrchestrateError):
    """The sweep has no study yet."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} has not begun its first trial: there is nothing to look at yet")


class PlaceTaken(OrchestrateError):
    """A file is where another would be written."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} exists already; nothing is overwritten")


def frame_of(folder: SweepFolder) -> SweepFrame:
    """Everything that one sweep left; NothingToReport before its first trial."""
    if not Study.exists(folder):
        raise NothingToReport(folder.name)
    with Study.open(folder) as study:
        report = load_report(folder)
        steps = None if report is None else steps_by_params(study.spec, report)
        return gather(study, state=state_of(study), steps=steps)


def report(name: str, root: Path, to: Path | None) -> dict[str, Any]:
    """Write the report (by default into the sweep's folder) and say what is in it."""
    folder = existing(root, name)
    seen = insight(frame_of(folder))
    place = write_report(seen, to or folder.report)
    return {"file": str(place), **as_json(seen)}


def suggest(name: str, root: Path, to: Path | None) -> str:
    """The follow-up sweep's file; NothingLearned where no trial says where to look next."""
    made = follow_up(insight(frame_of(existing(root, name))), known_sweeps(root))
    text = as_yaml(made)
    if to is not None:
        if to.exists():
            raise PlaceTaken(to)
        try:
            write_text(to, text)
        except OSError as why:
            raise StorageRefused(f"{to} cannot be written: {why}") from why
    return text


def compare(names: Sequence[str], root: Path, to: Path | None) -> Comparison:
    """Sweeps side by side; with `to` also as a page in that file."""
    frames = [frame_of(existing(root, name)) for name in dict.fromkeys(names)]
    found = side_by_side(frames)
    if to is not None:
        write_page(to, compare_page(found))
    return found


def as_json(seen: Insight) -> dict[str, Any]:
    """What the report concludes, for programs."""
    frame, sure = seen.frame, seen.sure
    found: dict[str, Any] = {
        "name": frame.name,
        "state": frame.state,
        "goal": {"metric": frame.goal.metric, "direction": frame.goal.direction},
        "start": frame.start(frame.goal.metric),
        "best": None,
        "importance": seen.importances,
        "findings": [finding.as_json() for finding in seen.findings],
        "judge": verdicts_as_json([verdict for case in frame.trials for verdict in case.judged]),
        "notices": list(frame.notices),
    }
    if sure is not None:
        against = sure.against_start
        found["best"] = {
            "trial": sure.winner.number,
            "value": sure.winner.record.value,
            "params": dict(sure.winner.record.params),
            "gain": None if against is None else {"mean": against.mean, "low": against.low, "high": against.high},
            "held_out_pairs": sure.pairs,
            "would_win": sure.wins.get(sure.winner.number),
            "cannot_be_told_apart": [case.number for case in sure.tied],
        }
    return found
