"""Model folders: locate, fingerprint, save and export.

The fingerprint changes with the weights and is part of every cache key. A saved model is a folder that transformers
loads: safetensors and tokenizer, adapters merged on request. `end_token_ids`: the tokens that end a completion.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config.hub_cache import cached_file, model_file
from trainer.config.trial import ModelConfig
from trainer.environment import keep_deepspeed_off_stdout
from trainer.models.adapter_merging import BaseGone, merged
from trainer.randomness import as_configured
from trainer.results import ModelError
from trainer.storage.atomic_files import sha256_of, write_folder
from trainer.synthetic import generate_model


def resolve_model_path(config: ModelConfig, cache: Path) -> str:
    """Where the initial model is: the folder it was generated into, or the configured folder or hub name."""
    if config.generated is not None:
        return str(generate_model(config.generated, cache))
    assert config.name_or_path is not None
    return config.name_or_path


def model_fingerprint(config: ModelConfig, path: str) -> str:
    """Return the initial model's fingerprint.

    The digest of a folder's safetensors, config.json and own code, or a hub model's commit.
    A hub model must have been loaded before, so that its commit is known; without one the revision stands for it.
    """
    folder = Path(path)
    if folder.is_dir():
        files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
        if "auto_map" in json.loads(files[-1].read_text(encoding="utf-8")):  # its own code computes
            files += sorted(folder.rglob("*.py"))
        return f"sha256:{sha256_of(files)}"
    cached = cached_file(path, "config.json", config.revision)
    commit = (config.revision or "main") if cached is None else cached.parent.name
    return f"hub:{path}@{commit}"


def weight_files(config: ModelConfig, path: str) -> list[Path]:
    """The safetensors files of an initial model that was loaded: its folder's, or its commit's in the hub cache."""
    found = model_file(path, "config.json", config.revision)
    return [] if found is None else sorted(found.parent.glob("*.safetensors"))


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int] = ()) -> list[int]:
    """Ids of the tokens that end an answer: the model's own, the tokenizer's and `stops`, in ascending order."""
    configured: int | list[int] | None = getattr(model.generation_config, "eos_token_id", None)
    several = [configured] if isinstance(configured, int) else (configured or [])
    return sorted({*several, cast(int, tokenizer.eos_token_id), *stops})


ADAPTER_CONFIG = "adapter_config.json"
BASE_FOLDER = "base"
"""Inside an export of adapters: their base model, where its own place is one that may be emptied."""
_GENERATION = "generation_config.json"
_OF_ADAPTERS = (ADAPTER_CONFIG, "adapter_model*.safetensors*", "README.md")


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    stops: Sequence[int] = (),
) -> None:
    """Write the model (adapters only, where it has them) and its tokenizer into `folder`, whole or not at all.

    Args:
        model: As it was trained.
        tokenizer: With the chat template that was trained with.
        folder: The new folder; one of that name is replaced.
        tensors: The whole state by name, where the model itself has only slices of it.
        stops: Tokens with which the data's responses end; `generation_config.json` names them beside the model's own.
    """
    keep_deepspeed_off_stdout()
    state = None if tensors is None else dict(tensors)

    def write(temporary: Path) -> None:
        core = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
        if isinstance(model, PeftModel):
            # "auto" would ask the hub whether the vocabulary grew; it never does here.
            model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=state)
        else:
            with as_configured(model):
                model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        _write_end_tokens(core, tokenizer, stops, temporary)

    write_folder(folder, write)


def _write_end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], folder: Path
) -> None:
    """Have generation end where a turn of the training data ends. The model's own settings stay as they are."""
    own: GenerationConfig | None = getattr(model, "generation_config", None)
    if own is None:
        return
    path = folder / _GENERATION
    message: dict[str, Any] = json.loads(path.read_text(encoding="utf-8") if path.exists() else own.to_json_string())
    ends = end_token_ids(model, tokenizer, stops)
    message["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    message.pop("_from_model_config", None)  # older versions of transformers would fall back to the configuration's end
    # Written by hand: transformers refuses to save settings of a published model that it would only warn about.
    path.write_text(json.dumps(message, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Exported:
    """A model folder that was written and has not got its name yet. `base`: of adapters, what they belong to."""

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
    """Copy a saved model into the new folder `folder`; with `merge`, adapters are added into their base's weights.

    Args:
        source: What `save_model` wrote.
        folder: A folder that does not exist yet.
        merge: Of adapters, one whole model.
        model: How the initial model was loaded for training; by default as it is stored.
        temporary: A folder that may be emptied: a base model in it goes along with its adapters, in `folder`/base.
        trust_remote_code: Whether Python code that comes with the model may run.
        check: Called with the files before they get their name; what it raises leaves no `folder`.

    Raises:
        ModelError: `folder` exists, `source` holds no model, or the adapters' base can no longer be loaded.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists already; nothing is overwritten")
    if not any(source.glob("*.safetensors")):
        raise ModelError(f"{source} holds no saved model")

    def write(aside: Path) -> None:
        adapted = (source / ADAPTER_CONFIG).exists()
        if merge and adapted:
            shutil.copytree(source, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_OF_ADAPTERS))
            made = merged(source, model, trust_remote_code=trust_remote_code)
            generation = _kept(aside / _GENERATION)
            made.save_pretrained(aside)
            if generation is not None:
                (aside / _GENERATION).write_bytes(generation)
        else:
            shutil.copytree(source, aside, dirs_exist_ok=True)
        written = Exported(aside)
        if adapted and not merge:
            written = _with_base(aside, folder, temporary, needed=check is not None)
        if check is not None:
            check(written)

    write_folder(folder, write)


def _kept(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _with_base(aside: Path, to: Path, temporary: Path | None, *, needed: bool) -> Exported:
    """The copied adapters, and their base model beside them where it could be removed."""
    path = aside / ADAPTER_CONFIG
    message: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    base = Path(str(message["base_model_name_or_path"]))
    there = temporary is not None and base.is_absolute() and base.resolve().is_relative_to(temporary.resolve())
    if (needed or there) and base.is_absolute() and not base.is_dir():
        raise BaseGone(str(base))
    if not there:
        return Exported(aside, str(base), message.get("revision"))
    shutil.copytree(base, aside / BASE_FOLDER)
    message |= {"base_model_name_or_path": str(to.absolute() / BASE_FOLDER), "revision": None}
    path.write_text(json.dumps(message, indent=2, sort_keys=True), encoding="utf-8")
    return Exported(aside, str(aside / BASE_FOLDER))
