"""`TrainingSession`: trains trials one after the other, with resources that stay loaded between them."""

from __future__ import annotations

import logging
import math
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from trainer.config.locations import differ_in_locations_only, stored_config
from trainer.config.loss_config import DpoLoss
from trainer.config.trial import TrialConfig
from trainer.data import Prepared, ScoreGaps, check_rows, score_gaps
from trainer.distributed.processes import CancelToken, ProcessGroup, RunInterrupted
from trainer.evaluation.answer_kl import AnswerKl
from trainer.evaluation.completions import Completion, SampleFile
from trainer.evaluation.evaluator import Evaluator, write_eval_pairs
from trainer.evaluation.reference_cache import ReferenceCache
from trainer.metrics import KL
from trainer.models.model_files import save_model
from trainer.models.policy_model import PolicyModel
from trainer.objectives.losses import required_stats
from trainer.resource_cache import ResourceCache, check_positions, check_vocabulary, make_evaluator
from trainer.results import ModelError, ResumeError, RunResult, RunStatus, StepMetrics, pack_floats
from trainer.storage import checkpoints
from trainer.storage.atomic_files import digest_of
from trainer.storage.checkpoints import StoredRunResult, load_run_result, save_run_result
from trainer.training.engine import Engine, TrainingInputs
from trainer.training.packed_engine import PackedEngine
from trainer.training.schedule import interval
from trainer.training.train_loop import HeldOutEvaluation, TrainLoop

log = logging.getLogger(__name__)

# Settings that change the speed or the samples file, not the result.
_CHECKPOINTING = "training.gradient_checkpointing"
_NOT_IN_DIGEST = frozenset(
    {
        "model.kernels",
        "model.compile",
        "training.tokens_per_micro_batch",
        "training.distributed",
        _CHECKPOINTING,
        "evaluation.samples",
    }
)


def result_digest(config: TrialConfig) -> str:
    """Return a digest of the settings that a run's result depends on; checkpoints continue only under the same digest.

    Unlike `config_fingerprint`, it leaves out settings of speed and of the samples file.
    """
    return digest_of(_digest_params(config))


def digest_with_checkpointing(config: TrialConfig, *, on: bool) -> str:
    """Return the digest of earlier versions, of which gradient checkpointing was a part."""
    return digest_of(_digest_params(config) | ({_CHECKPOINTING: True} if on else {}))


def _digest_params(config: TrialConfig) -> dict[str, Any]:
    return {k: v for k, v in config.canonical_params().items() if k not in _NOT_IN_DIGEST}


class _Interrupt:
    """Whether one run is to end, and then whether without a checkpoint."""

    def __init__(self) -> None:
        self.requested, self.is_discarded = threading.Event(), False


