"""A trained model as a folder that transformers loads: safetensors, tokenizer, adapters merged on request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.errors import ModelError
from trainer.randomness import as_configured
from trainer.storage.durable import write_folder
from trainer.zero3 import keep_off_stdout


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    to: Path,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model (adapters only, where it has them) and its tokenizer into `to`, whole or not at all.

    tensors: its whole state by name, where the model itself has only slices of it.
    """
    keep_off_stdout()
    state = None if tensors is None else dict(tensors)

    def fill(aside: Path) -> None:
        if isinstance(model, PeftModel):
            # "auto" would ask the hub whether the vocabulary grew; it never does here.
            model.save_pretrained(str(aside), save_embedding_layers=False, state_dict=state)
        else:
            with as_configured(model):
                model.save_pretrained(aside, state_dict=state)
        tokenizer.save_pretrained(aside)

    write_folder(to, fill)


def export_model(source: Path, to: Path, *, merge: bool = False) -> None:
    """Copy a saved model into the new folder `to`; with `merge`, adapters are added into their base's weights.

    ModelError where `to` exists, `source` holds no model, or the adapters' base can no longer be loaded.
    """
    if to.exists():
        raise ModelError(f"{to} exists already; nothing is overwritten")
    if not any(source.glob("*.safetensors")):
        raise ModelError(f"{source} holds no saved model")
    adapters = source / "adapter_config.json"
    if not (merge and adapters.exists()):
        write_folder(to, lambda aside: _copy(source, aside))
        return
    said = json.loads(adapters.read_text(encoding="utf-8"))
    name, revision = str(said["base_model_name_or_path"]), said.get("revision")
    try:
        base = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as why:
        raise ModelError(f"the base model {name} of these adapters cannot be loaded: {why}") from why
    merged = PeftModel.from_pretrained(base, str(source)).merge_and_unload()  # pyright: ignore[reportCallIssue]
    save_model(merged, AutoTokenizer.from_pretrained(source), to)


def _copy(source: Path, to: Path) -> None:
    shutil.copytree(source, to, dirs_exist_ok=True)
