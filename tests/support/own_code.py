"""A model folder whose model and tokenizer are classes of its own, as many on the hub are."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.support.small_trials import trial
from trainer.models.model_files import resolve_model_path

_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def own_code_model(cache: Path, to: Path) -> Path:
    """Write such a folder: a Llama of two small layers with the generated task's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(trial().model, cache))
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        )
    ).save_pretrained(to)  # fmt: skip
    tokenizer.save_pretrained(to)
    (to / "modeling_own.py").write_text(_MODEL)
    (to / "tokenization_own.py").write_text(_TOKENIZER)
    of_model = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    _add(to / "config.json", {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": of_model})
    of_tokenizer = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    _add(to / "tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": of_tokenizer})
    return to


def _add(file: Path, more: dict[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
