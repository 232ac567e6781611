"""`PairModel`: log-probs and gradients of pairs, packed with shared prompts if the architecture allows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer import memory_limits
from trainer.config.loss_config import LossConfig
from trainer.distributed.fsdp import is_sharded, reshard
from trainer.forward.architecture import (
    check_head,
    core_model,
    disable_randomness,
    find_head,
    hidden_states,
    packing_unsupported_reason,
    use_attention,
)
from trainer.forward.chunked_logps import ChunkSize, Head, next_token_logps, objective_loss, sequence_logps
from trainer.forward.packing import Batch, TokenPair, pack_pairs, pad_pairs
from trainer.forward.rotary_embeddings import RotarySwitch
from trainer.objectives.losses import coupled_loss, pair_loss, required_stats
from trainer.objectives.pair_logps import LossTerms, PairLogps, RequiredStats, UpdateTotals
from trainer.randomness import switched_off

_log = logging.getLogger(__name__)

_warned: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose special properties were logged: once per model."""


_checked: WeakSet[PreTrainedModel] = WeakSet()
"""Models that were checked for randomness in training mode."""


class CannotPack(ValueError):
    """Packed attention was requested, but the architecture does not support it."""


@dataclass(frozen=True, slots=True)
class UpdateLogps:
    """The log-probs of all pairs of an update under the current model, for objectives that couple them."""

    logps: PairLogps
    """With reference log-probs, on the model's device."""
    index: Sequence[int]
    """Indices of the micro-batch's pairs in the update."""


@dataclass(frozen=True, slots=True)
class PreparedPairs:
    """A micro-batch laid out for one objective, on the model's device or on its way there."""

    batch: Batch
    reference: PairLogps | None


@dataclass(slots=True)
class PassCounters:
    """Work done so far: passes through the model, and positions computed (padding included)."""

    forwards: int = 0
    tokens: int = 0


