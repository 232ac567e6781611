"""`TrlEngine`: one call of `trainer.train()` per attempt, yielded update by update.

Weights, moments, schedule, data order and random numbers are set at the start of an update, so that a resumed run
equals an uninterrupted one. TRL's own checkpoints, which are partly pickles, are neither written nor read.
`iterate_in_thread` turns the blocking call into a generator: it runs in a thread that waits while the consumer works.
Objects that TRL and transformers' Trainer change and the next trial uses are restored afterwards.
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

from trainer.config.loss_config import CpoLoss, DpoLoss, KtoLoss, OrpoLoss, SftLoss, SimperLoss, SimpoLoss
from trainer.config.trial import TrialConfig
from trainer.environment import choose_float32_products, remove_foreign_settings
from trainer.evaluation.evaluator import longest_sequence
from trainer.models.policy_model import PolicyModel
from trainer.objectives.pair_logps import MetricSums
from trainer.results import TrialError
from trainer.training.engine import TrainingInputs, UpdatePlan
from trainer.training.optimizer import load_moments, moments
from trainer.trl_engine.instrumented_trainers import (
    InstrumentedCpoTrainer,
    InstrumentedDpoTrainer,
    InstrumentedOrpoTrainer,
    StepCallbacks,
)
from trainer.trl_engine.trl_inputs import (
    RemainingRows,
    common_arguments,
    cpo_arguments,
    dpo_arguments,
    labeled_rows,
    orpo_arguments,
    preference_rows,
)

T = TypeVar("T")


class ConsumerClosed(BaseException):
    """The consumer has closed the generator; raised inside the call so that it unwinds."""


class _Handoff(Generic[T]):
    """Alternation of two threads: `items` passes items on (None: the end), `resume` lets the producer continue."""

    def __init__(self) -> None:
        self.items: SimpleQueue[T | None] = SimpleQueue()
        self.resume = Semaphore(0)
        self.closed = False
        self.failure: BaseException | None = None

    def put(self, item: T) -> None:
        """Hand an item to the consumer and wait until it asks for the next. Raises ConsumerClosed if it never will."""
        self.items.put(item)
        self.resume.acquire()
        if self.closed:
            raise ConsumerClosed

    def run(self, call: Callable[[Callable[[T], None]], object]) -> None:
        """Run the call with `put`; keep its exception in `failure` and mark the end with None."""
        try:
            call(self.put)
        except ConsumerClosed:
            self.failure = None
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            self.failure = error
        self.items.put(None)


def iterate_in_thread(call: Callable[[Callable[[T], None]], object], name: str) -> Generator[T, None, None]:
    """Yield what `call` emits through the function that is passed to it.

    An exception in the call is raised here. Closing the generator raises ConsumerClosed in the call and waits for its
    end.
    """
    handoff: _Handoff[T] = _Handoff()
    thread = Thread(target=handoff.run, args=(call,), name=name, daemon=True)
    thread.start()
    try:
        while (item := handoff.items.get()) is not None:
            yield item
            handoff.resume.release()
    finally:
        handoff.closed = True
        handoff.resume.release()
        thread.join()
    if handoff.failure is not None:
        raise handoff.failure


@contextmanager
def restore_model_state(policy: PolicyModel) -> Generator[None]:
    """Restore attributes after the context: the model's forward, tokens and cache of its configs, accelerate's state.

    Weights are not restored.
    """
    model: Any = policy.base
    configs = [model.config, model.config.get_text_config(), model.generation_config]
    attributes = [vars(one) for one in (model, policy.model_to_save, *configs) if one is not None]
    states: list[dict[str, Any]] = [
        kind._shared_state  # pyright: ignore[reportPrivateUsage]
        for kind in (PartialState, AcceleratorState, GradientState)
    ]
    before = [(values, dict(values)) for values in (*attributes, *states)]
    try:
        yield
    finally:
        for values, saved in before:
            values.clear()
            values.update(saved)


class TrlEngine:
    """Takes updates with DPOTrainer, CPOTrainer or ORPOTrainer, over the same tokens and order as the packed engine."""

    def __init__(
        self, config: TrialConfig, inputs: TrainingInputs, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        """Raises TrialError in several processes, each of which would train on its own, and if the model's rotary
        frequencies would depend on the batch.
        """
        if inputs.process_group.size > 1:
            raise TrialError(f"engine trl trains in one process, not {inputs.process_group.size}; use engine packed")
        rotary, longest = inputs.pair_model.rotary, longest_sequence(inputs.train)
        if rotary is not None and longest > rotary.limit:
            raise TrialError(
                f"beyond {rotary.limit:,} tokens the rotary frequencies of this model depend on the longest sequence "
                f"of a batch, and the longest row has {longest:,}: results of TRL's trainers would depend on "
                f"training.tokens_per_micro_batch; use engine packed, or data.max_length {rotary.limit} or less"
            )
        self.plan = UpdatePlan(config, inputs)
        self._config, self._inputs, self._folder = config, inputs, folder
        self._tokenizer = tokenizer
        self._trained = inputs.policy.trainable_parameters()
        self._loaded: Mapping[str, torch.Tensor] = {}
        self._adam: torch.optim.Optimizer | None = None
        self._updates: Generator[MetricSums] | None = None

    def trainable_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return self._trained

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return the optimizer's moments by name."""
        return self._loaded if self._adam is None else moments(self._adam, self._trained)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `state_dict` returned."""
        self._loaded = state

    def step(self, number: int) -> MetricSums:
        """Run TRL until update `number` is taken."""
        if self._updates is None:
            self._updates = iterate_in_thread(lambda emit: self._train(number - 1, emit), name="trl")
        sums = next(self._updates)
        if number == self.plan.total_updates:
            next(self._updates, None)  # runs to the end of train()
        return sums

    def close(self) -> None:
        """Stop the trainer and restore the model's attributes."""
        if self._updates is not None:
            self._updates.close()

    def _train(self, done: int, emit: Callable[[MetricSums], None]) -> None:
        inputs = self._inputs
        remove_foreign_settings()
        choose_float32_products(inputs.process_group.device)
        with restore_model_state(inputs.policy):
            trainer = self._trainer(done)
            trainer.callbacks = StepCallbacks(self.plan, done, inputs.cancel_token, emit)
            # It would print to stdout, and copy the tokenizer's special tokens into the model's configuration.
            trainer.remove_callback(PrinterCallback)
            trainer.processing_class = None
            adam: torch.optim.Optimizer = trainer.create_optimizer()
            load_moments(adam, self._trained, self._loaded)
            self._adam = adam
            trainer.train()

    def _trainer(self, done: int) -> Any:
        config, inputs, total = self._config, self._inputs, self.plan.total_updates
        cpu = inputs.process_group.device.type == "cpu"
        common = common_arguments(config, total - done, total, self._folder, cpu=cpu)
        tokenizer = deepcopy(self._tokenizer)
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked; the trial's tokenizer is unchanged
        model = inputs.policy.model_to_save
        match config.loss:
            case DpoLoss():
                assert inputs.reference is not None
                row = preference_rows(inputs.train, config.loss, inputs.reference)
                trainer: Any = InstrumentedDpoTrainer(
                    model,
                    args=dpo_arguments(config.loss, common),
                    train_dataset=Dataset.from_list([row(0)]),  # it requires this class
                    processing_class=tokenizer,
                )
                if "ref" in getattr(model, "peft_config", {}):
                    trainer.model.delete_adapter("ref")  # not needed: the rows have reference log-probs
                trainer.train_dataset = RemainingRows(self.plan, done, row)
                return trainer
            case SimpoLoss() | CpoLoss():
                rows: Any = RemainingRows(self.plan, done, labeled_rows(inputs.train))
                arguments = cpo_arguments(config.loss, common, config.data.max_length)
                return InstrumentedCpoTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
            case OrpoLoss():
                rows = RemainingRows(self.plan, done, labeled_rows(inputs.train))
                arguments = orpo_arguments(config.loss, common, config.data.max_length)
                return InstrumentedOrpoTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
            case SimperLoss():
                raise TrialError("TRL has no SimPER; use engine packed")
            case KtoLoss():
                raise TrialError("TRL's KTOTrainer estimates the KL divergence in each micro-batch; use engine packed")
            case SftLoss():
                raise TrialError("engine trl trains on preferences; for sft use engine packed")
            case _:
                assert_never(config.loss)
