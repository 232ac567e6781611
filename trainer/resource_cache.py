"""`ResourceCache`: data, tokenizer and model with its initial weights, kept loaded between trials."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from weakref import WeakValueDictionary

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.position_limits import positions_of
from trainer.config.trial import DataConfig, ModelConfig, TrialConfig
from trainer.data import Prepared, load_tokenizer, prepare
from trainer.distributed.fsdp import is_sharded
from trainer.distributed.processes import CancelToken, ProcessGroup
from trainer.evaluation.evaluator import Evaluator, longest_sequence
from trainer.forward.architecture import UnsupportedHead
from trainer.forward.pair_model import CannotPack, PairModel
from trainer.forward.rotary_embeddings import RotarySwitch
from trainer.models.layer_kernels import fuse_layers
from trainer.models.model_files import model_fingerprint, resolve_model_path, weight_files
from trainer.models.policy_model import PolicyModel, SharedBaseModel, load_model
from trainer.randomness import StillRandom
from trainer.results import ModelError
from trainer.storage.atomic_files import digest_of


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class LoadedData:
    """A prepared data set and its tokenizer."""

    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase


class ResourceCache:
    """Loads the data and the model of a trial unless they are loaded, and counts loads. Holds one of each at a time."""

    def __init__(
        self, cache: Path, process_group: ProcessGroup, *, trust_remote_code: bool, sibling: ResourceCache | None = None
    ) -> None:
        """`sibling`: another cache of this process, with which this one shares `counters`, data and the weights of
        models, over which only adapters can be trained. A shared resource is freed when no cache uses it.
        """
        self._cache, self._process_group, self._trust_remote_code = cache, process_group, trust_remote_code
        self._shares = sibling is not None
        self.counters: Counter[str] = Counter() if sibling is None else sibling.counters
        self._all_data: WeakValueDictionary[str, LoadedData] = (
            WeakValueDictionary() if sibling is None else sibling._all_data
        )
        self._all_bases: WeakValueDictionary[ModelConfig, SharedBaseModel] = (
            WeakValueDictionary() if sibling is None else sibling._all_bases
        )
        self._data: LoadedData | None = None
        self._policy: tuple[ModelConfig, PolicyModel] | None = None

    def load_data(self, data: DataConfig, model: ModelConfig) -> tuple[Prepared, PreTrainedTokenizerBase]:
        """Return the tokenized pairs and their tokenizer."""
        key = digest_of([data.model_dump(mode="json"), model.model_dump(mode="json")])
        self._data = self._all_data.get(key)
        if self._data is None:
            # A generated model is created here, and transformers saves models in the first process only.
            with self._process_group.main_first():
                tokenizer = load_tokenizer(model, data, self._cache, trust_remote_code=self._trust_remote_code)
                self._data = LoadedData(prepare(data, model, self._cache, tokenizer), tokenizer)
            self._all_data[key] = self._data
            self.counters["data_loaded"] += 1
        return self._data.prepared, self._data.tokenizer

    def load_model(self, config: ModelConfig, *, will_shard: bool = False) -> PolicyModel:
        """Return the model with its initial weights, unprepared. `will_shard`: reload it and leave it on the CPU."""
        if will_shard or self._policy is None or self._policy[0] != config:
            self.drop_model()  # first, since two large models would not fit
            self._policy = (
                config,
                self._shared_base(config) if self._shares else PolicyModel(*self._load(config, will_shard)),
            )
        policy = self._policy[1]
        if policy.reset():
            self.counters["weights_restored"] += 1
        return policy

    def _load(self, config: ModelConfig, will_shard: bool) -> tuple[PreTrainedModel, ModelConfig, str, list[Path]]:
        with self._process_group.main_first():
            path = resolve_model_path(config, self._cache)
        model = load_model(
            config, path, None if will_shard else self._process_group.device, trust_remote_code=self._trust_remote_code
        )
        fuse_layers(model, config, self._process_group.device)
        self.counters["model_loaded"] += 1
        return model, config, model_fingerprint(config, path), weight_files(config, path)

    def _shared_base(self, config: ModelConfig) -> PolicyModel:
        base = self._all_bases.get(config)
        if base is None:
            base = self._all_bases[config] = SharedBaseModel(*self._load(config, will_shard=False))
        return base.new_policy()

    def drop_model(self) -> None:
        """Drop the model; the next trial loads it again."""
        self._policy = None

    def release(self) -> None:
        """Free the memory of gradients after a trial, and drop a sharded model."""
        if self._policy is not None and is_sharded(self._policy[1].base):
            self.drop_model()
        elif self._policy is not None:
            self._policy[1].base.zero_grad(set_to_none=True)


def check_vocabulary(policy: PolicyModel, prepared: Prepared) -> None:
    """Raise ModelError if the data has token ids without an embedding in the model (a tokenizer of another model)."""
    rows = cast(torch.Tensor, policy.base.get_input_embeddings().weight).shape[0]
    highest = max(prepared.train.max_token_id, prepared.eval.max_token_id)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer gives token ids up to {highest}, but the model has embeddings for {rows} tokens: "
            "set model.tokenizer to this model's tokenizer"
        )


def check_positions(policy: PolicyModel, prepared: Prepared) -> None:
    """Raise ModelError if a row is longer than the model's positions, which would fail in the middle of a trial, or if
    its log-probs would depend on the other rows of its batch.
    """
    positions = positions_of(policy.base.config.to_dict())
    longest = max(longest_sequence(prepared.train), longest_sequence(prepared.eval))
    if positions.table is not None and longest > positions.table:
        raise ModelError(
            f"the longest row has {longest:,} tokens, but the model has {positions.table:,} positions "
            f"({positions.field} in its config.json): set data.max_length to {positions.table} or less"
        )
    if positions.switch is not None and longest > positions.switch and RotarySwitch.of(policy.base) is None:
        raise ModelError(
            f"beyond {positions.switch:,} tokens the rotary frequencies of this model depend on the longest sequence "
            f"of a batch, in code outside of transformers, and the longest row has {longest:,}: set "
            f"data.max_length to {positions.switch} or less"
        )


def make_evaluator(
    config: TrialConfig,
    policy: PolicyModel,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    process_group: ProcessGroup,
    cancel_token: CancelToken,
) -> Evaluator:
    """Return an evaluator of the model in its current state, adapters included. Raises ModelError."""
    try:
        autocast = torch.bfloat16 if config.training.bf16 else None
        model = PairModel(policy.base, config.model.attention, autocast=autocast)
    except CannotPack as error:
        raise ModelError(f"model.attention packed: {error}") from error
    except (UnsupportedHead, StillRandom) as error:
        raise ModelError(str(error)) from error
    return Evaluator(
        config, policy.base, model, tokenizer, prepared.eval, process_group, cancel_token, prepared.report.stop_tokens
    )
