"""The workshop: what stays loaded between trials, and one trial made with it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import assert_never

from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from trainer.config.trial import TrialConfig
from trainer.distributed.processes import Interrupted, Patience, World
from trainer.evaluation.completions import Answer, Samples
from trainer.evaluation.evaluator import Examiner, write_eval_pairs
from trainer.evaluation.reference_cache import StartShelf
from trainer.models.model_files import save_model
from trainer.models.policy_model import LiveModel
from trainer.objectives.losses import needs
from trainer.resource_cache import Stock, check_positions, check_vocabulary, examiner
from trainer.results import Ending, EndKind, ModelError, Point, ResumeError, pack
from trainer.storage import checkpoints
from trainer.storage.atomic_files import digest_of
from trainer.storage.checkpoints import Outcome, find_outcome, save_outcome
from trainer.training.engine import Engine, Material
from trainer.training.packed_engine import PackedEngine
from trainer.training.schedule import every
from trainer.training.train_loop import Exam, Run

log = logging.getLogger(__name__)

# What changes how fast a run goes, or what is said of it, but not where it arrives.
_NO_MATTER = frozenset({"training.tokens_per_micro_batch", "training.distributed", "evaluation.samples"})


def config_digest(config: TrialConfig) -> str:
    """Name of what a run computes; a checkpoint is continued only by a configuration of the same name."""
    return digest_of({k: v for k, v in config.identity().items() if k not in _NO_MATTER})


class Workshop:
    """Makes one trial after the other and loads nothing twice."""

    def __init__(
        self,
        cache: Path,
        *,
        trust_remote_code: bool = False,
        beside: Workshop | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """`cache` is shared by all workers; `trust_remote_code` lets a model's folder run its own Python.

        `beside`: as the method of that name has it. `tell`: given each line of the data's report before training, in
        the process that speaks for all.
        """
        disable_progress_bar()  # one bar per trial and file would drown what is said
        self._cache, self._trust = cache, trust_remote_code
        self._world = World() if beside is None else beside._world
        with_stock = None if beside is None else beside._stock
        self._stock = Stock(cache, self._world, trust_remote_code=trust_remote_code, beside=with_stock)
        self._shelf = StartShelf(cache, self._world) if beside is None else beside._shelf
        self._interrupted = threading.Event()
        self._tell = tell

    def beside(self) -> Workshop:
        """Another workshop in this process, whose trials go on in turn with those of its like, a point at a time.

        All that are beside this one share data, what start models say and the models' weights, so its trials train
        adapters only (ModelError for another). Each trial is to the bit what it would be alone.
        """
        return Workshop(self._cache, trust_remote_code=self._trust, beside=self)

    @property
    def counters(self) -> Counter[str]:
        """What this process has done so far: `imports`, `trials`, `data_loaded`, `model_loaded`, `weights_restored`,
        `reference_computed`, `reference_loaded` (of training pairs), `start_computed`, `start_loaded` (of held-out
        pairs), `answers_computed`, `answers_loaded`."""
        return Counter(imports=1) + self._stock.counters + self._shelf.counters

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self._world.is_main

    def interrupt(self) -> None:
        """Ask the run that `train` was called for last to save a checkpoint and end as STOPPED; from any thread or a
        signal handler. One that is over changes nothing: the next run knows nothing of it."""
        self._interrupted.set()

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[Point, None, Ending]:
        """Run one trial in `folder`; a point per `logging_steps` and per evaluation, the start model's at step 0.

        Continues from the newest good checkpoint in `earlier` (older attempts' folders) and `folder`, whose points
        are given again first; a run that ended there only tells its story. Where there is none, `fork` is the run
        folder of another configuration whose newest checkpoint this one goes on from, its points included. Final
        weights are in `folder/model`. Closing the generator stops at once and saves nothing. Raises TrialError for what
        the user can put right, ResumeError where the folder holds another configuration's work or `fork` no good
        checkpoint, OSError where the disk refuses.
        """
        self._interrupted = threading.Event()  # each run has its own: an interrupt that comes late is no other run's
        return self._run(config, folder, earlier, fork, self._interrupted.is_set)

    def _run(
        self,
        config: TrialConfig,
        folder: Path,
        earlier: Sequence[Path],
        fork: Path | None,
        interrupted: Callable[[], bool],
    ) -> Generator[Point, None, Ending]:
        digest = config_digest(config)
        self._stock.counters["trials"] += 1
        try:
            told = find_outcome([*earlier, folder])
            if told is not None:
                _check_same(told.config, digest, folder)
                yield from told.history
                return told.ending
            return (yield from self._train(config, folder, earlier, fork, digest, interrupted))
        except Interrupted:
            return Ending(EndKind.STOPPED, "interrupted before the first update", 0)
        finally:
            self._stock.let_go()

    def _train(
        self,
        config: TrialConfig,
        folder: Path,
        earlier: Sequence[Path],
        fork: Path | None,
        digest: str,
        interrupted: Callable[[], bool],
    ) -> Generator[Point, None, Ending]:
        world, patience = self._world, Patience(self._world, interrupted)
        state = self._state([*earlier, folder], digest, folder) or self._forked(fork)
        prepared, tokenizer = self._stock.prepared(config.data, config.model)
        if self._tell is not None and self.is_main:
            for line in prepared.report.lines():
                self._tell(f"data: {line}")
        cut = world.cuts(config.training)
        live = self._stock.live(config.model, to_cut=cut)
        check_vocabulary(live, prepared)
        check_positions(live, prepared)
        if cut:  # first of all: no process ever has the whole model on its device
            self._begin(live, config, once=True)
            live.shard(config.training, world.device)

        at_rest = examiner(config, live, prepared, tokenizer, world, patience)
        of_start = (config, live.identity, prepared, at_rest)
        reference = self._shelf.logps("train", *of_start) if needs(config.loss).reference else None
        start = self._shelf.logps("eval", *of_start)
        at_start = self._shelf.answers(*of_start)
        samples = Samples(folder, config.evaluation.samples)
        samples.take_over([*([] if fork is None else [fork]), *earlier, folder], 0 if state is None else state.step)
        self._keep(samples, 0, at_start)

        if not cut:
            self._begin(live, config)
        looking = examiner(config, live, prepared, tokenizer, world, patience)

        def evaluate(step: int, whole: bool) -> tuple[dict[str, float], str]:
            answers = looking.answers() if answers_due(config, step, run.total) else []
            self._keep(samples, step, answers)
            if not whole:
                return looking.of_answers(answers), ""
            logps = looking.logps(prepared.eval)
            if world.is_main and step == run.total:
                write_eval_pairs(folder / "eval_pairs.safetensors", logps, start, prepared.eval)
            return looking.metrics(logps, start, answers), pack(logps.gaps().tolist())

        material = Material(live, looking.model, prepared.train, reference, world, patience)
        engine = engine_for(config, material, tokenizer, folder)
        exam = Exam(looking.metrics(start, start, at_start), evaluate)
        run = Run(config, material, engine, exam, folder, earlier, digest)
        if state is not None:
            run.restore(state)
            log.info("continues after update %d of %d", state.step, run.total)
        ending = yield from run.points()
        self._conclude(ending, run, live, looking, [*earlier, folder], digest)
        return ending

    def _state(self, folders: Sequence[Path], digest: str, folder: Path) -> checkpoints.State | None:
        with self._world.main_first():  # it alone sets damaged ones aside
            state = checkpoints.newest(folders)
        if state is not None:
            _check_same(state.config, digest, folder)
        return state

    def _forked(self, fork: Path | None) -> checkpoints.State | None:
        """Another run's state. Never from the start instead: that would be another trial than the one asked for."""
        if fork is None:
            return None
        with self._world.main_first():
            state = checkpoints.newest([fork])
        if state is None:
            raise ResumeError(f"the checkpoint that this trial goes on from is damaged or gone (see {fork})")
        return state

    def _begin(self, live: LiveModel, config: TrialConfig, *, once: bool = False) -> None:
        try:
            live.begin(config.lora, config.training, once=once)
        except ModelError:
            self._stock.drop_model()  # adapters may be on some of its layers
            raise

    def _conclude(
        self,
        ending: Ending,
        run: Run,
        live: LiveModel,
        looking: Examiner,
        folders: Sequence[Path],
        digest: str,
    ) -> None:
        finished, main = ending.kind is EndKind.FINISHED, self._world.is_main
        tensors = live.whole(keep=main) if finished else None
        if ending.kind is not EndKind.STOPPED and main:
            if finished:
                save_model(live.to_save, looking.tokenizer, folders[-1] / "model", tensors, looking.stops)
            save_outcome(folders[-1], Outcome(digest, ending, run.history))
            checkpoints.discard(folders)
        self._world.wait()

    def _keep(self, samples: Samples, step: int, answers: Sequence[Answer]) -> None:
        if self._world.is_main and answers:
            samples.add(step, answers)


def engine_for(config: TrialConfig, material: Material, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Engine:
    """Who takes the updates of this trial."""
    match config.engine:
        case "packed":
            return PackedEngine(config, material)
        case "trl":
            from trainer.trl_engine.trl_engine import TrlEngine  # TRL takes seconds to load

            return TrlEngine(config, material, tokenizer, folder)
        case _:
            assert_never(config.engine)


def answers_due(config: TrialConfig, step: int, total: int) -> bool:
    """Whether the fixed prompts are answered after update `step` of `total`."""
    asked = config.evaluation.answer_steps
    period = every(config.training.eval_steps, total) if asked is None else asked
    return step == total or (period > 0 and step % period == 0)


def _check_same(theirs: str, ours: str, folder: Path) -> None:
    if theirs != ours:
        raise ResumeError(f"{folder} holds the work of another configuration; choose another folder or remove it")
