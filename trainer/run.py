"""The workshop: what stays loaded between trials, and one trial made with it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from trainer import checkpoint
from trainer.answers import Answer
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.data import Prepared, load_tokenizer, prepare
from trainer.durable import digest_of
from trainer.errors import ModelError, ResumeError
from trainer.evaluate import Examiner, write_eval_pairs, write_samples
from trainer.export import save_model
from trainer.forward import CannotPack, PairModel
from trainer.identity import locate, model_identity
from trainer.loop import Material, Run
from trainer.losses import needs
from trainer.model import LiveModel, load_model
from trainer.outcome import Outcome, find_outcome, save_outcome
from trainer.pair_logps import PairLogps
from trainer.reference import start_answers, start_logps
from trainer.report import Ending, EndKind, Point
from trainer.world import Interrupted, Patience, World

log = logging.getLogger(__name__)

# What changes how fast a run goes, or what is said of it, but not where it arrives.
_NO_MATTER = frozenset({"training.tokens_per_micro_batch", "evaluation.samples"})


def config_digest(config: TrialConfig) -> str:
    """Name of what a run computes; a checkpoint is continued only by a configuration of the same name."""
    return digest_of({k: v for k, v in config.identity().items() if k not in _NO_MATTER})


class Workshop:
    """Holds tokenised data, the live model with its start weights, and the start model's log-probs between trials.

    One trial at a time. `counters` tell what was done: `imports`, `data_loaded`, `model_loaded`, `weights_restored`,
    `reference_computed`, `reference_loaded` (of training pairs), `start_computed`, `start_loaded` (of held-out pairs),
    `answers_computed`, `answers_loaded`, `trials`.
    """

    def __init__(self, cache: Path, *, trust_remote_code: bool = False) -> None:
        """`cache` is shared by all workers; `trust_remote_code` lets a model's folder run its own Python."""
        self.counters: Counter[str] = Counter(imports=1)
        self._cache, self._trust = cache, trust_remote_code
        self._world = World()
        disable_progress_bar()  # one bar per trial and file would drown what is said
        self._interrupted = threading.Event()
        self._data: tuple[str, Prepared, PreTrainedTokenizerBase] | None = None
        self._live: tuple[ModelConfig, LiveModel] | None = None
        self._start: dict[str, PairLogps] = {}
        self._answers: dict[str, list[Answer]] = {}

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self._world.is_main

    def interrupt(self) -> None:
        """Ask the run in progress to save a checkpoint and end as STOPPED; from any thread or a signal handler."""
        self._interrupted.set()

    def train(self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = ()) -> Generator[Point, None, Ending]:
        """Run one trial in `folder`; a point per `logging_steps` and per evaluation, the start model's at step 0.

        Continues from the newest good checkpoint in `earlier` (older attempts' folders) and `folder`, whose points
        are given again first; a run that ended there only tells its story. Final weights are in `folder/model`. Closing
        the generator stops at once and saves nothing. Raises TrialError for what the user can put right, ResumeError
        where the folder holds another configuration's work, OSError where the disk refuses.
        """
        digest = config_digest(config)
        self.counters["trials"] += 1
        try:
            told = find_outcome([*earlier, folder])
            if told is not None:
                _check_same(told.config, digest, folder)
                yield from told.history
                return told.ending
            return (yield from self._train(config, folder, earlier, digest))
        except Interrupted:
            return Ending(EndKind.STOPPED, "interrupted before the first update", 0)
        finally:
            self._interrupted.clear()
            if self._live is not None:
                self._live[1].base.zero_grad(set_to_none=True)

    def _train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path], digest: str
    ) -> Generator[Point, None, Ending]:
        patience = Patience(self._world, self._interrupted.is_set)
        state = checkpoint.newest([*earlier, folder])
        if state is not None:
            _check_same(state.config, digest, folder)
        prepared, tokenizer = self._prepared(config.data, config.model)
        live = self._at_rest(config.model)
        examiner = self._examiner(config, live, prepared, tokenizer, patience)
        reference = self._reference(config, examiner, prepared) if needs(config.loss).reference else None
        start = self._start_logps(config, examiner, prepared, "eval")
        answers = {0: self._start_answers(config, examiner, prepared)}

        live.begin(config.lora, config.training)
        examiner = self._examiner(config, live, prepared, tokenizer, patience)
        self._write_samples(config, folder, answers)

        def evaluate(last: bool) -> dict[str, float]:
            logps = examiner.logps(prepared.eval)
            found = examiner.answers() if last else []
            if last and self._world.is_main:
                write_eval_pairs(folder / "eval_pairs.safetensors", logps, prepared.eval)
            if last:
                answers[run.total] = found
                self._write_samples(config, folder, answers)
            return examiner.metrics(logps, start, found)

        material = Material(
            live=live,
            model=examiner.model,
            train=prepared.train,
            reference=reference,
            start=examiner.metrics(start, start, answers[0]),
            evaluate=evaluate,
            world=self._world,
            patience=patience,
        )
        run = Run(config, material, folder, earlier, digest)
        if state is not None:
            run.restore(state)
            log.info("continues after update %d of %d", state.step, run.total)
        ending = yield from run.points()
        self._conclude(ending, run, live, tokenizer, [*earlier, folder], digest)
        return ending

    def _conclude(
        self,
        ending: Ending,
        run: Run,
        live: LiveModel,
        tokenizer: PreTrainedTokenizerBase,
        folders: Sequence[Path],
        digest: str,
    ) -> None:
        if ending.kind is not EndKind.STOPPED and self._world.is_main:
            if ending.kind is EndKind.FINISHED:
                save_model(live.to_save, tokenizer, folders[-1] / "model")
            save_outcome(folders[-1], Outcome(digest, ending, run.history))
            checkpoint.discard(folders)
        self._world.wait()

    # --- what stays loaded -------------------------------------------------------------------------------------------

    def _prepared(self, data: DataConfig, model: ModelConfig) -> tuple[Prepared, PreTrainedTokenizerBase]:
        key = digest_of([data.model_dump(mode="json"), model.model_dump(mode="json")])
        if self._data is None or self._data[0] != key:
            tokenizer = load_tokenizer(model, data, self._cache)
            self._data = (key, prepare(data, model, self._cache, tokenizer), tokenizer)
            self.counters["data_loaded"] += 1
        return self._data[1], self._data[2]

    def _at_rest(self, config: ModelConfig) -> LiveModel:
        if self._live is None or self._live[0] != config:
            self._live = None  # before the next is loaded: two large models would not fit
            self._start.clear()
            self._answers.clear()
            place = locate(config, self._cache)
            model = load_model(config, place, self._world.device, trust_remote_code=self._trust)
            self._live = (config, LiveModel(model, config, model_identity(config, place)))
            self.counters["model_loaded"] += 1
        live = self._live[1]
        if live.rest():
            self.counters["weights_restored"] += 1
        return live

    def _examiner(
        self,
        config: TrialConfig,
        live: LiveModel,
        prepared: Prepared,
        tokenizer: PreTrainedTokenizerBase,
        patience: Patience,
    ) -> Examiner:
        try:
            model = PairModel(live.base, config.model.attention)
        except CannotPack as why:
            raise ModelError(f"model.attention packed: {why}") from why
        return Examiner(config, live.base, model, tokenizer, prepared.eval, self._world, patience)

    # --- the start model's share -------------------------------------------------------------------------------------

    def _key(self, config: TrialConfig, examiner: Examiner, prepared: Prepared, split: str) -> dict[str, Any]:
        """All that the start model's log-probs depend on, to the bit: also how pairs are put into batches."""
        assert self._live is not None
        model, training, wanted = config.model, config.training, needs(config.loss)
        return {
            "start": self._live[1].identity,
            "data": prepared.fingerprint,
            "split": split,
            "dtype": model.dtype,
            "load_in_4bit": model.load_in_4bit,
            "bf16": training.bf16,
            "mode": examiner.model.mode,
            "tokens_per_micro_batch": training.tokens_per_micro_batch,
            "device": self._world.device.type,
            "prompt": wanted.prompt,
            "purity": wanted.purity,
        }

    def _reference(self, config: TrialConfig, examiner: Examiner, prepared: Prepared) -> PairLogps:
        return self._start_logps(config, examiner, prepared, "train")

    def _start_logps(self, config: TrialConfig, examiner: Examiner, prepared: Prepared, split: str) -> PairLogps:
        key = self._key(config, examiner, prepared, split)
        name, pairs = digest_of(key), prepared.train if split == "train" else prepared.eval
        if name not in self._start:
            self._start[name], computed = start_logps(self._cache, key, self._world, lambda: examiner.logps(pairs))
            what = "reference" if split == "train" else "start"
            self.counters[f"{what}_{'computed' if computed else 'loaded'}"] += 1
        return self._start[name]

    def _start_answers(self, config: TrialConfig, examiner: Examiner, prepared: Prepared) -> list[Answer]:
        evaluation = config.evaluation
        if evaluation.prompts == 0:
            return []
        key = self._key(config, examiner, prepared, "eval")
        key |= {"answers": evaluation.prompts, "max_new_tokens": evaluation.max_new_tokens}
        name = digest_of(key)
        if name not in self._answers:
            self._answers[name], computed = start_answers(self._cache, key, self._world, examiner.answers)
            self.counters[f"answers_{'computed' if computed else 'loaded'}"] += 1
        return self._answers[name]

    def _write_samples(self, config: TrialConfig, folder: Path, answers: dict[int, list[Answer]]) -> None:
        if self._world.is_main and config.evaluation.prompts > 0:
            write_samples(folder / "samples.jsonl", answers, config.evaluation.samples)


def _check_same(theirs: str, ours: str, folder: Path) -> None:
    if theirs != ours:
        raise ResumeError(f"{folder} holds the work of another configuration; choose another folder or remove it")
