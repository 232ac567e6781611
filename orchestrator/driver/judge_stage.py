"""`judge`: compares the best trials' answers with the initial model's and publishes the judgements.

Every answer and vote is stored at once: a rerun continues and repeats no request. Judgements are
published to the trials' runs, the parent run and the report.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.driver.judge_candidates import JudgeTask, LogFn, generate_missing, make_judge_task, reward_scores
from orchestrator.driver.parent_run import FINAL_STOPS, attach_report, open_sink
from orchestrator.errors import ExitCode, OrchestrateError, SpecError, SpecProblem
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted, StopKind, StopReason
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN, ProgressView, SweepReporter, TrackingSink
from orchestrator.judge.answer_pairs import (
    AnswerPair,
    Preferences,
    checker_preferences,
    endpoint_preferences,
    endpoint_questions,
    make_judgements,
    reward_preferences,
)
from orchestrator.judge.endpoint_batch import EndpointBatch, UsageEstimate, estimate_usage, votes_file
from orchestrator.judge.endpoint_client import FIRST_WAIT, EndpointClient, EndpointRefused, Question
from orchestrator.judge.judgements import (
    DecodingKind,
    JudgeKind,
    Judgement,
    as_json,
    best_judged_trial,
    most_important,
    parse_judgements,
)
from orchestrator.redaction import redact
from orchestrator.spec.judge_config import Endpoint, JudgeConfig
from orchestrator.study.reader import StudyReader
from orchestrator.study.study import Study
from trainer.data.sources import source_name
from trainer.results import TrialError, clause
from trainer.storage.atomic_files import write_json
from trainer.storage.jsonl_store import JsonlStore, read_jsonl_store

JUDGE_FOLDER = "judge"
_CHARACTERS_PER_TOKEN = 4
"""Estimate, for the size of answers that are not generated yet."""


class NoUsableJudge(OrchestrateError):
    """No judge is configured that could judge these prompts."""


class CostNotConfirmed(OrchestrateError):
    """The endpoint's cost was not confirmed; nothing was generated or called."""


@dataclass(slots=True)
class JudgeResult:
    """All judgements of the sweep, notices, and the number of questions that the endpoint has not answered."""

    judgements: list[Judgement] = field(default_factory=list[Judgement])
    notices: list[str] = field(default_factory=list[str])
    unanswered: int = 0
    is_interrupted: bool = False

    @property
    def code(self) -> ExitCode:
        """Exit code of `orchestrate judge`."""
        if self.is_interrupted:
            return ExitCode.INTERRUPTED
        return ExitCode.REFUSED if self.unanswered else ExitCode.DONE


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """Callbacks and options of a judging run. `confirm_cost` is called with the maximum cost before an endpoint is."""

    set_activity: LogFn
    log: LogFn
    signals: SignalHandler
    confirm_cost: Callable[[Endpoint, UsageEstimate], bool]
    reporter: SweepReporter
    trust_remote_code: bool = False
    first_wait: float = FIRST_WAIT

    def check_cancelled(self) -> None:
        """Raise Interrupted after a stop signal; called between batches."""
        if self.signals.received:
            raise StageInterrupted


def endpoint_key(config: Endpoint, source: str) -> str | None:
    """Return the endpoint's API key from the environment; None where none is configured. It is never logged.

    Raises:
        SpecError: the environment variable is not set.
    """
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if key:
        return key
    problem = f"the environment variable {config.api_key_env} is not set"
    raise SpecError([SpecProblem(source, "judge.endpoint.api_key_env", problem, "export it, or set it to null")])


def judge(study: StudyReader, config: JudgeConfig, context: JudgeContext) -> JudgeResult:
    """Judge the best trials and store each judgement in the study.

    Raises:
        SpecError, NoUsableJudge, CostNotConfirmed: before anything is generated or called.
        Interrupted: after a stop signal; answers and votes so far are stored.
    """
    cache = study.folder.cache
    judge_task = make_judge_task(study, config, trust_remote_code=context.trust_remote_code)
    _check_judges(judge_task, config)
    out = JudgeResult(notices=list(judge_task.notices))
    _log_task(judge_task, config, cache, context)
    endpoint = config.endpoint
    if endpoint is not None and not _confirm_cost(study, judge_task, endpoint, config, context, out):
        endpoint = None
    key = None if endpoint is None else endpoint_key(endpoint, study.spec.name)
    generate_missing(
        judge_task,
        cache,
        config.tokens_per_batch,
        context.set_activity,
        context.check_cancelled,
        trust_remote_code=context.trust_remote_code,
    )
    answer_pairs = judge_task.answer_pairs(cache, judge_task.decodings)
    all_pairs = [answer_pair for each in answer_pairs.values() for answer_pair in each]
    if config.checker:
        _save_judgements(study, "checker", "the rows' own answers", answer_pairs, checker_preferences)
    if config.reward_model is not None:
        trust_remote_code = context.trust_remote_code
        rewards = reward_scores(
            all_pairs, config, cache, context.set_activity, context.check_cancelled, trust_remote_code=trust_remote_code
        )
        _save_judgements(
            study,
            "reward",
            config.reward_model.name_or_path,
            answer_pairs,
            lambda m: reward_preferences(m, rewards),
        )
    if endpoint is not None:
        endpoint_config = endpoint
        known = _ask_endpoint(study, endpoint_config, key, all_pairs, context, out)
        _save_judgements(
            study,
            "endpoint",
            endpoint_config.model,
            answer_pairs,
            lambda m: endpoint_preferences(m, endpoint_config, known),
        )
        context.check_cancelled()
    return out


