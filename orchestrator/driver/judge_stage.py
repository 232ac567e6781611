"""The judge: the best trials' answers against the start model's. Whatever was learned is kept at once, so that a killed
run goes on where it was, and a finished one that is asked for again asks nobody anything.

After the judge: its verdicts on the trials' runs and on the sweep's, in the report; once, however often asked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.driver.judge_candidates import Contest, Tell, answer_all, score_all, set_up
from orchestrator.driver.parent_run import OVER, attach_report, open_sink
from orchestrator.errors import Finding, OrchestrateError, SpecError
from orchestrator.execution.stop_reasons import Interrupt, Interrupted, Stop, StopKind
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP, Sink, SweepReporter, View
from orchestrator.judge.answer_pairs import Match, Opinion, by_checker, by_endpoint, by_reward, conclude, to_ask
from orchestrator.judge.endpoint_batch import Asking, Estimate, estimate, place_of_votes
from orchestrator.judge.endpoint_client import FIRST_WAIT, Client, EndpointRefused, Question
from orchestrator.judge.judgements import HowDecoded, JudgeKind, Verdict, as_json, best_judged, headline, read_verdicts
from orchestrator.redaction import redact
from orchestrator.spec.judge_config import Endpoint, JudgeConfig
from orchestrator.study.reader import StudyReader
from orchestrator.study.study import Study
from orchestrator.study.trial_records import ranking
from trainer.data.sources import source_name
from trainer.results import TrialError
from trainer.storage.atomic_files import write_json
from trainer.storage.jsonl_store import Kept, peek

JUDGE_FOLDER = "judge"
_CHARACTERS = 4
"""Of a token, about."""


class NobodyJudges(OrchestrateError):
    """No judge is left that could say anything."""


class NotAgreed(OrchestrateError):
    """The endpoint's cost was not agreed to; nothing was generated and nobody was asked."""


@dataclass(slots=True)
class Judged:
    """What came of it. `notices`: what to know beside the verdicts; `open`: questions without an answer."""

    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    notices: list[str] = field(default_factory=list[str])
    open: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """What a judging run works with. `agree` is asked before an endpoint is, with what it may cost at most."""

    stage: Tell
    say: Tell
    interrupt: Interrupt
    agree: Callable[[Endpoint, Estimate], bool]
    reporter: SweepReporter
    trust_remote_code: bool = False
    first_wait: float = FIRST_WAIT

    def pause(self) -> None:
        """Between pieces of work: Interrupted when asked to stop."""
        if self.interrupt.asked:
            raise Interrupted


