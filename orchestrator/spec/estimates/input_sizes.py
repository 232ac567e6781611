"""Sizes of a sweep's inputs without loading, downloading or tokenizing them.

A model's shape comes from its config.json, its description or the table of models used in sweeps/.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.hub_cache import model_file
from trainer.config.model_folder import check_model_files
from trainer.config.trial import DataConfig, FileSource, GeneratedModel, GeneratedSource, HubSource, ModelConfig, Source


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Shape of a decoder-only transformer with gated feed-forward layers, such as Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    """Whether the output layer shares the embedding's weights."""
    qkv_bias: bool = False
    norms: int = 2
    """Norms over the hidden size per layer."""
    head_norms: bool = False
    """Whether queries and keys are normalized per head (Qwen 3)."""
    softcap: bool = False
    fused: bool = False
    """Whether queries, keys and values come from one layer, and gate and up from one (Phi 3)."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each linear layer of one decoder layer."""
        wide, narrow, feed = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        hidden = self.hidden
        if self.fused:
            return (hidden, wide + 2 * narrow), (wide, hidden), (hidden, 2 * feed), (feed, hidden)
        return (
            (hidden, wide),
            (hidden, narrow),
            (hidden, narrow),
            (wide, hidden),
            (hidden, feed),
            (hidden, feed),
            (feed, hidden),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers, which are quantized and get adapters."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def parameters(self) -> int:
        """The exact number of weights."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = self.norms * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        ends = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden
        return self.linear_parameters + self.layers * (bias + norms) + ends

    def adapters(self, rank: int) -> int:
        """Return the weights of low-rank adapters of this rank on all linear layers."""
        return self.layers * rank * sum(i + o for i, o in self.linears)


_LLAMA3_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
_MISTRAL_7B = ModelShape(4096, 32, 32, 8, 128, 14336, 32000)
_LLAMA3_70B = ModelShape(8192, 80, 64, 8, 128, 28672, 128256)

KNOWN_SHAPES = {
    "princeton-nlp/Llama-3-Base-8B-SFT": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA3_8B,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "google/gemma-2-9b-it": ModelShape(3584, 42, 16, 8, 256, 14336, 256000, tied=True, norms=4, softcap=True),
    "meta-llama/Llama-3.2-1B-Instruct": ModelShape(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "Qwen/Qwen2.5-14B-Instruct": ModelShape(5120, 48, 40, 8, 128, 13824, 152064, qkv_bias=True),
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA3_70B,
}
"""Initial models of sweeps/, from their config.json, so that a plan needs no hub."""


def model_shape(model: ModelConfig) -> ModelShape | None:
    """Return the initial model's shape; None if it is neither on this machine nor in the table, or of another kind."""
    if model.generated is not None:
        return _generated(model.generated)
    name = str(model.name_or_path)
    file = model_file(name, "config.json", model.revision)
    if file is None:
        return KNOWN_SHAPES.get(name)
    try:
        return shape_from_config(json.loads(file.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading the model reports what is wrong with its file


def models_read(spec: SweepSpec) -> list[tuple[str, str | None]]:
    """Return name and revision of every model that the sweep reads, searched ones and the judge's included."""
    base = spec.base.model
    found: dict[tuple[str, str | None], None] = {}
    for name in (base.name_or_path, *spec.search.listed_values("model.name_or_path")):
        if isinstance(name, str):
            found[name, base.revision] = None
    if base.tokenizer is not None:
        found[base.tokenizer, None] = None
    if spec.judge is not None and spec.judge.reward_model is not None:
        found[spec.judge.reward_model.name_or_path, spec.judge.reward_model.revision] = None
    return list(found)


def check_models(spec: SweepSpec) -> None:
    """Raise ModelError where a file of a model that the sweep reads is damaged, absent or incomplete."""
    for name, revision in models_read(spec):
        check_model_files(name, revision)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape | None:
    """Return the shape in a config.json; None for an architecture without a formula here."""
    kind, heads = config.get("model_type"), config["num_attention_heads"]
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"):
        return None
    if config.get("mlp_bias") or (kind in ("llama", "qwen3") and config.get("attention_bias")):
        return None
    return ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", kind == "gemma2"),
        qkv_bias=kind == "qwen2",
        norms=4 if kind == "gemma2" else 2,
        head_norms=kind == "qwen3",
        fused=kind == "phi3",
        softcap=bool(config.get("final_logit_softcapping", kind == "gemma2")),
    )


def _generated(model: GeneratedModel) -> ModelShape | None:
    described = model.model_dump() | {"model_type": model.architecture, "tie_word_embeddings": True}
    return shape_from_config(described | {"head_dim": model.hidden_size // model.num_attention_heads})


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows for training and evaluation before invalid ones are dropped; None: unknown until downloaded."""

    train: int | None
    eval: int | None
    exact: bool
    """False if the held-out part is split off by prompt, so that its size is approximate."""


def count_rows(data: DataConfig) -> RowCounts:
    """Count the rows of a data configuration; of hub data sets only if they are in the cache of this machine."""
    train = _mixed_count(data.train)
    if data.eval is not None:
        return RowCounts(
            _limited(train, data.max_train_rows), _limited(_mixed_count(data.eval), data.max_eval_rows), exact=True
        )
    if train is None:
        return RowCounts(None, None, exact=False)
    # As `held_out_prompts` does: of two rows or more at least one, and never all.
    held_out = min(max(1, round(train * data.eval_share)), train - 1) if train > 1 else 0
    return RowCounts(
        _limited(train - held_out, data.max_train_rows), _limited(held_out, data.max_eval_rows), exact=False
    )


def _mixed_count(sources: tuple[Source, ...]) -> int | None:
    counts = [_count_source(source) for source in sources]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    from trainer.data.mixing import rows_per_source

    return sum(rows_per_source(known, [source.weight for source in sources]))


def _limited(count: int | None, limit: int | None) -> int | None:
    return count if count is None or limit is None else min(count, limit)


def _count_source(source: Source) -> int | None:
    match source:
        case GeneratedSource(rows=rows):
            return rows
        case FileSource(path=path):
            return _rows_in_file(Path(path))
        case HubSource():
            return _cached_rows(source)


def _rows_in_file(path: Path) -> int | None:
    try:
        match path.suffix.lower():
            case ".jsonl":
                with path.open("rb") as file:
                    return sum(1 for line in file if line.strip())
            case ".csv":
                with path.open(encoding="utf-8", newline="") as file:
                    return max(0, sum(1 for row in csv.reader(file) if row) - 1)
            case ".json":
                return len(json.loads(path.read_bytes()))
            case ".parquet":
                from pyarrow.parquet import ParquetFile

                return ParquetFile(path).metadata.num_rows
            case _:
                return None
    except (OSError, ValueError, csv.Error, TypeError):
        # The data check before the first trial reports what is wrong with the file and where.
        return None


def _cached_rows(source: HubSource) -> int | None:
    """Read the row count from the cache of the `datasets` library."""
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    root = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    name = source.dataset.replace("/", "___").lower()
    for found in sorted(root.glob("*")) if root.is_dir() else []:
        if found.name.lower() != name:
            continue
        for info in sorted(found.glob("*/*/*/dataset_info.json")):
            if source.subset is not None and info.parents[2].name != source.subset:
                continue
            try:
                splits = json.loads(info.read_bytes()).get("splits") or {}
            except (OSError, ValueError):
                continue
            if source.split in splits:
                return splits[source.split].get("num_examples")
    return None
