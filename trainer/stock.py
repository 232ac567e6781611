"""What stays loaded between trials: the tokenised data, and the live model with its start weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.data import Prepared, load_tokenizer, prepare
from trainer.errors import ModelError
from trainer.evaluation.evaluate import Examiner
from trainer.forward.architecture import UnsupportedHead
from trainer.forward.pair_model import CannotPack, PairModel
from trainer.models.identity import locate, model_identity, weight_files
from trainer.models.live import LiveModel, load_model
from trainer.sharding import is_sharded
from trainer.storage.durable import digest_of
from trainer.world import Patience, World


class Stock:
    """Loads what a trial needs unless it is there already, and counts it. One model and one data set at a time."""

    def __init__(self, cache: Path, world: World, *, trust_remote_code: bool) -> None:
        self.counters: Counter[str] = Counter()
        self._cache, self._world, self._trust = cache, world, trust_remote_code
        self._data: tuple[str, Prepared, PreTrainedTokenizerBase] | None = None
        self._live: tuple[ModelConfig, LiveModel] | None = None

    def prepared(self, data: DataConfig, model: ModelConfig) -> tuple[Prepared, PreTrainedTokenizerBase]:
        """The tokenised pairs, and the tokenizer that made them."""
        key = digest_of([data.model_dump(mode="json"), model.model_dump(mode="json")])
        if self._data is None or self._data[0] != key:
            # A generated model is made on the way, and transformers saves models in the first process only.
            with self._world.accelerator.main_process_first():
                tokenizer = load_tokenizer(model, data, self._cache)
                self._data = (key, prepare(data, model, self._cache, tokenizer), tokenizer)
            self.counters["data_loaded"] += 1
        return self._data[1], self._data[2]

    def live(self, config: ModelConfig, *, to_cut: bool = False) -> LiveModel:
        """The model with its start weights, at rest; `to_cut`: freshly read, not yet on its device."""
        if to_cut or self._live is None or self._live[0] != config:
            self.drop_model()  # before the next is loaded: two large ones would not fit
            with self._world.accelerator.main_process_first():
                place = locate(config, self._cache)
            device = None if to_cut else self._world.device
            model = load_model(config, place, device, trust_remote_code=self._trust)
            self._live = (config, LiveModel(model, config, model_identity(config, place), weight_files(config, place)))
            self.counters["model_loaded"] += 1
        live = self._live[1]
        if live.rest():
            self.counters["weights_restored"] += 1
        return live

    def drop_model(self) -> None:
        """Forget the model; the next trial loads it again."""
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
        model = PairModel(live.base, config.model.attention)
    except CannotPack as why:
        raise ModelError(f"model.attention packed: {why}") from why
    except UnsupportedHead as why:
        raise ModelError(str(why)) from why
    return Examiner(config, live.base, model, tokenizer, prepared.eval, world, patience)