class TrainingSession:
    """Trains trials one after the other and loads nothing twice."""

    def __init__(
        self,
        cache: Path,
        *,
        trust_remote_code: bool = False,
        sibling: TrainingSession | None = None,
        log_line: Callable[[str], None] | None = None,
    ) -> None:
        """Create a session.

        Args:
            cache: Cache folder, shared by all workers.
            trust_remote_code: Whether a model's folder may run its own Python code.
            sibling: See the method `sibling`.
            log_line: Called in the main process with each line of the data report before training.
        """
        disable_progress_bar()  # a bar per trial and file would flood the log
        self._cache, self._trust_remote_code = cache, trust_remote_code
        self._process_group = ProcessGroup() if sibling is None else sibling._process_group
        shared_resources = None if sibling is None else sibling._resources
        self._resources = ResourceCache(
            cache, self._process_group, trust_remote_code=trust_remote_code, sibling=shared_resources
        )
        self._reference_cache = (
            ReferenceCache(cache, self._process_group) if sibling is None else sibling._reference_cache
        )
        self._interrupt = _Interrupt()
        self._log_line = log_line

    def sibling(self) -> TrainingSession:
        """Return another session in this process, whose trials take turns with this one's, report by report.

        Siblings share data, the initial models' outputs and the models' weights, so they train adapters only (else
        ModelError). Each trial has the same result, bit for bit, as without siblings.
        """
        return TrainingSession(self._cache, trust_remote_code=self._trust_remote_code, sibling=self)

    @property
    def counters(self) -> Counter[str]:
        """Counts of this process so far: `imports`, `trials`, `data_loaded`, `model_loaded`, `weights_restored`,
        `reference_computed`, `reference_loaded`, `reference_parts` (training pairs), `start_computed`, `start_loaded`,
        `start_parts` (held-out pairs; parts that were computed here, of what several processes compute together),
        `answers_computed`, `answers_loaded`.
        """
        return Counter(imports=1) + self._resources.counters + self._reference_cache.counters

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files and logs."""
        return self._process_group.is_main

    def interrupt(self, *, checkpoint: bool = True) -> None:
        """Make the last run of `train` save a checkpoint, if `checkpoint`, and end as STOPPED. Callable from any thread
        or a signal handler; has no effect on later runs.
        """
        self._interrupt.is_discarded = not checkpoint
        self._interrupt.requested.set()

    def train(
        self, config: TrialConfig, folder: Path, earlier_attempts: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        """Run one trial in `folder`. Yields metrics per `logging_steps` and per evaluation; step 0 is the initial
        model.

        Continues from the newest valid checkpoint in `earlier_attempts` and `folder`, whose metrics are yielded again
        first; a finished run is replayed, not repeated. Final weights are in `folder/model`. Closing the generator
        stops at once and saves nothing.

        Args:
            config: The trial.
            folder: The run folder.
            earlier_attempts: Run folders of older attempts, the newest last.
            fork_folder: Run folder of another configuration from whose newest checkpoint, metrics included, this trial
                starts if it has no checkpoint of its own.

        Raises:
            TrialError: A problem that the user can correct.
            ResumeError: The folder belongs to another configuration, or `fork_folder` has no valid checkpoint.
            OSError: The disk cannot be written.
        """
        self._interrupt = _Interrupt()  # one per run: a late interrupt must not reach the next
        return self._run(config, folder, earlier_attempts, fork_folder, self._interrupt)

    def _run(
        self,
        config: TrialConfig,
        folder: Path,
        earlier_attempts: Sequence[Path],
        fork_folder: Path | None,
        interrupt: _Interrupt,
    ) -> Generator[StepMetrics, None, RunResult]:
        digest = result_digest(config)
        self._resources.counters["trials"] += 1
        try:
            stored = load_run_result([*earlier_attempts, folder])
            if stored is not None:
                _accept_digest(stored.result_digest, config, [*earlier_attempts, folder], folder)
                yield from stored.history
                return stored.result
            return (yield from self._train(config, folder, earlier_attempts, fork_folder, digest, interrupt))
        except RunInterrupted:
            return RunResult(RunStatus.STOPPED, "interrupted before the first update", 0)
        finally:
            self._resources.release()

    def _train(
        self,
        config: TrialConfig,
        folder: Path,
        earlier_attempts: Sequence[Path],
        fork_folder: Path | None,
        digest: str,
        interrupt: _Interrupt,
    ) -> Generator[StepMetrics, None, RunResult]:
        process_group = self._process_group
        cancel_token = CancelToken(process_group, interrupt.requested.is_set, lambda: interrupt.is_discarded)
        state = self._load_state([*earlier_attempts, folder], config, folder)
        digest = digest if state is None else state.result_digest  # what later attempts compare with
        state = state or self._load_fork_state(fork_folder)
        prepared, tokenizer = self._resources.load_data(config.data, config.model)
        if self._log_line is not None and self.is_main:
            for line in prepared.report.summary_lines():
                self._log_line(f"data: {line}")
        check_rows(config.loss, prepared.train, prepared.eval)
        sharded = process_group.shards_model(config.training)
        policy = self._resources.load_model(config.model, will_shard=sharded)
        check_vocabulary(policy, prepared)
        check_positions(policy, prepared)
        fingerprints = {"model": policy.fingerprint, "data": prepared.fingerprint}
        if digest not in _digests(config) and state is not None and state.inputs and state.inputs != fingerprints:
            raise ResumeError(f"{folder} was trained from another model or on other data than at its new location")
        if sharded:  # shard before evaluating, so that no process has the whole model
            self._prepare_policy(policy, config, single_use=config.evaluation.prompts == 0)
            policy.shard(process_group.device)

        initial_evaluator = make_evaluator(config, policy, prepared, tokenizer, process_group, cancel_token)
        reference_key = (config, policy.fingerprint, prepared, initial_evaluator)
        cached = required_stats(config.loss).reference and not config.loss.moves_reference
        reference = self._reference_cache.logps("train", *reference_key) if cached else None
        initial_logps = self._reference_cache.logps("eval", *reference_key)
        gaps = self._score_gaps(config, prepared)
        if gaps is not None:
            initial_logps = replace(initial_logps, score_gap=torch.from_numpy(gaps.eval))
        initial_completions = self._reference_cache.completions(*reference_key)
        samples = SampleFile(folder, config.evaluation.samples)
        samples.restore(
            [*([] if fork_folder is None else [fork_folder]), *earlier_attempts, folder],
            0 if state is None else state.step,
        )
        self._write_samples(samples, 0, initial_completions)

        if not sharded:
            self._prepare_policy(policy, config)
        evaluator = make_evaluator(config, policy, prepared, tokenizer, process_group, cancel_token)

        measures_kl = policy.can_become_initial and config.evaluation.prompts > 0
        is_saved = False

        def evaluate(step: int, all_pairs: bool) -> tuple[dict[str, float], str]:
            """Return the metrics and packed pair margins, of completions alone without `all_pairs`."""
            nonlocal is_saved
            completions = evaluator.completions() if completions_due(config, step, loop.total_updates) else []
            self._write_samples(samples, step, completions)
            if not all_pairs:
                return evaluator.completion_metrics(completions), ""
            logps = evaluator.logps(prepared.eval)
            last = step == loop.total_updates
            if process_group.is_main and last:
                write_eval_pairs(folder / "eval_pairs.safetensors", logps, initial_logps, prepared.eval)
            metrics = evaluator.metrics(logps, initial_logps, completions)
            if last and measures_kl and all(map(math.isfinite, metrics.values())):
                metrics[KL], is_saved = self._kl_of_finished(policy, evaluator, completions, folder), True
            return metrics, pack_floats(logps.margins().tolist()) if prepared.eval.paired else ""

        train_gap = None if gaps is None else torch.from_numpy(gaps.train)
        inputs = TrainingInputs(
            policy, evaluator.pair_model, prepared.train, reference, process_group, cancel_token, train_gap
        )
        engine = create_engine(config, inputs, tokenizer, folder)
        initial = evaluator.metrics(initial_logps, initial_logps, initial_completions)
        evaluation = HeldOutEvaluation(initial | ({KL: 0.0} if measures_kl else {}), evaluate)
        loop = TrainLoop(config, inputs, engine, evaluation, folder, earlier_attempts, digest, fingerprints)
        if state is not None:
            loop.restore(state)
            log.info("continues after update %d of %d", state.step, loop.total_updates)
        result = yield from loop.run()
        stored = StoredRunResult(digest, result, loop.history, fingerprints)
        self._finish(stored, policy, evaluator, [*earlier_attempts, folder], is_saved=is_saved)
        return result

    def _score_gaps(self, config: TrialConfig, prepared: Prepared) -> ScoreGaps | None:
        """Return the gaps of the pairs' scores if the loss reads them; log pairs without a positive one."""
        if not (isinstance(config.loss, DpoLoss) and config.loss.needs_scores):
            return None
        with self._process_group.main_first():
            gaps = score_gaps(config.data, prepared, self._cache)
        if self._log_line is not None and self.is_main and (notice := gaps.notice(config.loss.odpo_scale)):
            self._log_line(f"data: {notice}")
        return gaps

    def _load_state(self, folders: Sequence[Path], config: TrialConfig, folder: Path) -> checkpoints.TrainState | None:
        with self._process_group.main_first():  # only the main process renames damaged ones
            state = checkpoints.load_newest(folders)
        if state is not None:
            _accept_digest(state.result_digest, config, folders, folder)
        return state

    def _load_fork_state(self, fork_folder: Path | None) -> checkpoints.TrainState | None:
        """Return another run's state. Raises ResumeError without a valid checkpoint instead of starting from the
        beginning.
        """
        if fork_folder is None:
            return None
        with self._process_group.main_first():
            state = checkpoints.load_newest([fork_folder])
        if state is None:
            raise ResumeError(
                f"the checkpoint from which this trial continues is damaged or missing (see {fork_folder})"
            )
        return state

    def _prepare_policy(self, policy: PolicyModel, config: TrialConfig, *, single_use: bool = False) -> None:
        try:
            policy.prepare_for_trial(config.lora, config.training, single_use=single_use)
        except ModelError:
            self._resources.drop_model()  # some of its layers may have adapters already
            raise

    def _kl_of_finished(
        self, policy: PolicyModel, evaluator: Evaluator, completions: Sequence[Completion], folder: Path
    ) -> float:
        """Return the KL divergence from the initial model on these answers, and save the final weights.

        They are saved first: the same module then becomes the initial model, so that no second one is in memory.
        """
        kl = AnswerKl(evaluator, completions)
        kl.read_policy()
        self._save_final_model(policy, evaluator, folder)
        policy.become_initial()
        return kl.against_initial()

    def _save_final_model(self, policy: PolicyModel, evaluator: Evaluator, folder: Path) -> None:
        main = self._process_group.is_main
        tensors = policy.gather(on_this_process=main)
        if main:
            save_model(policy.model_to_save, evaluator.tokenizer, folder / "model", tensors, evaluator.extra_end_tokens)

    def _finish(
        self,
        stored: StoredRunResult,
        policy: PolicyModel,
        evaluator: Evaluator,
        folders: Sequence[Path],
        *,
        is_saved: bool,
    ) -> None:
        """Write the result of a run that finished or diverged. `is_saved`: the final weights are written already."""
        status = stored.result.status
        if status is RunStatus.FINISHED and not is_saved:
            self._save_final_model(policy, evaluator, folders[-1])
        if status is RunStatus.DIVERGED and is_saved and self._process_group.is_main:
            shutil.rmtree(folders[-1] / "model")  # a training metric of the last update was not finite
        if status is not RunStatus.STOPPED and self._process_group.is_main:
            save_run_result(folders[-1], stored)
            checkpoints.remove_checkpoints(folders)
        self._process_group.barrier()

    def _write_samples(self, samples: SampleFile, step: int, completions: Sequence[Completion]) -> None:
        if self._process_group.is_main and completions:
            samples.add(step, completions)


