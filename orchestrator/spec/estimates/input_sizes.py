"""Sizes of a sweep's inputs without loading, downloading or tokenizing them.

A model's shape comes from its config.json, its description or `published_sizes`, rows from files, caches or that table.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.spec.estimates.published_sizes import KNOWN_SHAPES, PUBLISHED_DATASETS, ModelShape, PublishedDataset
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.hub_cache import model_file
from trainer.config.model_folder import check_model_files, check_tokenizer_files, check_whole_model
from trainer.config.trial import DataConfig, FileSource, GeneratedModel, GeneratedSource, HubSource, ModelConfig, Source


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
        check_model(spec, name, revision)


def check_model(spec: SweepSpec, name: str, revision: str | None) -> None:
    """Check the files of one of `models_read`: weights of a model, and the tokenizer where it is read from there.

    Raises ModelError with the file or folder and what to do.
    """
    tokenizer, judge = spec.base.model.tokenizer, spec.judge
    scores = judge is not None and judge.reward_model is not None and judge.reward_model.name_or_path == name
    models = (spec.base.model.name_or_path, *spec.search.listed_values("model.name_or_path"))
    if scores or name in models:
        check_whole_model(name, revision)
    else:
        check_model_files(name, revision)
    if scores or tokenizer in (None, name):
        check_tokenizer_files(name)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape | None:
    """Return the shape in a config.json; None for an architecture without a formula here."""
    kind = config.get("model_type")
    if kind == "gemma3":  # beside a vision tower, which text does not pass through
        inner = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
        shape = shape_from_config(inner | config["text_config"] | {"model_type": "gemma3_text"})
        return None if shape is None else replace(shape, tower=_tower_parameters(config["vision_config"], shape.hidden))
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3"):
        return None
    if config.get("mlp_bias") or (
        kind in ("llama", "qwen3", "gemma3_text", "smollm3") and config.get("attention_bias")
    ):
        return None
    gemma, heads = kind in ("gemma2", "gemma3_text"), config["num_attention_heads"]
    return ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", gemma or kind == "smollm3"),
        qkv_bias=kind == "qwen2",
        norms=4 if gemma else 2,
        head_norms=kind in ("qwen3", "gemma3_text"),
        fused=kind == "phi3",
        softcap=bool(config.get("final_logit_softcapping", kind == "gemma2")),
    )


def _tower_parameters(vision: Mapping[str, Any], text_hidden: int) -> int:
    """Weights of a SigLIP tower and of Gemma 3's projector."""
    hidden, inner, layers = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    patch = vision["patch_size"]
    embedding = 3 * patch**2 * hidden + hidden + (vision["image_size"] // patch) ** 2 * hidden
    layer = 4 * (hidden + 1) * hidden + 2 * hidden * inner + hidden + inner + 4 * hidden
    return embedding + layers * layer + 2 * hidden + hidden * (text_hidden + 1)


def _generated(model: GeneratedModel) -> ModelShape | None:
    described = model.model_dump() | {"model_type": model.architecture, "tie_word_embeddings": True}
    return shape_from_config(described | {"head_dim": model.hidden_size // model.num_attention_heads})


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows for training and evaluation before invalid ones are dropped; None: unknown until downloaded."""

    train: int | None
    eval: int | None
    exact: bool
    """False if the held-out part is split off by prompt, so that its size is approximate, or if it is published."""
    published: tuple[str, ...] = ()
    """Data sets whose rows were not counted here, each with the source of its published number."""


def count_rows(data: DataConfig, *, use_published: bool = False) -> RowCounts:
    """Count the rows of a data configuration.

    Of hub data sets only if they are in the cache of this machine or, with `use_published`, in PUBLISHED_DATASETS.
    """
    train = _mixed_count(data.train, use_published)
    published: tuple[str, ...] = ()
    if use_published:
        sources = (*data.train, *(data.eval or ()))
        found = {s.dataset: p for s in sources if isinstance(s, HubSource) and (p := _published(s)) is not None}
        published = tuple(f"{name} ({dataset.source})" for name, dataset in found.items())
    if data.eval is not None:
        held_out = _mixed_count(data.eval, use_published)
        exact = not published
    elif train is None:
        return RowCounts(None, None, exact=False)
    else:
        # As `held_out_prompts` does: of two rows or more at least one, and never all.
        held_out = min(max(1, round(train * data.eval_share)), train - 1) if train > 1 else 0
        train, exact = train - held_out, False
    held_out = _limited(held_out, data.max_eval_rows)
    if data.confirm_share is not None and held_out is not None:  # divided by prompt too
        held_out, exact = round(held_out * (1 - data.confirm_share)), False
    return RowCounts(_limited(train, data.max_train_rows), held_out, exact, published)


def _published(source: Source) -> PublishedDataset | None:
    """Return the entry in PUBLISHED_DATASETS of a data set that is not in the cache of this machine."""
    if not isinstance(source, HubSource) or source.subset is not None:
        return None
    found = PUBLISHED_DATASETS.get(source.dataset)
    return found if found is not None and source.split in found.rows and _cached_rows(source) is None else None


@dataclass(frozen=True, slots=True)
class PublishedTokens:
    """Mean tokens of a training pair, with the prompt twice, and the data sets that they are published for."""

    per_pair: int
    sources: tuple[str, ...]


def published_tokens(data: DataConfig) -> PublishedTokens | None:
    """Return the published tokens of a training pair, at most twice `max_length`; None if one data set has none."""
    names = [source.dataset if isinstance(source, HubSource) else "" for source in data.train]
    found = {name: PUBLISHED_DATASETS[name] for name in names if name in PUBLISHED_DATASETS}
    if len(found) < len(set(names)):
        return None
    mean = sum(found[name].tokens_per_pair for name in names) / len(names)
    sources = tuple(f"{name} ({dataset.source})" for name, dataset in found.items())
    return PublishedTokens(min(2 * data.max_length, round(mean)), sources)


def _mixed_count(sources: tuple[Source, ...], use_published: bool) -> int | None:
    counts = [_count_source(source, use_published) for source in sources]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    from trainer.data.mixing import rows_per_source

    return sum(rows_per_source(known, [source.weight for source in sources]))


def _limited(count: int | None, limit: int | None) -> int | None:
    return count if count is None or limit is None else min(count, limit)


def _count_source(source: Source, use_published: bool) -> int | None:
    match source:
        case GeneratedSource(rows=rows):
            return rows
        case FileSource(path=path):
            return _rows_in_file(Path(path))
        case HubSource():
            published = _published(source) if use_published else None
            return _cached_rows(source) if published is None else published.rows[source.split]


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
