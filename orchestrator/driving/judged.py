"""After the judge: its verdicts on the trials' runs and on the sweep's, in the report; once, however often asked."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.driving.closing import OVER, attach_report
from orchestrator.driving.describing import best_judged
from orchestrator.driving.judging import JUDGE_FOLDER, Judged, Room, judge
from orchestrator.driving.story import open_sink
from orchestrator.engine.stopping import Interrupt, Interrupted, Stop, StopKind
from orchestrator.engine.view import View
from orchestrator.errors import OrchestrateError
from orchestrator.folders import SweepFolder
from orchestrator.judging.endpoint import EndpointRefused
from orchestrator.judging.verdict import Verdict, as_json, headline, read_verdicts
from orchestrator.spec.judge import JudgeConfig
from orchestrator.study.ranking import ranking
from orchestrator.study.study import Study
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.sink import SWEEP, Sink
from trainer.errors import TrialError
from trainer.storage.durable import write_json

JUDGE_FILE = "judge.json"
_DELIVERY_SECONDS = 30.0


def judge_and_tell(study: Study, config: JudgeConfig, room: Room, state: str) -> Judged:
    """Judge, then tell tracking and write the report; also when it ended early, with what there is by then."""
    try:
        judged = judge(study, config, room)
    except (Interrupted, EndpointRefused):
        _tell(study, room.say, state)
        raise
    _tell(study, room.say, state)
    return judged


def judge_after(folder: SweepFolder, ended: Stop, view: View, interrupt: Interrupt, *, trust_remote_code: bool) -> None:
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


def _tell(study: Study, say: Callable[[str], None], state: str) -> None:
    verdicts = read_verdicts(study.judged())
    if not verdicts:
        return
    file = study.folder.path / JUDGE_FOLDER / JUDGE_FILE
    write_json(file, as_json(verdicts))
    sink = open_sink(study, study.folder.root)
    try:
        _tell_runs(study, sink, verdicts)
        sink.artifact(SWEEP, file, "judge")
        attach_report(study, sink, say, state)
    finally:
        left = sink.close(_DELIVERY_SECONDS)
    if left:
        say(f"tracking: {left} messages wait in {study.folder.outbox}; the next run delivers them")


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
