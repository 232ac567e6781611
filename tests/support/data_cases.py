"""Tokenizers and configurations small enough for the data tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainer.config.trial import DataConfig, ModelConfig
from trainer.data.formats import Preference, to_preference
from trainer.data.tokenization import EncodedPair, PairTokenizer

REAL = Path(__file__).parents[2].parent / "shared" / "data"
"""Real preference data, where it lies beside the checkout."""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] | trim }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}{% endfor %}"
)
"""Without a system role, and without anything before an answer."""


def trl_template(name: str) -> str:
    """One of the templates of real models that come with TRL, such as qwen3, llama3 or gemma."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer(
    template: str | None = CHATML,
    eos: str = "<|im_end|>",
    adds_bos: bool = False,
    merges: Sequence[str] = (),
    more: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Byte-level, a token per byte but for `merges` (pairs written "a b") and special tokens, to which `more` adds."""
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *more]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet, *("".join(m.split()) for m in merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[(m.split()[0], m.split()[1]) for m in merges]))
    bpe.add_special_tokens(specials)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    made.chat_template = template
    return made


def saved(made: PreTrainedTokenizerFast, folder: Path) -> ModelConfig:
    """A model configuration whose tokenizer is this one."""
    made.save_pretrained(str(folder))
    return ModelConfig(name_or_path="unused", tokenizer=str(folder))


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat_message(role: str, content: Any) -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content}


def chat(ask: str, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    """A conversational row with an explicit prompt."""
    return {
        "prompt": [chat_message("user", ask)],
        "chosen": [chat_message("assistant", chosen)],
        "rejected": [chat_message("assistant", rejected)],
        **more,
    }


def plain(ask: str, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    """A plain row with an explicit prompt."""
    return {"prompt": ask, "chosen": chosen, "rejected": rejected, **more}


def preference(row: dict[str, Any], **rules: Any) -> Preference:
    """The row's pair, of a row that is one."""
    found = to_preference(row, **rules)
    assert isinstance(found, Preference), found
    return found


def encode(made: Any, row: dict[str, Any], **config: Any) -> EncodedPair:
    """Its token ids, as these settings of data say."""
    rules = DataConfig.model_validate({"train": "unused", "max_length": 10_000} | config)
    pair = preference(row, score=rules.score, apply_template=rules.apply_template)
    return PairTokenizer(made, rules)([pair])[0]


def good_rows(count: int, word: str = "ask") -> list[dict[str, Any]]:
    """Rows nothing is wrong with, each with a prompt of its own."""
    return [chat(f"{word} {i}", f"yes {i}", f"no {i}") for i in range(count)]


def data(train: Any, **more: Any) -> DataConfig:
    """A data configuration from plain values."""
    return DataConfig.model_validate({"train": train, "max_length": 256} | more)
