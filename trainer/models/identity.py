"""Which weights a run starts from, as a name that changes when they do: part of every cache key."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from trainer.config import ModelConfig
from trainer.generate import generated_model
from trainer.storage.durable import sha256_of


def locate(config: ModelConfig, cache: Path) -> str:
    """Where the start model is: the folder it was generated into, or the configured folder or hub name."""
    if config.generated is not None:
        return str(generated_model(config.generated, cache))
    assert config.name_or_path is not None
    return config.name_or_path


def model_identity(config: ModelConfig, place: str) -> str:
    """Name of the start model: the digest of a folder's safetensors, config.json and own code, or a hub model's commit.

    A hub model must have been loaded before, so that its commit is known; without one the revision stands for it.
    """
    folder = Path(place)
    if folder.is_dir():
        files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
        if "auto_map" in json.loads(files[-1].read_text(encoding="utf-8")):  # its own code computes
            files += sorted(folder.rglob("*.py"))
        return f"sha256:{sha256_of(files)}"
    cached = try_to_load_from_cache(place, "config.json", revision=config.revision)
    commit = Path(cached).parent.name if isinstance(cached, str) else (config.revision or "main")
    return f"hub:{place}@{commit}"


def weight_files(config: ModelConfig, place: str) -> list[Path]:
    """The safetensors files of a start model that was loaded: its folder's, or its commit's in the hub cache."""
    folder = Path(place)
    if not folder.is_dir():
        cached = try_to_load_from_cache(place, "config.json", revision=config.revision)
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    return sorted(folder.glob("*.safetensors"))
