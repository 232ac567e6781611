"""`orchestrate judge`: judges the best trials' answers against the initial model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator import folders
from orchestrator.commands.status import sweep_state
from orchestrator.driver.judge_stage import JudgeContext, JudgeResult, endpoint_key, judge_and_publish
from orchestrator.errors import JUDGING, NoTrialCompleted, SpecError, SpecProblem
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted
from orchestrator.folders import SweepFolder, existing_sweep
from orchestrator.gpu_locks import reserved_gpus
from orchestrator.interfaces import SweepReporter
from orchestrator.judge.endpoint_batch import UsageEstimate
from orchestrator.judge.judgements import parse_judgements
from orchestrator.spec.judge_config import Endpoint, JudgeConfig
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study

ConfirmCost = Callable[[Endpoint, UsageEstimate], bool]


def judge_sweep(
    name: str,
    root: Path,
    overrides: Sequence[str],
    *,
    set_activity: Callable[[str], None],
    log: Callable[[str], None],
    confirm_cost: ConfirmCost,
    reporter: SweepReporter,
    trust_remote_code: bool = False,
) -> JudgeResult:
    """Judge a sweep that no driver runs.

    Args:
        name: the sweep.
        root: the runs folder.
        overrides: values of `judge.*` settings for this call.
        set_activity: called with the current stage of the work.
        log: called with each message.
        confirm_cost: confirms the estimated cost of a paid endpoint.
        reporter: updates report and MLflow description.
        trust_remote_code: whether Python code of the model's repository may run.

    Raises:
        NoTrialCompleted: there is nothing to judge.
        SpecError: an override is invalid.
    """
    folder = existing_sweep(root, name)
    if not Study.exists(folder):
        raise NoTrialCompleted(f"no trial of {name} has completed yet: there is nothing to judge")
    with Study.open(folder) as study:
        config = judge_config(study.spec, folder, overrides)
        if config.endpoint is not None:
            endpoint_key(config.endpoint, name)  # a missing key is reported before the cost is confirmed
        state = sweep_state(study)
        with (
            folders.sweep_lock(folder, JUDGING),
            SignalHandler(lambda: f"Continue with:\n  orchestrate judge {name}") as signals,
        ):
            context = JudgeContext(set_activity, log, signals, confirm_cost, reporter, trust_remote_code)

            def wait(sentence: str) -> None:
                context.check_cancelled()
                set_activity(f"judge: {sentence}")

            try:
                with reserved_gpus(f"{name} (judge)", 1, 1, waits=True, on_wait=wait):
                    return judge_and_publish(study, config, context, state)
            except StageInterrupted:
                log("interrupted; results so far are saved, the same command continues")
                return JudgeResult(parse_judgements(study.judgements()), is_interrupted=True)


def judge_config(spec: SweepSpec, folder: SweepFolder, overrides: Sequence[str]) -> JudgeConfig:
    """Return the sweep's `judge:` section, or the defaults, with overrides.

    Raises:
        SpecError: an override is outside `judge:`.
    """
    not_judge = [option for option in overrides if option.partition("=")[0].strip().partition(".")[0] != "judge"]
    if not_judge:
        problem = "only settings of judge can be overridden, such as judge.top=5"
        raise SpecError([SpecProblem(f"--set {option}", "", problem) for option in not_judge])
    found = (
        load_spec_text(dump_spec(spec), folder.path, overrides, source=str(folder.spec), is_new=False).judge
        if overrides
        else spec.judge
    )
    return JudgeConfig() if found is None else found