def create_engine(
    config: TrialConfig, inputs: TrainingInputs, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Engine:
    """Return the engine that takes the updates of this trial."""
    match config.engine:
        case "packed":
            return PackedEngine(config, inputs)
        case "trl":
            from trainer.trl_engine.trl_engine import TrlEngine  # TRL takes seconds to load

            return TrlEngine(config, inputs, tokenizer, folder)
        case _:
            assert_never(config.engine)


def completions_due(config: TrialConfig, step: int, total: int) -> bool:
    """Return whether the fixed prompts are completed after update `step` of `total`."""
    configured = config.evaluation.answer_steps
    period = interval(config.training.eval_steps, total) if configured is None else configured
    return step == total or (period > 0 and step % period == 0)


def _digests(config: TrialConfig) -> tuple[str, str]:
    return result_digest(config), digest_with_checkpointing(config, on=True)


def _as_fast(config: TrialConfig, other: TrialConfig) -> TrialConfig:
    """Return the configuration with the other one's settings of speed."""
    names = ("tokens_per_micro_batch", "distributed", "gradient_checkpointing")
    update = {name: getattr(other.training, name) for name in names}
    return config.model_copy(update={"training": config.training.model_copy(update=update)})


def _accept_digest(stored: str, config: TrialConfig, folders: Sequence[Path], folder: Path) -> None:
    """Raise ResumeError if the digest is of another configuration than `config`, or than `config` before a move.

    A digest contains file names. A run whose model or data was moved since it began has the configuration of that
    time beside its checkpoints; the caller has checked that their contents are equal.
    """
    if stored in _digests(config):
        return
    for earlier in filter(None, map(stored_config, folders)):
        if stored in _digests(earlier) and differ_in_locations_only(_as_fast(earlier, config), config):
            return
    raise ResumeError(f"{folder} belongs to another configuration; choose another folder or remove it")
