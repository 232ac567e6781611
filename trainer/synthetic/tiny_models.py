"""The synthetic task's tokenizer and small models with random weights. No network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.trial import GeneratedModel, GeneratedSource
from trainer.results import ModelError
from trainer.storage.atomic_files import digest_of, write_folder
from trainer.storage.file_lock import FileLock
from trainer.synthetic.instructions import VERSION as TASK_VERSION
from trainer.synthetic.instructions import generate_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

VERSION = 1
"""Version of tokenizer and model generation; part of the folder's name."""

BOS, EOS, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_CLASS_TOKENS: dict[str, tuple[str, ...]] = {"qwen2": ("<|endoftext|>",)}
"""Tokens that AutoTokenizer's class for an architecture would otherwise add after the vocabulary."""
_TOKENIZER_ROWS = 3000


def _train_tokenizer(vocab_size: int, more: tuple[str, ...], folder: Path) -> None:
    """Train byte-level BPE with single digits on the task's training text, and save it as a Hugging Face tokenizer."""
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
    minimum = len(specials) + len(alphabet)
    if vocab_size < minimum:
        raise ModelError(f"model.generated.vocab_size {vocab_size} is too small for all bytes; use at least {minimum}")
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
        shape["query_pre_attn_scalar"] = shape["head_dim"]  # its default is for heads of size 256
    return AutoConfig.for_model(config.architecture, **shape)


def write_random_model(config: PretrainedConfig, seed: int, folder: Path) -> None:
    """Write random weights in float32 as safetensors; the caller's random state is restored."""
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
    """Return a folder with model and tokenizer that `AutoModelForCausalLM` and `AutoTokenizer` load without a network.

    Created once per content under `cache/models/`; the same configuration gives the same bytes. Raises ModelError if
    the vocabulary is too small for all bytes.
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
