"""The synthetic task's tokenizer, small models with random weights, and tiny models after big ones. No network.

`tiny_model_like` makes a tiny random model of a big model's architecture with a given tokenizer, for rehearsals.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

from trainer.config.trial import Architecture, GeneratedModel, GeneratedSource
from trainer.results import ModelError
from trainer.storage.atomic_files import FileLock, digest_of, write_folder
from trainer.synthetic.instructions import VERSION as TASK_VERSION
from trainer.synthetic.instructions import generate_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

VERSION = 1
"""Of tokenizer and model making; part of the folder's name."""

BOS, EOS, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_CLASS_TOKENS: dict[str, tuple[str, ...]] = {"qwen2": ("<|endoftext|>",)}
"""AutoTokenizer loads these with a class of their own, which would add such a token behind the vocabulary."""
_TOKENIZER_ROWS = 3000


def _train_tokenizer(vocab_size: int, more: tuple[str, ...], folder: Path) -> None:
    """Byte-level BPE with single digits, trained on the task's training text; written as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = generate_rows(GeneratedSource(generated="instructions", rows=_TOKENIZER_ROWS, seed=0))
    texts = [row[field][0]["content"] for row in rows for field in ("prompt", "chosen", "rejected")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    specials = [PAD, BOS, EOS, *ROLES, *more]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(specials) + len(alphabet)
    if vocab_size < smallest:
        raise ModelError(f"model.generated.vocab_size {vocab_size} cannot hold every byte; the least is {smallest}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))


def _config(config: GeneratedModel, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    from transformers import AutoConfig

    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.hidden_size**-0.5,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.architecture == "gemma2":
        shape["query_pre_attn_scalar"] = shape["head_dim"]  # its default belongs to heads of 256
    return AutoConfig.for_model(config.architecture, **shape)


def write_random_model(config: PretrainedConfig, seed: int, folder: Path) -> None:
    """Random weights in float32 as safetensors; the caller's random state is left as it was."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(str(folder))
    finally:
        if shown:
            logging.enable_progress_bar()


def generate_model(config: GeneratedModel, cache: Path) -> Path:
    """A folder with model and tokenizer that `AutoModelForCausalLM` and `AutoTokenizer` load without a network.

    Made once per content under `cache/models/`; the same configuration gives the same bytes. ModelError for a
    vocabulary too small to hold every byte.
    """
    key = digest_of({"model": config.model_dump(mode="json"), "task": TASK_VERSION, "version": VERSION})[:16]
    folder = cache / "models" / f"{config.architecture}-{key}"
    if folder.exists():
        return folder
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            write_folder(folder, lambda temporary: _write_model(config, temporary))
    return folder


def _write_model(config: GeneratedModel, folder: Path) -> None:
    from transformers import AutoTokenizer

    _train_tokenizer(config.vocab_size, _CLASS_TOKENS.get(config.architecture, ()), folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    write_random_model(_config(config, config.vocab_size, tokenizer), config.seed, folder)


ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

_NAMES: dict[str, Architecture] = {
    "tulu": "llama",
    "vicuna": "llama",
    "llama": "llama",
    "zephyr": "mistral",
    "mistral": "mistral",
    "gemma-2": "gemma2",
    "gemma2": "gemma2",
    "qwen3": "qwen3",
    "qwen2": "qwen2",
    "qwen1.5": "qwen2",
}
_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "max_window_layers": 2,
}


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """What a tiny model takes after, and a sentence on how that is known. `config` only where it could be read."""

    architecture: Architecture
    config: PretrainedConfig | None
    explanation: str


def detect_architecture(name_or_path: str, revision: str | None = None) -> ModelArchitecture:
    """The architecture of a model: from its configuration in a folder, the hub's cache or a reachable hub, else guessed
    from its name, else llama; `said` tells which. ModelError for a configuration of an architecture not rehearsed here.
    """
    config = _config_of(name_or_path, revision)
    if config is not None:
        known: dict[str, Architecture] = {a: a for a in ARCHITECTURES}
        kind = known.get(config.model_type)
        if kind is None:
            raise ModelError(
                f"{name_or_path} is a {config.model_type} model; rehearsals know {', '.join(ARCHITECTURES)}"
            )
        return ModelArchitecture(kind, config, f"{name_or_path} is a {kind} model, as its configuration says")
    lower = name_or_path.lower()
    for part, kind in _NAMES.items():
        if part in lower:
            return ModelArchitecture(
                kind, None, f"no hub is reachable; {name_or_path} is taken for a {kind} model by its name"
            )
    return ModelArchitecture(
        "llama", None, f"no hub is reachable and the name says nothing; {name_or_path} is rehearsed as llama"
    )


def _config_of(name: str, revision: str | None) -> PretrainedConfig | None:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise ModelError(f"{name} holds no model configuration that can be read: {error}") from error
        if not _hub_reachable():
            return None
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def _hub_reachable(seconds: float = 3.0) -> bool:
    """A quick look before a client that would retry for half a minute; behind a proxy the client has to find out."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=seconds).close()
    except OSError:
        return False
    return True


def tiny_model_like(
    architecture: Architecture | PretrainedConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> Path:
    """Write model and tokenizer into `folder`, replacing what is there: two layers of width 64, random weights,
    the tokenizer's vocabulary; the rest (rotary settings, windows, soft caps, tied weights) as in `architecture`.
    """

    def write(temporary: Path) -> None:
        from transformers import AutoTokenizer

        # some architectures load any tokenizer with a class of their own, which may add tokens: what comes back counts
        tokenizer.save_pretrained(str(temporary))
        _tiny_config(architecture, tokenizer).save_pretrained(str(temporary))
        write_random_model(_tiny_config(architecture, AutoTokenizer.from_pretrained(str(temporary))), seed, temporary)

    write_folder(folder, write)
    return folder


def _tiny_config(architecture: Architecture | PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    from transformers import AutoConfig

    base = AutoConfig.for_model(architecture) if isinstance(architecture, str) else architecture
    # layer_types lists every layer, and names and dtypes are the big model's: all are made anew
    remaining = {
        k: v for k, v in base.to_dict().items() if k not in {"layer_types", "model_type", "_name_or_path", "dtype"}
    }
    tiny = {k: v for k, v in _TINY.items() if k in remaining}
    own = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return AutoConfig.for_model(base.model_type, **(remaining | tiny | own))