def _check_judges(judge_task: JudgeTask, config: JudgeConfig) -> None:
    checked = config.checker and any(p.expected is not None for trial in judge_task.trials for p in trial.prompts)
    if not checked and config.reward_model is None and config.endpoint is None:
        reason = "the prompts have no `answer` for the checker" if config.checker else "judge.checker is false"
        raise NoUsableJudge(f"{clause(reason)}; set judge.reward_model or judge.endpoint")


def _log_task(judge_task: JudgeTask, config: JudgeConfig, cache: Path, context: JudgeContext) -> None:
    for notice in judge_task.notices:
        context.log(f"judge: {notice}")
    trials = f"trial{'s'[: len(judge_task.trials) - 1]} " + ", ".join(str(trial.number) for trial in judge_task.trials)
    prompts = len(judge_task.trials[0].prompts)
    where = "held-out prompts" if config.prompts_from is None else f"prompts of {source_name(config.prompts_from)}"
    each = f"greedy and {config.samples} sampled" if config.samples else "greedy"
    context.log(
        f"judge: {trials} against the initial model on {prompts} {where} ({each}); "
        f"{judge_task.missing(cache):,} answers to generate"
    )


def _confirm_cost(
    study: StudyReader,
    judge_task: JudgeTask,
    endpoint: Endpoint,
    config: JudgeConfig,
    context: JudgeContext,
    out: JudgeResult,
) -> bool:
    """Return whether the unanswered questions may be asked; missing answers are estimated at maximum length."""
    cache = study.folder.cache
    known = read_jsonl_store(votes_file(study.folder.path / JUDGE_FOLDER, endpoint))
    existing = [
        answer_pair for each in judge_task.answer_pairs(cache, judge_task.decodings).values() for answer_pair in each
    ]
    sizes = [question.characters for question in endpoint_questions(existing) if question.key not in known]
    max_characters = 2 * config.max_new_tokens * _CHARACTERS_PER_TOKEN
    for trial in judge_task.trials:
        generated = {(m.prompt, m.sample) for m in existing if m.trial == trial.number}
        for decoding in judge_task.decodings:
            missing = [p for p in trial.prompts if (p.key, decoding.sample) not in generated]
            sizes += [Question(p.text, "", "").characters + max_characters for p in missing for _ in range(2)]
    if not sizes:
        return True
    expected = estimate_usage(endpoint, sizes)
    context.log(f"judge: {endpoint.model} at {endpoint.url}: {expected}")
    if context.confirm_cost(endpoint, expected):
        return True
    name = study.spec.name
    out.notices.append(f"{endpoint.model} was not called ({expected}); to call it: orchestrate judge {name}")
    context.log(f"judge: {out.notices[-1]}")
    return False


def _ask_endpoint(
    study: StudyReader,
    endpoint: Endpoint,
    key: str | None,
    answer_pairs: Sequence[AnswerPair],
    context: JudgeContext,
    out: JudgeResult,
) -> Mapping[str, Any]:
    """Ask the unanswered questions; return all votes so far, also after an interruption."""
    questions = endpoint_questions(answer_pairs)
    client = EndpointClient(endpoint, key, first_wait=context.first_wait)
    try:
        with JsonlStore(votes_file(study.folder.path / JUDGE_FOLDER, endpoint)) as store:
            batch = EndpointBatch(endpoint, client, store)

            def show_progress(done: int, count: int) -> None:
                context.set_activity(f"judge: {endpoint.model} has answered {done} of {count} questions")

            batch.ask_all(questions, show_progress, lambda: context.signals.received)
            known = dict(store.values)
    finally:
        client.close()
    out.unanswered = sum(question.key not in known for question in questions)
    cut = sum(known[q.key]["failure"] == "cut_off" for q in questions if q.key in known)
    if cut:
        out.notices.append(f"{cut} replies were cut off before the vote: raise judge.endpoint.max_tokens")
    if out.unanswered:
        reason = batch.unanswered_reason or "all retries failed"
        out.notices.append(
            f"{out.unanswered} questions to {endpoint.model} are still unanswered ({reason}); run the command again"
        )
    return known


