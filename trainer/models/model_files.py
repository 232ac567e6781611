"""Model folders: locate, fingerprint, save and export.

The fingerprint changes with the weights and is part of every cache key. A saved model is a folder that transformers
loads: safetensors and tokenizer; adapters are merged on request. `end_token_ids` are the tokens that end a completion.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.hub_cache import cached_file, model_file
from trainer.config.model_folder import check_model_files
from trainer.config.trial import ModelConfig
from trainer.environment import has_adapters, keep_deepspeed_off_stdout
from trainer.randomness import as_configured
from trainer.results import ModelError
from trainer.storage.atomic_files import sha256_of, write_folder
from trainer.synthetic import generate_model

if TYPE_CHECKING:
    from peft import PeftModel


def resolve_model_path(config: ModelConfig, cache: Path) -> str:
    """Return the folder or hub name of the initial model; a generated model is created in `cache` first."""
    if config.generated is not None:
        return str(generate_model(config.generated, cache))
    assert config.name_or_path is not None
    return config.name_or_path


def model_fingerprint(config: ModelConfig, path: str) -> str:
    """Return the fingerprint of the initial model.

    For a folder: a digest of its safetensors, config.json and Python code. For a hub model: its commit, which is known
    once the model was loaded; before that, its revision.
    """
    folder = Path(path)
    if folder.is_dir():
        files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
        if "auto_map" in json.loads(files[-1].read_text(encoding="utf-8")):  # its Python code defines the computation
            files += sorted(folder.rglob("*.py"))
        return f"sha256:{sha256_of(files)}"
    cached = cached_file(path, "config.json", config.revision)
    commit = (config.revision or "main") if cached is None else cached.parent.name
    return f"hub:{path}@{commit}"


def weight_files(config: ModelConfig, path: str) -> list[Path]:
    """Return the safetensors files of a loaded initial model: of its folder, or of its commit in the hub cache."""
    found = model_file(path, "config.json", config.revision)
    return [] if found is None else sorted(found.parent.glob("*.safetensors"))


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, extra_end_tokens: Sequence[int] = ()
) -> list[int]:
    """Return the ids of all tokens that end a completion, ascending: the model's, the tokenizer's, the extra ones."""
    configured: int | list[int] | None = getattr(model.generation_config, "eos_token_id", None)
    model_ends = [configured] if isinstance(configured, int) else (configured or [])
    return sorted({*model_ends, cast(int, tokenizer.eos_token_id), *extra_end_tokens})


ADAPTER_CONFIG = "adapter_config.json"
BASE_FOLDER = "base"
"""Folder inside an export of adapters for their base model, if that lies in a folder that may be emptied."""
_GENERATION = "generation_config.json"
_OF_ADAPTERS = (ADAPTER_CONFIG, "adapter_model*.safetensors*", "README.md")


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    extra_end_tokens: Sequence[int] = (),
) -> None:
    """Write the model (only its adapters, if it has some) and its tokenizer into `folder`, atomically.

    Args:
        model: The trained model.
        tokenizer: The tokenizer, with the chat template of training.
        folder: The new folder; an existing one of that name is replaced.
        tensors: The full state by name, if the model holds only shards of it.
        extra_end_tokens: Further end tokens of the training data's responses, added to `generation_config.json`.
    """
    keep_deepspeed_off_stdout()
    state = None if tensors is None else dict(tensors)

    def write(temporary: Path) -> None:
        """Write weights or adapters, tokenizer and end tokens into the temporary folder."""
        core = cast(PreTrainedModel, model.get_base_model()) if has_adapters(model) else model
        if has_adapters(model):
            # "auto" would query the hub whether the vocabulary grew; it never does here.
            model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=state)
        else:
            with as_configured(model):
                model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        _write_end_tokens(core, tokenizer, extra_end_tokens, temporary)

    write_folder(folder, write)


def _write_end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, extra_end_tokens: Sequence[int], folder: Path
) -> None:
    """Add the end tokens of the training data to the generation settings, and leave the other settings unchanged."""
    own: GenerationConfig | None = getattr(model, "generation_config", None)
    if own is None:
        return
    path = folder / _GENERATION
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8") if path.exists() else own.to_json_string())
    end_tokens = end_token_ids(model, tokenizer, extra_end_tokens)
    settings["eos_token_id"] = end_tokens[0] if len(end_tokens) == 1 else end_tokens
    settings.pop("_from_model_config", None)  # otherwise older versions of transformers use the config's end token
    # Not by `save_pretrained`: transformers refuses to save settings of published models that it would only warn about.
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Exported:
    """A written model folder that is not renamed to its final name yet. `base`: the base model of adapters."""

    folder: Path
    base: str | None = None
    revision: str | None = None


def export_model(
    source: Path,
    folder: Path,
    *,
    merge: bool = False,
    model: ModelConfig | None = None,
    temporary: Path | None = None,
    trust_remote_code: bool = False,
    check: Callable[[Exported], None] | None = None,
) -> None:
    """Copy a saved model into the new folder `folder`; with `merge`, merge its adapters into the base model.

    Args:
        source: A folder written by `save_model`.
        folder: A folder that does not exist yet.
        merge: Whether to merge adapters into one whole model.
        model: How the initial model was loaded for training; by default the dtype of its files.
        temporary: A folder that may be emptied: a base model inside it is copied into `folder`/base.
        trust_remote_code: Whether Python code that comes with the model may run.
        check: Called with the files before the folder gets its final name; if it raises, nothing is left.

    Raises:
        ModelError: `folder` exists, `source` has no model, or the adapters' base cannot be loaded.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists already; nothing is overwritten")
    if not any(source.glob("*.safetensors")):
        raise ModelError(f"{source} has no saved model")

    check_model_files(str(source))

    def write(target: Path) -> None:
        """Copy the model into the temporary folder `target`, adapters merged or with their base's location."""
        adapted = (source / ADAPTER_CONFIG).exists()
        from trainer.models.adapter_merging import merge_adapters, present_base  # peft takes a second to load

        base = present_base(source, model, temporary) if adapted else None
        if merge and adapted:
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_OF_ADAPTERS))
            model_to_save = merge_adapters(source, model, base=base, trust_remote_code=trust_remote_code)
            generation = _read_if_exists(target / _GENERATION)
            model_to_save.save_pretrained(target)
            if generation is not None:
                (target / _GENERATION).write_bytes(generation)
        else:
            shutil.copytree(source, target, dirs_exist_ok=True)
        written = Exported(target)
        if base is not None and not merge:
            written = _with_base(target, base, folder, temporary, needed=check is not None)
        if check is not None:
            check(written)

    write_folder(folder, write)


def _read_if_exists(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _with_base(target: Path, where: str, final: Path, temporary: Path | None, *, needed: bool) -> Exported:
    """Return the copied adapters of the base `where`; also copy it if it lies in a folder that may be emptied."""
    path = target / ADAPTER_CONFIG
    adapter_config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    base = Path(where)
    if where != adapter_config["base_model_name_or_path"]:
        adapter_config["base_model_name_or_path"] = where
        path.write_text(json.dumps(adapter_config, indent=2, sort_keys=True), encoding="utf-8")
    is_temporary = temporary is not None and base.is_absolute() and base.resolve().is_relative_to(temporary.resolve())
    if (needed or is_temporary) and base.is_absolute() and not base.is_dir():
        from trainer.models.adapter_merging import BaseGone

        raise BaseGone(str(base))
    if not is_temporary:
        return Exported(target, str(base), adapter_config.get("revision"))
    shutil.copytree(base, target / BASE_FOLDER)
    adapter_config |= {"base_model_name_or_path": str(final.absolute() / BASE_FOLDER), "revision": None}
    path.write_text(json.dumps(adapter_config, indent=2, sort_keys=True), encoding="utf-8")
    return Exported(target, str(target / BASE_FOLDER))
