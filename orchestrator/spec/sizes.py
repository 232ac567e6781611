"""How large a model is: from its config.json, its description, or the table of models that sweeps/ starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import GeneratedModel, ModelConfig
from trainer.positions import config_files


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with gated feed-forward layers, as Llama's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    """Whether the output layer is the embedding."""
    qkv_bias: bool = False
    norms: int = 2
    """Norms of the hidden size in a layer."""
    head_norms: bool = False
    """Whether queries and keys have norms of their own (Qwen 3)."""
    softcap: bool = False

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each linear layer of one decoder layer."""
        wide, narrow, feed = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        h = self.hidden
        return (h, wide), (h, narrow), (h, narrow), (wide, h), (h, feed), (h, feed), (feed, h)

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers of the body: what is quantised and what adapters are added to."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def parameters(self) -> int:
        """All weights, exactly."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = self.norms * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        ends = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden
        return self.linear_parameters + self.layers * (bias + norms) + ends

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters on all linear layers."""
        return self.layers * rank * sum(i + o for i, o in self.linears)


_LLAMA3_8B = Shape(4096, 32, 32, 8, 128, 14336, 128256)
_MISTRAL_7B = Shape(4096, 32, 32, 8, 128, 14336, 32000)
_LLAMA3_70B = Shape(8192, 80, 64, 8, 128, 28672, 128256)

KNOWN = {
    "princeton-nlp/Llama-3-Base-8B-SFT": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA3_8B,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "google/gemma-2-9b-it": Shape(3584, 42, 16, 8, 256, 14336, 256000, tied=True, norms=4, softcap=True),
    "meta-llama/Llama-3.2-1B-Instruct": Shape(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "Qwen/Qwen2.5-14B-Instruct": Shape(5120, 48, 40, 8, 128, 13824, 152064, qkv_bias=True),
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA3_70B,
}
"""The models that sweeps/ starts from, after the config.json of each: a plan needs no hub for them."""


def shape_of(model: ModelConfig) -> Shape | None:
    """The start model's shape; None where it is not on this machine, not in the table, or not a Llama relative."""
    if model.generated is not None:
        return _generated(model.generated)
    name = str(model.name_or_path)
    file = next(iter(config_files(name, model.revision)), None)
    if file is None:
        return KNOWN.get(name)
    try:
        return from_config(json.loads(file.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever loads the model says what is wrong with its file


def from_config(config: Mapping[str, Any]) -> Shape | None:
    """The shape in a config.json; None for an architecture whose formula is not known here."""
    kind, heads = config.get("model_type"), config["num_attention_heads"]
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "gemma2"):
        return None
    if config.get("mlp_bias") or (kind in ("llama", "qwen3") and config.get("attention_bias")):
        return None
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", kind == "gemma2"),
        qkv_bias=kind == "qwen2",
        norms=4 if kind == "gemma2" else 2,
        head_norms=kind == "qwen3",
        softcap=bool(config.get("final_logit_softcapping", kind == "gemma2")),
    )


def _generated(model: GeneratedModel) -> Shape | None:
    described = model.model_dump() | {"model_type": model.architecture, "tie_word_embeddings": True}
    return from_config(described | {"head_dim": model.hidden_size // model.num_attention_heads})