def _save_judgements(
    study: StudyReader,
    kind: JudgeKind,
    judge_name: str,
    answer_pairs: Mapping[int, Sequence[AnswerPair]],
    preferences_of: Callable[[Sequence[AnswerPair]], Preferences | None],
) -> None:
    """Store the judgements of the greedy and of the sampled answers in the study.

    These writes check no fencing token: no driver writes judgements, and the same answers give the same judgement
    under the same key, whichever process judges.
    """
    parts: tuple[tuple[DecodingKind, bool], ...] = (("greedy", True), ("sampled", False))
    for decoding, greedy in parts:
        chosen = {n: [m for m in each if (m.sample is None) == greedy] for n, each in answer_pairs.items()}
        by_trial = {
            n: (each, preferences)
            for n, each in chosen.items()
            if each and (preferences := preferences_of(each)) is not None
        }
        for judgement in make_judgements(kind, judge_name, decoding, by_trial):
            study.save_judgement(judgement.trial, judgement.key, judgement.model_dump_json())


JUDGE_FILE = "judge.json"
_DELIVERY_SECONDS = 30.0


def judge_and_publish(study: Study, config: JudgeConfig, context: JudgeContext, state: str) -> JudgeResult:
    """Judge, then publish the judgements; after an interruption or a refusing endpoint the ones so far.

    Raises:
        Interrupted, EndpointRefused: after publishing.
    """
    try:
        result = judge(study, config, context)
    except (StageInterrupted, EndpointRefused):
        _publish(study, context, state)
        raise
    result.judgements = _publish(study, context, state)
    return result


def judge_after_sweep(
    folder: SweepFolder,
    stop_reason: StopReason,
    view: ProgressView,
    signals: SignalHandler,
    reporter: SweepReporter,
    *,
    trust_remote_code: bool,
) -> None:
    """Run the `judge:` section at the end of a sweep. Errors are logged only, as the sweep itself is complete."""
    if stop_reason.kind not in FINAL_STOPS:
        return
    with Study.open(folder) as study:
        config = study.spec.judge
        if config is None or study.best() is None:
            return
        # Without a user to confirm, a paid endpoint is called only with a configured limit of the cost.
        context = JudgeContext(
            set_activity=view.set_activity,
            log=view.log,
            signals=signals,
            confirm_cost=lambda endpoint, _: endpoint.max_cost is not None,
            reporter=reporter,
            trust_remote_code=trust_remote_code,
        )
        hint = f"to continue: orchestrate judge {study.spec.name}"
        try:
            result = judge_and_publish(
                study, config, context, "finished" if stop_reason.kind is StopKind.FINISHED else "interrupted"
            )
        except StageInterrupted:
            view.log(f"judge: interrupted, results so far are saved; {hint}")
        except (OrchestrateError, TrialError) as error:
            view.log(f"judge: {clause(error)}; {hint}")
        except Exception as error:  # noqa: BLE001 - a bug in judging must not fail a complete sweep
            view.log(f"judge: internal error: {redact(f'{type(error).__name__}: {error}')}; {hint}")
        else:
            for notice in result.notices:
                view.log(f"judge: {notice}")


def _publish(study: Study, context: JudgeContext, state: str) -> list[Judgement]:
    judgements = parse_judgements(study.judgements())
    if not judgements:
        return []
    file = study.folder.path / JUDGE_FOLDER / JUDGE_FILE
    write_json(file, as_json(judgements))
    sink = open_sink(study, study.folder.root, context.reporter)
    try:
        _publish_to_runs(study, sink, judgements)
        sink.log_artifact(SWEEP_RUN, file, "judge")
        attach_report(study, sink, context.reporter, context.log, state)
    finally:
        left = sink.close(_DELIVERY_SECONDS)
    if left:
        context.log(f"tracking: {left} messages are queued in {study.folder.outbox} for the next run")
    return judgements


def _publish_to_runs(study: Study, sink: TrackingSink, judgements: list[Judgement]) -> None:
    """Log metrics and summary to each judged trial's run, and those of the best judged trial to the parent run."""
    steps = {record.number: record.step for record in study.trials()}
    best = best_judged_trial(study, judgements)
    for number in sorted({judgement.trial for judgement in judgements}):
        of_trial = [judgement for judgement in judgements if judgement.trial == number]
        metrics = {name: value for judgement in of_trial for name, value in judgement.metrics().items()}
        first = most_important(of_trial)
        sink.log_final_metrics(str(number), metrics, step=steps[number], at=time.time())
        sink.set_tags(str(number), {"judge": "no judgement" if first is None else first.summary})
        if best is not None and number == best[0]:
            sink.log_final_metrics(SWEEP_RUN, metrics, step=0, at=time.time())
            sink.set_tags(SWEEP_RUN, {"judge": best[1] if first is None else f"trial {number} {best[1]}"})