def key_of(config: Endpoint, source: str) -> str | None:
    """The endpoint's key, from the environment; SpecError where the variable is not set. It is shown to nobody."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if key:
        return key
    problem = f"the environment variable {config.api_key_env} is not set"
    raise SpecError([Finding(source, "judge.endpoint.api_key_env", problem, "export it, or set it to null")])


def judge(study: StudyReader, config: JudgeConfig, room: Room) -> Judged:
    """Judge, and keep each verdict in the study. Interrupted, with all that was learned kept, where asked to stop.

    SpecError, NobodyJudges and NotAgreed before anything is spent.
    """
    cache = study.folder.cache
    contest = set_up(study, config, trust_remote_code=room.trust_remote_code)
    _somebody(contest, config)
    out = Judged(notices=list(contest.notices))
    _announce(contest, config, cache, room)
    endpoint = config.endpoint
    if endpoint is not None and not _agreed(study, contest, endpoint, config, room, out):
        endpoint = None
    key = None if endpoint is None else key_of(endpoint, study.spec.name)
    answer_all(
        contest, cache, config.tokens_per_batch, room.stage, room.pause, trust_remote_code=room.trust_remote_code
    )
    matches = contest.matches(cache, contest.decodings)
    everything = [match for each in matches.values() for match in each]
    if config.checker:
        _conclude(out, study, "checker", "the rows' own answers", matches, by_checker)
    if config.reward_model is not None:
        trust = room.trust_remote_code
        rewards = score_all(everything, config, cache, room.stage, room.pause, trust=trust)
        _conclude(out, study, "reward", config.reward_model.name_or_path, matches, lambda m: by_reward(m, rewards))
    if endpoint is not None:
        asked = endpoint
        known = _ask(study, asked, key, everything, room, out)
        _conclude(out, study, "endpoint", asked.model, matches, lambda m: by_endpoint(m, asked, known))
        room.pause()
    return out


def _somebody(contest: Contest, config: JudgeConfig) -> None:
    checked = config.checker and any(p.expected is not None for trial in contest.trials for p in trial.prompts)
    if not checked and config.reward_model is None and config.endpoint is None:
        why = "the prompts carry no `answer` to check by" if config.checker else "judge.checker is false"
        raise NobodyJudges(f"nobody can judge: {why}, and neither judge.reward_model nor judge.endpoint is given")


def _announce(contest: Contest, config: JudgeConfig, cache: Path, room: Room) -> None:
    for notice in contest.notices:
        room.say(f"judge: {notice}")
    trials = f"trial{'s'[: len(contest.trials) - 1]} " + ", ".join(str(trial.number) for trial in contest.trials)
    prompts = len(contest.trials[0].prompts)
    where = "held-out prompts" if config.prompts_from is None else f"prompts of {source_name(config.prompts_from)}"
    each = f"greedy and {config.samples} sampled" if config.samples else "greedy"
    room.say(
        f"judge: {trials} against the start model on {prompts} {where} ({each}); "
        f"{contest.missing(cache):,} answers are to be generated"
    )


def _agreed(
    study: StudyReader, contest: Contest, endpoint: Endpoint, config: JudgeConfig, room: Room, out: Judged
) -> bool:
    """Whether the endpoint may be asked what is still open. Answers not yet written count as long as they may be."""
    cache = study.folder.cache
    known = peek(place_of_votes(study.folder.path / JUDGE_FOLDER, endpoint))
    there = [match for each in contest.matches(cache, contest.decodings).values() for match in each]
    sizes = [question.characters for question in to_ask(there) if question.key not in known]
    longest = 2 * config.max_new_tokens * _CHARACTERS
    for trial in contest.trials:
        met = {(m.prompt, m.sample) for m in there if m.trial == trial.number}
        for decoding in contest.decodings:
            missing = [p for p in trial.prompts if (p.key, decoding.sample) not in met]
            sizes += [Question(p.text, "", "").characters + longest for p in missing for _ in range(2)]
    if not sizes:
        return True
    expected = estimate(endpoint, sizes)
    room.say(f"judge: {endpoint.model} at {endpoint.url}: {expected}")
    if room.agree(endpoint, expected):
        return True
    name = study.spec.name
    out.notices.append(f"{endpoint.model} was not asked ({expected}); to have it judge: orchestrate judge {name}")
    room.say(f"judge: {out.notices[-1]}")
    return False


def _ask(
    study: StudyReader, endpoint: Endpoint, key: str | None, matches: Sequence[Match], room: Room, out: Judged
) -> Mapping[str, Any]:
    """Ask what is open; what is known in the end, also when interrupted: verdicts so far are worth telling."""
    questions = to_ask(matches)
    client = Client(endpoint, key, first_wait=room.first_wait)
    try:
        with Kept(place_of_votes(study.folder.path / JUDGE_FOLDER, endpoint)) as kept:
            asking = Asking(endpoint, client, kept)

            def tell(done: int, count: int) -> None:
                room.stage(f"judge: {endpoint.model} has answered {done} of {count} questions")

            asking.ask_all(questions, tell, lambda: room.interrupt.asked)
            known = dict(kept.values)
    finally:
        client.close()
    out.open = sum(question.key not in known for question in questions)
    cut = sum(known[q.key]["failure"] == "cut_off" for q in questions if q.key in known)
    if cut:
        out.notices.append(f"{cut} answers ended before their verdict: raise judge.endpoint.max_tokens")
    if out.open:
        why = asking.trouble or "every try failed"
        out.notices.append(f"{out.open} questions to {endpoint.model} are still open ({why}); run it again to ask them")
    return known


def _conclude(
    out: Judged,
    study: StudyReader,
    kind: JudgeKind,
    by: str,
    matches: Mapping[int, Sequence[Match]],
    opinion: Callable[[Sequence[Match]], Opinion | None],
) -> None:
    """Verdicts on the greedy answers and on the sampled ones, each kept in the study."""
    parts: tuple[tuple[HowDecoded, bool], ...] = (("greedy", True), ("sampled", False))
    for decoding, greedy in parts:
        chosen = {n: [m for m in each if (m.sample is None) == greedy] for n, each in matches.items()}
        judged = {n: (each, said) for n, each in chosen.items() if each and (said := opinion(each)) is not None}
        for verdict in conclude(kind, by, decoding, judged):
            study.keep_judged(verdict.trial, verdict.key, verdict.model_dump_json())
            out.verdicts.append(verdict)


JUDGE_FILE = "judge.json"
_DELIVERY_SECONDS = 30.0


def judge_and_tell(study: Study, config: JudgeConfig, room: Room, state: str) -> Judged:
    """Judge, then tell tracking and write the report; also when it ended early, with what there is by then."""
    try:
        judged = judge(study, config, room)
    except (Interrupted, EndpointRefused):
        _tell(study, room, state)
        raise
    _tell(study, room, state)
    return judged


def judge_after(
    folder: SweepFolder,
    ended: Stop,
    view: View,
    interrupt: Interrupt,
    reporter: SweepReporter,
    *,
    trust_remote_code: bool,
) -> None:
    """What `judge:` asks for at the end of a sweep. What goes wrong is said: the sweep itself is over and well."""
    if ended.kind not in OVER:
        return
    with Study.open(folder) as study:
        config = study.spec.judge
        if config is None or not ranking(study.trials(), *study.spec.goals):
            return
        # Nobody is there to say yes: an endpoint is asked where the file says how much it may cost.
        room = Room(
            stage=view.stage,
            say=view.say,
            interrupt=interrupt,
            agree=lambda endpoint, _: endpoint.max_cost is not None,
            reporter=reporter,
            trust_remote_code=trust_remote_code,
        )
        again = f"to go on with it: orchestrate judge {study.spec.name}"
        try:
            judged = judge_and_tell(
                study, config, room, "finished" if ended.kind is StopKind.FINISHED else "interrupted"
            )
        except Interrupted:
            view.say(f"judge: interrupted, nothing is lost; {again}")
        except (OrchestrateError, TrialError) as why:
            view.say(f"judge: {why}; {again}")
        except Exception as why:  # noqa: BLE001 - days of training must not end in a traceback about a judge
            view.say(f"judge: this is ours, not yours ({redact(f'{type(why).__name__}: {why}')}); {again}")
        else:
            for notice in judged.notices:
                view.say(f"judge: {notice}")


def _tell(study: Study, room: Room, state: str) -> None:
    verdicts = read_verdicts(study.judged())
    if not verdicts:
        return
    file = study.folder.path / JUDGE_FOLDER / JUDGE_FILE
    write_json(file, as_json(verdicts))
    sink = open_sink(study, study.folder.root, room.reporter)
    try:
        _tell_runs(study, sink, verdicts)
        sink.artifact(SWEEP, file, "judge")
        attach_report(study, sink, room.reporter, room.say, state)
    finally:
        left = sink.close(_DELIVERY_SECONDS)
    if left:
        room.say(f"tracking: {left} messages wait in {study.folder.outbox}; the next run delivers them")


def _tell_runs(study: Study, sink: Sink, verdicts: list[Verdict]) -> None:
    """Numbers and a sentence on each judged trial's run; on the sweep's those of the best judged trial."""
    steps = {record.number: record.step for record in study.trials()}
    best = best_judged(study, verdicts)
    for number in sorted({verdict.trial for verdict in verdicts}):
        mine = [verdict for verdict in verdicts if verdict.trial == number]
        numbers = {name: value for verdict in mine for name, value in verdict.metrics().items()}
        first = headline(mine)
        sink.values(str(number), numbers, step=steps[number], at=time.time())
        sink.tag(str(number), {"judge": "no verdict" if first is None else first.in_words})
        if best is not None and number == best[0]:
            sink.values(SWEEP, numbers, step=0, at=time.time())
            sink.tag(SWEEP, {"judge": best[1] if first is None else f"trial {number} {best[1]}"})
