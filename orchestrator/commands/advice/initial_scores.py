"""`python -m orchestrator.commands.advice.initial_scores JOB.json`: score pairs under the initial model of a sweep.

Trains the SFT stage first where there is one and the cache lacks its result. Log-probs go through the cache of the
trials' evaluations at step 0 and of their reference, so that neither the sweep nor this process computes what the other
has. Lines of JSON on stdout: `{"progress": text}`, at last `{"scores": ..., "counters": ...}`. Exit codes: 0; 2 model
or data cannot be used; 3 out of memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.trial import TrialConfig
from trainer.probe import exit_code_of

if TYPE_CHECKING:
    from orchestrator.execution.messages import AttemptReport
    from trainer.data.pair_dataset import PairDataset
    from trainer.evaluation.evaluator import Evaluator

Split = Literal["train", "eval"]
_Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class ScoringJob:
    """What to score: a trial, the SFT stage before it, at most `rows` pairs of the split."""

    trial: dict[str, Any]
    sft: dict[str, Any] | None
    cache: str
    split: Split
    rows: int | None = None
    trust_remote_code: bool = False


def main(file: Path, send: _Send) -> int:
    """Do the job of this file and return the exit code."""
    job = ScoringJob(**json.loads(file.read_text(encoding="utf-8")))
    return exit_code_of(lambda: send(score(job, send)))


def score(job: ScoringJob, send: _Send) -> dict[str, Any]:
    """Return the scores as JSON values, with counters of what was computed and loaded. Raises TrialError."""
    from transformers.utils.logging import disable_progress_bar

    from orchestrator.commands.advice.near_duplicates import repetition_of
    from orchestrator.spec.advice.pair_scores import PairScores
    from trainer.data import check_rows
    from trainer.distributed.processes import CancelToken, ProcessGroup
    from trainer.evaluation.reference_cache import ReferenceCache
    from trainer.resource_cache import ResourceCache, check_positions, check_vocabulary, make_evaluator

    disable_progress_bar()
    began, cache = perf_counter(), Path(job.cache)
    config, counters = TrialConfig.model_validate(job.trial), dict[str, int]()
    label = config.model.name_or_path or "the generated model"
    if job.sft is not None:
        config, counters = _after_sft(config, TrialConfig.model_validate(job.sft), job, send)
        label = "the sft stage's model"
    group = ProcessGroup()
    resources = ResourceCache(cache, group, trust_remote_code=job.trust_remote_code)
    send({"progress": "reading the data"})
    prepared, tokenizer = resources.load_data(config.data, config.model)
    check_rows(config.loss, prepared.train, prepared.eval)
    sharded = group.shards_model(config.training)
    send({"progress": "loading the model"})
    policy = resources.load_model(config.model, will_shard=sharded)
    check_vocabulary(policy, prepared)
    check_positions(policy, prepared)
    if sharded:
        policy.prepare_for_trial(config.lora, config.training, single_use=True)
        policy.shard(group.device)
    pairs = prepared.train if job.split == "train" else prepared.eval
    progress = _Progress(send, f"scoring {'training' if job.split == 'train' else 'held-out'} pairs")
    evaluator = make_evaluator(config, policy, prepared, tokenizer, group, CancelToken(group, progress.advance))
    progress.total = _count_batches(evaluator, pairs, job.rows)
    reference = ReferenceCache(cache, group)
    found = reference.logps(job.split, config, policy.fingerprint, prepared, evaluator, job.rows)
    send({"progress": "comparing prompts and responses"})
    scores = PairScores(
        split=job.split,
        pairs_in_split=len(pairs),
        chosen=found.chosen.double().cpu().numpy(),
        rejected=found.rejected.double().cpu().numpy(),
        chosen_tokens=found.chosen_tokens.double().cpu().numpy(),
        rejected_tokens=found.rejected_tokens.double().cpu().numpy(),
        train_pairs=len(prepared.train),
        repetition=repetition_of(prepared.train, prepared.eval),
        initial_model=label,
        seconds=perf_counter() - began,
    )
    counters |= {name: counters.get(name, 0) + n for name, n in (resources.counters + reference.counters).items()}
    return {"scores": scores.as_json(), "counters": counters}


class _Progress:
    """Counts micro-batches; the evaluator asks before each whether it is cancelled."""

    def __init__(self, send: _Send, what: str) -> None:
        self._send, self._what, self._done = send, what, 0
        self.total = 0

    def advance(self) -> bool:
        """Report one more micro-batch; never cancels."""
        self._done = min(self._done + 1, self.total)  # it asks too while it waits for another process
        self._send({"progress": f"{self._what}: batch {self._done} of {self.total}"})
        return False


def _count_batches(evaluator: Evaluator, pairs: PairDataset, rows: int | None) -> int:
    """Return the micro-batches of these pairs, or of a sample of them, in proportion."""
    from trainer.evaluation.evaluator import pair_batches, pair_costs

    costs = pair_costs(evaluator.pair_model, pairs)
    order = sorted(range(len(costs)), key=lambda k: (costs[k], k))
    budget = evaluator.config.training.tokens_per_micro_batch
    count = len(pair_batches(evaluator.pair_model, costs, order, budget))
    return count if rows is None else max(1, round(count * min(1.0, rows / len(pairs))))


def _after_sft(
    config: TrialConfig, sft: TrialConfig, job: ScoringJob, send: _Send
) -> tuple[TrialConfig, dict[str, int]]:
    """Return the trial that begins from the SFT stage's model, which is trained unless the cache has it."""
    from orchestrator.driver.sft_stage import train_here, with_model
    from orchestrator.execution.workers.attempt_runner import open_session
    from trainer.data import prepare

    cache = Path(job.cache)
    send({"progress": "reading the data of the sft stage"})
    found = prepare(sft.data, sft.model, cache, trust_remote_code=job.trust_remote_code)
    session = open_session(cache, trust_remote_code=job.trust_remote_code)

    def on_report(report: AttemptReport) -> None:
        if report.metrics:
            send({"progress": f"training the sft stage: update {report.metrics[-1].step}"})

    model = train_here(sft, found.fingerprint, cache, session, on_report)
    return with_model(config, model), dict(session.counters)


if __name__ == "__main__":
    # Redirect prints of libraries to stderr, as the caller reads lines from stdout.
    _stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def _write(line: dict[str, Any]) -> None:
        if os.environ.get("RANK", "0") == "0":
            _stdout.write(json.dumps(line) + "\n")
            _stdout.flush()

    sys.exit(main(Path(sys.argv[1]), _write))
