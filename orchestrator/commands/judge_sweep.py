"""`judge` on a sweep now: the best trials' answers against the initial model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import folders
from orchestrator.commands.status import sweep_state
from orchestrator.driver.judge_stage import JudgeContext, endpoint_key, judge_and_publish
from orchestrator.errors import ExitCode, Finding, NoTrialCompleted, SpecError
from orchestrator.execution.stop_reasons import Interrupted, SignalHandler
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.interfaces import SweepReporter
from orchestrator.judge.endpoint_batch import Estimate
from orchestrator.judge.judgements import Judgement, parse_judgements
from orchestrator.spec.judge_config import Endpoint, JudgeConfig
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study

ConfirmCost = Callable[[Endpoint, Estimate], bool]


@dataclass(frozen=True, slots=True)
class JudgeOutcome:
    """Every judgement that the sweep has now, what to know beside them, and the exit code."""

    judgements: tuple[Judgement, ...]
    notices: tuple[str, ...]
    code: ExitCode


def judge_sweep(
    name: str,
    root: Path,
    sets: Sequence[str],
    *,
    set_stage: Callable[[str], None],
    log: Callable[[str], None],
    confirm_cost: ConfirmCost,
    reporter: SweepReporter,
    trust_remote_code: bool = False,
) -> JudgeOutcome:
    """Judge a sweep that nobody drives. `sets` replace leaves of its `judge:` for this time."""
    folder = existing_sweep(root, name)
    if not Study.exists(folder):
        raise NoTrialCompleted(f"no trial of {name} has completed yet: there is nothing to judge")
    with Study.open(folder) as study:
        config = judge_config(study.spec, folder, sets)
        if config.endpoint is not None:
            endpoint_key(config.endpoint, name)  # rather now than after a yes
        state = sweep_state(study)
        with (
            folders.sweep_lock(folder),
            SignalHandler(lambda: f"Go on with it by:\n  orchestrate judge {name}") as signals,
        ):
            context = JudgeContext(set_stage, log, signals, confirm_cost, reporter, trust_remote_code)
            code, notices = ExitCode.DONE, list[str]()
            try:
                judged = judge_and_publish(study, config, context, state)
            except Interrupted:
                code = ExitCode.INTERRUPTED
                log("interrupted; nothing is lost, the same command goes on where it was")
            else:
                notices = judged.notices
                code = ExitCode.REFUSED if judged.open_questions else ExitCode.DONE
            return JudgeOutcome(tuple(parse_judgements(study.judgements())), tuple(notices), code)


def judge_config(spec: SweepSpec, folder: SweepFolder, sets: Sequence[str]) -> JudgeConfig:
    """The sweep's `judge:`, or the defaults, with leaves replaced; SpecError for a setting outside it."""
    outside = [one for one in sets if one.partition("=")[0].strip().partition(".")[0] != "judge"]
    if outside:
        problem = "only leaves of judge can be set here, such as judge.top=5"
        raise SpecError([Finding(f"--set {one}", "", problem) for one in outside])
    found = (
        load_spec_text(dump_spec(spec), folder.path, sets, source=str(folder.spec), is_new=False).judge
        if sets
        else spec.judge
    )
    return JudgeConfig() if found is None else found
