"""The tokenizer of a trial, with the chat template that the configuration asks for."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import DataConfig, ModelConfig
from trainer.errors import TrialError, cannot_load
from trainer.storage.durable import digest_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class TokenizerError(TrialError):
    """The tokenizer cannot be loaded, or lacks what preference tuning needs."""


def load_tokenizer(
    model: ModelConfig, data: DataConfig | None, cache: Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer (or `model.tokenizer`), with `data.chat_template` in place of its own where given.

    `cache` is where a generated model is made. A missing pad token becomes the end token: padding is masked by
    position everywhere. TokenizerError when it cannot be loaded, is not a fast one, or has no end token. A tokenizer
    whose class comes with the model is loaded only with `trust_remote_code`.
    """
    tokenizer = _load(*_origin(model, cache), trust_remote_code)
    if data is not None and data.chat_template is not None:
        tokenizer.chat_template = template_text(data.chat_template)
    return tokenizer


def _origin(model: ModelConfig, cache: Path) -> tuple[str, str | None]:
    if model.tokenizer is not None:
        return model.tokenizer, None
    if model.generated is not None:
        from trainer.generate.model import generated_model

        return str(generated_model(model.generated, cache)), None
    assert model.name_or_path is not None
    return model.name_or_path, model.revision


def _load(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        # False and not None: transformers would ask the terminal, or read an answer from a process's input.
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise TokenizerError(cannot_load(f"the tokenizer of {name!r}", error)) from error
        reason = str(error).strip().splitlines()[0]
        raise TokenizerError(
            f"the tokenizer of {name!r} cannot be loaded: {reason}. "
            "Give a folder or a reachable hub name as model.name_or_path or model.tokenizer."
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{name!r} has no fast tokenizer (tokenizer.json); convert it, or give model.tokenizer")
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"the tokenizer of {name!r} has no eos_token: a response could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def template_text(template: str) -> str:
    """The Jinja text of `data.chat_template`: the text itself where it holds a Jinja mark, else the file's.

    TokenizerError where it is neither.
    """
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise TokenizerError(f"data.chat_template is neither Jinja text nor a file: {template!r}")
    return path.read_text(encoding="utf-8")


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """TokenizerError where dialogues cannot be rendered for want of a chat template."""
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise TokenizerError(
            "the data are dialogues (or data.apply_template is true) and the tokenizer has no chat template for them: "
            "give data.chat_template, as Jinja text or as a file with it"
        ) from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of all that decides how text becomes tokens: vocabulary, merges, special tokens, template."""
    engine: Tokenizer = tokenizer.backend_tokenizer  # pyright: ignore[reportAssignmentType]
    backend = json.loads(engine.to_str())
    # padding and truncation are the traces of earlier calls, not the tokenizer's own
    kept = {key: value for key, value in backend.items() if key not in {"padding", "truncation"}}
    described = {
        "backend": kept,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    module = type(tokenizer).__module__
    if module.startswith("transformers_modules"):  # a class of the model's own code: its methods decide too
        described["code"] = inspect.getsource(sys.modules[module])
    return digest_of(described)
