"""The engine that TRL is: one `trainer.train()` per attempt, of which each update is heard.

Weights, moments, schedule, order and random numbers are put where an update begins, so that a run that was continued
is the same as one in one go. TRL's own checkpoints, which are pickles in part, are neither written nor read.

A blocking call as a generator: it runs in a thread of its own and stands still while its consumer has the word.

What TRL and transformers' Trainer change on objects that the next trial uses too, put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any, Generic, TypeVar, assert_never

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback

from trainer.config.loss_config import CpoLoss, DpoLoss, OrpoLoss, SftLoss, SimpoLoss
from trainer.config.trial import TrialConfig
from trainer.environment import remove_foreign_settings
from trainer.evaluation.evaluator import longest_sequence
from trainer.models.policy_model import LiveModel
from trainer.objectives.pair_logps import Totals
from trainer.results import TrialError
from trainer.training.engine import Course, Material
from trainer.training.optimizer import load_moments, moments
from trainer.trl_engine.instrumented_trainers import Watch, WatchedCpo, WatchedDpo, WatchedOrpo
from trainer.trl_engine.trl_inputs import (
    Rows,
    common_arguments,
    cpo_arguments,
    dpo_arguments,
    labelled_rows,
    orpo_arguments,
    preference_rows,
)

T = TypeVar("T")


class Abandoned(BaseException):
    """Nobody wants what comes next; raised where the call gives something, so that it unwinds."""


class _Exchange(Generic[T]):
    """The two sides take turns: `given` hands items over (None: the end), `go_on` gives the turn back."""

    def __init__(self) -> None:
        self.given: SimpleQueue[T | None] = SimpleQueue()
        self.go_on = Semaphore(0)
        self.closed = False
        self.failure: BaseException | None = None

    def give(self, item: T) -> None:
        self.given.put(item)
        self.go_on.acquire()
        if self.closed:
            raise Abandoned

    def run(self, call: Callable[[Callable[[T], None]], object]) -> None:
        try:
            call(self.give)
        except Abandoned:
            self.failure = None
        except BaseException as why:  # noqa: BLE001 - raised again in the consumer's thread
            self.failure = why
        self.given.put(None)


def handed_over(call: Callable[[Callable[[T], None]], object], name: str) -> Generator[T, None, None]:
    """What `call` gives (it is passed the function to give with), one after the other.

    An exception in the call is raised here. Closing the generator raises Abandoned in the call and waits for its end.
    """
    exchange: _Exchange[T] = _Exchange()
    thread = Thread(target=exchange.run, args=(call,), name=name, daemon=True)
    thread.start()
    try:
        while (item := exchange.given.get()) is not None:
            yield item
            exchange.go_on.release()
    finally:
        exchange.closed = True
        exchange.go_on.release()
        thread.join()
    if exchange.failure is not None:
        raise exchange.failure


@contextmanager
def left_as_found(live: LiveModel) -> Generator[None]:
    """Until this ends attributes may change: the model's forward, its configs' tokens and cache, accelerate's state.

    Weights are none of this: they change, as they should.
    """
    model: Any = live.base
    configs = [model.config, model.config.get_text_config(), model.generation_config]
    attributes = [vars(one) for one in (model, live.to_save, *configs) if one is not None]
    states: list[dict[str, Any]] = [
        kind._shared_state  # pyright: ignore[reportPrivateUsage]
        for kind in (PartialState, AcceleratorState, GradientState)
    ]
    before = [(now, dict(now)) for now in (*attributes, *states)]
    try:
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)


class TrlEngine:
    """DPOTrainer, CPOTrainer or ORPOTrainer over the same tokens, in the same order, as the packed engine."""

    def __init__(
        self, config: TrialConfig, material: Material, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        """TrialError in several processes, since theirs would each be a trainer of its own, and where the model's
        rotary frequencies would follow from the batch."""
        if material.world.size > 1:
            raise TrialError(f"engine trl trains in one process, here are {material.world.size}; use engine packed")
        rotary, longest = material.model.rotary, longest_sequence(material.train)
        if rotary is not None and longest > rotary.limit:
            raise TrialError(
                f"beyond {rotary.limit:,} tokens the rotary frequencies of this model follow from the longest sequence "
                f"of a batch, and the longest row has {longest:,}: results of TRL's trainers would hang on "
                f"training.tokens_per_micro_batch; use engine packed, or data.max_length {rotary.limit} or less"
            )
        self.course = Course(config, material)
        self._config, self._material, self._folder = config, material, folder
        self._tokenizer = tokenizer
        self._trained = material.live.trained()
        self._loaded: Mapping[str, torch.Tensor] = {}
        self._adam: torch.optim.Optimizer | None = None
        self._updates: Generator[Totals] | None = None

    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters being trained, by name."""
        return self._trained

    def state(self) -> Mapping[str, torch.Tensor]:
        """The optimiser's moments by name."""
        return self._loaded if self._adam is None else moments(self._adam, self._trained)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        self._loaded = state

    def update(self, step: int) -> Totals:
        """Let TRL go on until update `step` is taken."""
        if self._updates is None:
            self._updates = handed_over(lambda give: self._train(step - 1, give), name="trl")
        totals = next(self._updates)
        if step == self.course.total:
            next(self._updates, None)  # to the end of train()
        return totals

    def close(self) -> None:
        """Stop the trainer where it stands and take off the model what it put there."""
        if self._updates is not None:
            self._updates.close()

    def _train(self, done: int, give: Callable[[Totals], None]) -> None:
        material = self._material
        remove_foreign_settings()
        with left_as_found(material.live):
            trainer = self._trainer(done)
            trainer.watch = Watch(self.course, done, material.patience, give)
            # Of these it would print on stdout, and write the tokenizer's tokens into the model's configuration.
            trainer.remove_callback(PrinterCallback)
            trainer.processing_class = None
            adam: torch.optim.Optimizer = trainer.create_optimizer()
            load_moments(adam, self._trained, self._loaded)
            self._adam = adam
            trainer.train()

    def _trainer(self, done: int) -> Any:
        config, material, total = self._config, self._material, self.course.total
        cpu = material.world.device.type == "cpu"
        common = common_arguments(config, total - done, total, self._folder, cpu=cpu)
        tokenizer = deepcopy(self._tokenizer)
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked; the trial's own tokenizer stays as it is
        model = material.live.to_save
        match config.loss:
            case DpoLoss():
                assert material.reference is not None
                row = preference_rows(material.train, config.loss, material.reference)
                trainer: Any = WatchedDpo(
                    model,
                    args=dpo_arguments(config.loss, common),
                    train_dataset=Dataset.from_list([row(0)]),  # it insists on this class
                    processing_class=tokenizer,
                )
                if "ref" in getattr(model, "peft_config", {}):
                    trainer.model.delete_adapter("ref")  # a copy of the adapters as reference, which is known already
                trainer.train_dataset = Rows(self.course, done, row)
                return trainer
            case SimpoLoss() | CpoLoss():
                rows: Any = Rows(self.course, done, labelled_rows(material.train))
                arguments = cpo_arguments(config.loss, common, config.data.max_length)
                return WatchedCpo(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
            case OrpoLoss():
                rows = Rows(self.course, done, labelled_rows(material.train))
                arguments = orpo_arguments(config.loss, common, config.data.max_length)
                return WatchedOrpo(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
            case SftLoss():
                raise TrialError("engine trl trains on preferences; for sft use engine packed")
            case _:
                assert_never(config.loss)
