"""Case 14: a worker without memory tries less, a bounded number of times; the others and the driver do not notice."""

import resource
from pathlib import Path

from orchestrator.execution.stop_reasons import StopKind
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, TrialState
from tests.support.fake_session import FakeSession, run_study, write_script
from tests.support.recorders import ListSink
from tests.support.specs import make_spec, sweep_folder
from trainer.config.trial import TrialConfig
from trainer.results import StepMetrics

NEEDS = {0: 100_000, 1: 1 << 20}
"""Bytes per token that a trial asks the system for: trial 0 fits with 2048 tokens, trial 1 never does."""
ROOM = 300 << 20


class HungrySession(FakeSession):
    """A real limit on the process's memory, and a real block of it by the size of the micro-batch."""

    def on_update(self, config: TrialConfig, folder: Path, metrics: StepMetrics) -> StepMetrics:
        if metrics.step == 4 and (each := NEEDS.get(int(folder.parent.name))):
            _take(each * config.training.tokens_per_micro_batch)
        return metrics


def _take(size: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        bytearray(size)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_workers_without_memory(tmp_path: Path, ray_cluster: None) -> None:
    """Real limits, real Ray; trial 2's worker is killed outright (exit 137), which is a lost worker and no more."""
    write_script(tmp_path, trials={"2": "die"})
    sink = ListSink()
    with Study.create(sweep_folder(tmp_path), make_spec(4)) as study:
        stop = run_study(study, sink, open_session=HungrySession, longest_row=512)
        records, events = study.trials(), study.events()
        metrics = {r.number: [p.step for p in study.metric_history(r.number)] for r in records}
    assert stop.kind is StopKind.FINISHED
    states = [(r.state, r.failure, r.attempts) for r in records]
    assert states[0][:2] == (TrialState.COMPLETE, None)
    assert states[0][2] in (2, 3), "8192 tokens were too many, then 4096 unless trial 1 had learned more by then"
    assert states[1][:2] == (TrialState.FAILED, FailureKind.OUT_OF_MEMORY)
    assert states[1][2] <= 5, "8192, 4096, 2048, 1024, 512"
    assert " to 512; set " in records[1].reason
    assert [s for s, *_ in states[2:]] == [TrialState.COMPLETE] * 2
    assert all(steps == sorted(set(steps)) for steps in metrics.values())
    assert (metrics[0], {e.trial for e in events if e.kind == "out of memory"}) == ([0, 1, 2, 3, 4], {0, 1})
    assert {e.trial for e in events if e.kind == "worker lost"} == {2}
    assert sink.tags("0")["memory.tokens_per_micro_batch"] in ("2048", "1024", "512")
