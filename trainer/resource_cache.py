"""What stays loaded between trials: the tokenised data, and the live model with its start weights."""

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
from trainer.distributed.processes import Patience, World
from trainer.evaluation.evaluator import Examiner, longest_sequence
from trainer.forward.architecture import UnsupportedHead
from trainer.forward.pair_model import CannotPack, PairModel
from trainer.forward.rotary_embeddings import RotarySwitch
from trainer.models.model_files import locate, model_identity, weight_files
from trainer.models.policy_model import LiveModel, SharedBase, load_model
from trainer.randomness import StillRandom
from trainer.results import ModelError
from trainer.storage.atomic_files import digest_of


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Tokenised:
    """A data set, and the tokenizer that made it."""

    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase


class Stock:
    """Loads what a trial needs unless it is there already, and counts it. One model and one data set at a time."""

    def __init__(self, cache: Path, world: World, *, trust_remote_code: bool, beside: Stock | None = None) -> None:
        """beside: another stock of this process. Those beside it share `counters`, data and the weights of models,
        over which only adapters can be trained; each is there while one of them uses it."""
        self._cache, self._world, self._trust = cache, world, trust_remote_code
        self._shares = beside is not None
        self.counters: Counter[str] = Counter() if beside is None else beside.counters
        self._all_data: WeakValueDictionary[str, Tokenised] = (
            WeakValueDictionary() if beside is None else beside._all_data
        )
        self._all_bases: WeakValueDictionary[ModelConfig, SharedBase] = (
            WeakValueDictionary() if beside is None else beside._all_bases
        )
        self._data: Tokenised | None = None
        self._live: tuple[ModelConfig, LiveModel] | None = None

    def prepared(self, data: DataConfig, model: ModelConfig) -> tuple[Prepared, PreTrainedTokenizerBase]:
        """The tokenised pairs, and the tokenizer that made them."""
        key = digest_of([data.model_dump(mode="json"), model.model_dump(mode="json")])
        self._data = self._all_data.get(key)
        if self._data is None:
            # A generated model is made on the way, and transformers saves models in the first process only.
            with self._world.main_first():
                tokenizer = load_tokenizer(model, data, self._cache, trust_remote_code=self._trust)
                self._data = Tokenised(prepare(data, model, self._cache, tokenizer), tokenizer)
            self._all_data[key] = self._data
            self.counters["data_loaded"] += 1
        return self._data.prepared, self._data.tokenizer

    def live(self, config: ModelConfig, *, to_cut: bool = False) -> LiveModel:
        """The model with its start weights, at rest; `to_cut`: freshly read, not yet on its device."""
        if to_cut or self._live is None or self._live[0] != config:
            self.drop_model()  # before the next is loaded: two large ones would not fit
            self._live = (config, self._shared(config) if self._shares else LiveModel(*self._load(config, to_cut)))
        live = self._live[1]
        if live.rest():
            self.counters["weights_restored"] += 1
        return live

    def _load(self, config: ModelConfig, to_cut: bool) -> tuple[PreTrainedModel, ModelConfig, str, list[Path]]:
        with self._world.main_first():
            place = locate(config, self._cache)
        model = load_model(config, place, None if to_cut else self._world.device, trust_remote_code=self._trust)
        self.counters["model_loaded"] += 1
        return model, config, model_identity(config, place), weight_files(config, place)

    def _shared(self, config: ModelConfig) -> LiveModel:
        base = self._all_bases.get(config)
        if base is None:
            base = self._all_bases[config] = SharedBase(*self._load(config, to_cut=False))
        return base.another()

    def drop_model(self) -> None:
        """Forget the model; the next trial loads it again."""
        if self._live is not None:
            self._live[1].end()
        self._live = None

    def let_go(self) -> None:
        """After a trial: give back the memory of gradients that nobody will use, and a model of which only slices are
        here."""
        if self._live is not None and is_sharded(self._live[1].base):
            self.drop_model()
        elif self._live is not None:
            self._live[1].base.zero_grad(set_to_none=True)


def check_vocabulary(live: LiveModel, prepared: Prepared) -> None:
    """ModelError where the data has token ids that the model has no embedding for: a tokenizer of another model."""
    rows = cast(torch.Tensor, live.base.get_input_embeddings().weight).shape[0]
    highest = max(prepared.train.highest_token, prepared.eval.highest_token)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer gives token ids up to {highest} and the model has embeddings for {rows} tokens: "
            "model.tokenizer is not this model's"
        )


def check_positions(live: LiveModel, prepared: Prepared) -> None:
    """ModelError where a row is longer than the model has positions for, which would fail in the middle of a trial, or
    where its log-probs would hang on the rows beside it."""
    positions = positions_of(live.base.config.to_dict())
    longest = max(longest_sequence(prepared.train), longest_sequence(prepared.eval))
    if positions.table is not None and longest > positions.table:
        raise ModelError(
            f"the longest row has {longest:,} tokens, and the model {positions.table:,} positions "
            f"({positions.field} in its config.json): set data.max_length to {positions.table} or less"
        )
    if positions.switch is not None and longest > positions.switch and RotarySwitch.of(live.base) is None:
        raise ModelError(
            f"beyond {positions.switch:,} tokens the rotary frequencies of this model follow from the longest sequence "
            f"of a batch, in code that is not transformers' own, and the longest row has {longest:,}: set "
            f"data.max_length to {positions.switch} or less"
        )


def examiner(
    config: TrialConfig,
    live: LiveModel,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    patience: Patience,
) -> Examiner:
    """The model as it is now (adapters and all), ready to be looked at and trained with this trial's settings."""
    try:
        autocast = torch.bfloat16 if config.training.bf16 else None
        model = PairModel(live.module, config.model.attention, autocast=autocast)
    except CannotPack as why:
        raise ModelError(f"model.attention packed: {why}") from why
    except (UnsupportedHead, StillRandom) as why:
        raise ModelError(str(why)) from why
    return Examiner(config, live.base, model, tokenizer, prepared.eval, world, patience, prepared.report.stop_tokens)
