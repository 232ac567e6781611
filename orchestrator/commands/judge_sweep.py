"""judge: the best trials' answers against the start model's, now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import folders
from orchestrator.commands.status import state_of
from orchestrator.driver.judge_stage import Room, judge_and_tell, key_of
from orchestrator.errors import ExitCode, Finding, NoTrialCompleted, SpecError
from orchestrator.execution.stop_reasons import Interrupt, Interrupted
from orchestrator.folders import SweepFolder, existing
from orchestrator.interfaces import SweepReporter
from orchestrator.judge.endpoint_batch import Estimate
from orchestrator.judge.judgements import Verdict, read_verdicts
from orchestrator.spec.judge_config import Endpoint, JudgeConfig
from orchestrator.spec.loading.loader import loads
from orchestrator.spec.loading.serialization import dump
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study

Agree = Callable[[Endpoint, Estimate], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Every verdict that the sweep has now, what to know beside them, and the exit code."""

    verdicts: tuple[Verdict, ...]
    notices: tuple[str, ...]
    code: ExitCode


def judge(
    name: str,
    root: Path,
    sets: Sequence[str],
    *,
    stage: Callable[[str], None],
    say: Callable[[str], None],
    agree: Agree,
    reporter: SweepReporter,
    trust_remote_code: bool = False,
) -> Outcome:
    """Judge a sweep that nobody drives. `sets` replace leaves of its `judge:` for this time."""
    folder = existing(root, name)
    if not Study.exists(folder):
        raise NoTrialCompleted(f"no trial of {name} has completed yet: there is nothing to judge")
    with Study.open(folder) as study:
        config = config_of(study.spec, folder, sets)
        if config.endpoint is not None:
            key_of(config.endpoint, name)  # rather now than after a yes
        state = state_of(study)
        with folders.hold(folder), Interrupt(lambda: f"Go on with it by:\n  orchestrate judge {name}") as interrupt:
            room = Room(stage, say, interrupt, agree, reporter, trust_remote_code)
            code, notices = ExitCode.DONE, list[str]()
            try:
                judged = judge_and_tell(study, config, room, state)
            except Interrupted:
                code = ExitCode.INTERRUPTED
                say("interrupted; nothing is lost, the same command goes on where it was")
            else:
                notices = judged.notices
                code = ExitCode.REFUSED if judged.open else ExitCode.DONE
            return Outcome(tuple(read_verdicts(study.judged())), tuple(notices), code)


def config_of(spec: SweepSpec, folder: SweepFolder, sets: Sequence[str]) -> JudgeConfig:
    """The sweep's `judge:`, or the defaults, with leaves replaced; SpecError for a leaf outside it."""
    outside = [one for one in sets if one.partition("=")[0].strip().partition(".")[0] != "judge"]
    if outside:
        problem = "only leaves of judge can be set here, such as judge.top=5"
        raise SpecError([Finding(f"--set {one}", "", problem) for one in outside])
    found = loads(dump(spec), folder.path, sets, source=str(folder.spec)).judge if sets else spec.judge
    return JudgeConfig() if found is None else found