class PairModel:
    """A causal LM (plain, with LoRA adapters, sharded, or in DistributedDataParallel) applied to preference pairs.

    Dropout must be off. The caller's autocast is used; sums are float64 over float32 token log-probs.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: Literal["auto", "packed", "separate"] = "auto",
        chunk_size: ChunkSize | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Check the model and choose the layout.

        Args:
            model: The model, wrapped or not.
            attention: "packed" requires shared prompts; "auto" uses them if the model supports them.
            chunk_size: Rows of logits per pass; by default chosen by memory.
            autocast: The caller's autocast dtype, so that the kernels tested on CUDA are those of training.

        Raises:
            CannotPack: "packed" was requested and the architecture does not support it.
            UnsupportedHead: The output layer is not supported.
            StillRandom: The model is random in training mode.
        """
        self._model = model
        self._core = core_model(model)
        self._head = find_head(self._core)
        check_head(self._core, self._head)
        if self._core not in _checked:
            self._check_repeatable()
        reason = "requested" if attention == "separate" else packing_unsupported_reason(self._core, autocast)
        if attention == "packed" and reason is not None:
            raise CannotPack(f"{type(self._core).__name__} cannot share prompts: {reason}")
        self.rotary = RotarySwitch.of(self._core)
        """The rotary modules if their frequencies depend on sequence lengths, else None."""
        if self.rotary is not None:
            self.rotary.reset()
        if self._core not in _warned:
            self._warn_once(reason if attention == "auto" else None)
        self.mode: Literal["packed", "separate"] = "packed" if reason is None else "separate"
        self.separate_reason = reason
        """Why the mode is "separate"; None if it is "packed"."""
        self.chunk_size = chunk_size or _chunk_size(
            self.device.type, cast(nn.Linear, self._core.get_output_embeddings()).out_features
        )
        self.counters = PassCounters()
        self.sharded = is_sharded(self._core)
        """Whether the weights are sharded: then all processes must make the same number of passes."""

    def _check_repeatable(self) -> None:
        random_types = disable_randomness(self._core)
        if random_types:
            _log.warning("modules of type %s are random when training; kept in eval mode", ", ".join(random_types))
        _checked.add(self._core)

    def _warn_once(self, reason: str | None) -> None:
        if named := switched_off(self._core):
            found = ", ".join(f"{name} {value}" for name, value in named.items())
            _log.warning("switched off in the model for training and evaluation: %s", found)
        if reason is not None:
            _log.warning("pairs are computed as separate padded sequences: %s", reason)
        if getattr(self._core.config.get_text_config(), "router_aux_loss_coef", None):
            _log.warning("a mixture of experts: its load-balancing loss is not part of the objective")
        _warned.add(self._core)

    @property
    def device(self) -> torch.device:
        """The device of the output layer."""
        return self._head.weight.device

    def logps(self, pairs: Sequence[TokenPair], required: RequiredStats | None = None) -> PairLogps:
        """Return the log-probs of one micro-batch, without gradient and without reference; on the model's device."""
        required = RequiredStats() if required is None else required
        batch = self._make_batch(pairs, required)
        self._count(batch)
        with torch.no_grad(), use_attention(self._core, batch, self.rotary):
            hidden = hidden_states(self._core, self._core, batch)
        found = sequence_logps(hidden, batch, self._current_head(), self.chunk_size, required.collision_prob)
        reshard(self._core)
        return found

    def read_next_token_logps(self, pairs: Sequence[TokenPair], read: Callable[[Tensor], None]) -> None:
        """Call `read` with the log-probs of the vocabulary wherever a token of a chosen response is predicted.

        One forward pass over prompts and chosen responses, without gradient. `read` gets chunks [rows, vocabulary] in
        order of the pairs and their tokens; it may overwrite a chunk, and must copy what it keeps.
        """
        batch = self._make_batch(pairs, RequiredStats(rejected=False))
        self._count(batch)
        with torch.no_grad(), use_attention(self._core, batch, self.rotary):
            hidden = hidden_states(self._core, self._core, batch)
        for logps in next_token_logps(hidden, batch, self._current_head(), self.chunk_size):
            read(logps)
        reshard(self._core)

    def prepare(self, pairs: Sequence[TokenPair], loss: LossConfig, reference: PairLogps | None) -> PreparedPairs:
        """Lay out the pairs of a micro-batch and start their copy to the device; nothing is computed there.

        `reference` is that of `backward`; on the CPU, so that checking it does not wait for a GPU.
        Raises ValueError if it is missing, of other pairs, or given but not used.
        """
        required = required_stats(loss)
        if required.reference != (reference is not None):
            raise ValueError(f"{loss.kind} {'needs' if required.reference else 'takes no'} reference log-probs")
        batch = self._make_batch(pairs, required)
        if reference is not None:
            _check_reference(reference, batch)
            reference = reference.to(self.device)
        return PreparedPairs(batch, reference)

    def backward(
        self,
        pairs: Sequence[TokenPair] | PreparedPairs,
        loss: LossConfig,
        reference: PairLogps | None,
        totals: UpdateTotals,
        backward: Callable[[Tensor], object],
        update: UpdateLogps | None = None,
    ) -> LossTerms:
        """Add the gradient of one micro-batch's share of its update's loss.

        The gradients of an update's micro-batches add up to that of its loss.

        Args:
            pairs: Pairs of the micro-batch, or what `prepare` made of them.
            loss: The objective.
            reference: Log-probs of these pairs, in this order, under the initial model; None for objectives without
                reference, and for prepared pairs, which have it.
            totals: Sums of the whole update over all processes.
            backward: Called once with the scalar loss, as `Tensor.backward`. Under DistributedDataParallel, which
                averages over processes, it must multiply the loss by their number.
            update: Log-probs of the whole update, for objectives that couple its pairs
                (`required_stats(loss).couples_pairs`), if `pairs` are not all of them.

        Raises:
            ValueError: `reference` or `update` is missing, or `reference` is given but not used.
        """
        required = required_stats(loss)
        prepared = pairs if isinstance(pairs, PreparedPairs) else self.prepare(pairs, loss, reference)
        batch, reference = prepared.batch, prepared.reference
        if required.couples_pairs and update is None and len(batch) != totals.pairs:
            raise ValueError(
                f"{loss.kind} with these terms couples the pairs of an update, but {len(batch)} of {totals.pairs} are "
                "given; give the log-probs of the whole update too"
            )
        self._count(batch)

        def objective(logps: PairLogps, part: slice) -> LossTerms:
            if update is not None:
                return coupled_loss(loss, update.logps, update.index[part], logps, totals)
            rows = None if reference is None else reference.select(part)
            return pair_loss(loss, replace(logps, reference=rows), totals)

        with use_attention(self._core, batch, self.rotary):
            hidden = hidden_states(self._model, self._core, batch)
            total, terms = objective_loss(
                hidden,
                batch,
                self._current_head(),
                objective,
                self.chunk_size,
                couples_pairs=required.couples_pairs and update is None,
                collision_prob=required.collision_prob,
            )
            backward(total)
        return LossTerms.concatenate(terms)

    def _current_head(self) -> Head:
        """Return the output layer between a pass and its backward, when FSDP2 has gathered a sharded one."""
        return find_head(self._core) if self.sharded else self._head

    def _make_batch(self, pairs: Sequence[TokenPair], required: RequiredStats) -> Batch:
        layout = pack_pairs if self.mode == "packed" else pad_pairs
        key = None if self.rotary is None else self.rotary.key
        return layout(pairs, prompt=required.prompt, rejected=required.rejected, key=key).to(self.device)

    def _count(self, batch: Batch) -> None:
        self.counters.forwards += 1
        self.counters.tokens += batch.tokens


def _chunk_size(device: str, vocabulary: int) -> ChunkSize:
    kind = device if device in memory_limits.LOGITS_BYTES else "cuda"
    return ChunkSize(
        *(
            memory_limits.rows_within(each[kind], vocabulary)
            for each in (memory_limits.LOGITS_BYTES, memory_limits.LONG_LOGITS_BYTES)
        )
    )


def _check_reference(reference: PairLogps, batch: Batch) -> None:
    found = (tuple(reference.chosen_tokens.tolist()), tuple(reference.rejected_tokens.tolist()))
    if found != (batch.chosen_tokens, batch.rejected_tokens):
        raise ValueError("the reference log-probs are of other pairs: numbers of scored tokens differ")
