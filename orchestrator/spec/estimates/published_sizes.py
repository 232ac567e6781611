"""Published sizes of the models and data sets of sweeps/, so that a plan needs neither a hub nor a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Shape of a decoder-only transformer with gated feed-forward layers, such as Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    """Whether the output layer shares the embedding's weights."""
    qkv_bias: bool = False
    norms: int = 2
    """Norms over the hidden size per layer."""
    head_norms: bool = False
    """Whether queries and keys are normalized per head (Qwen 3, Gemma 3)."""
    softcap: bool = False
    fused: bool = False
    """Whether queries, keys and values come from one layer, and gate and up from one (Phi 3)."""
    tower: int = 0
    """Weights of a vision tower and its projector (Gemma 3), which text does not pass through."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each linear layer of one decoder layer."""
        wide, narrow, feed = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        hidden = self.hidden
        if self.fused:
            return (hidden, wide + 2 * narrow), (wide, hidden), (hidden, 2 * feed), (feed, hidden)
        return (
            (hidden, wide),
            (hidden, narrow),
            (hidden, narrow),
            (wide, hidden),
            (hidden, feed),
            (hidden, feed),
            (feed, hidden),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers, which are quantized and get adapters."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def parameters(self) -> int:
        """The exact number of weights."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = self.norms * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        ends = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden
        return self.linear_parameters + self.layers * (bias + norms) + ends + self.tower

    def adapters(self, rank: int) -> int:
        """Return the weights of low-rank adapters of this rank on all linear layers."""
        return self.layers * rank * sum(i + o for i, o in self.linears)


_LLAMA3_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128256)
_MISTRAL_7B = ModelShape(4096, 32, 32, 8, 128, 14336, 32000)
_LLAMA3_70B = ModelShape(8192, 80, 64, 8, 128, 28672, 128256)

KNOWN_SHAPES = {
    "princeton-nlp/Llama-3-Base-8B-SFT": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA3_8B,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "google/gemma-2-9b-it": ModelShape(3584, 42, 16, 8, 256, 14336, 256000, tied=True, norms=4, softcap=True),
    "meta-llama/Llama-3.2-1B-Instruct": ModelShape(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "meta-llama/Llama-3.2-3B-Instruct": ModelShape(3072, 28, 24, 8, 128, 8192, 128256, tied=True),
    "Qwen/Qwen3-0.6B": ModelShape(1024, 28, 16, 8, 128, 3072, 151936, tied=True, head_norms=True),
    "Qwen/Qwen3-1.7B": ModelShape(2048, 28, 16, 8, 128, 6144, 151936, tied=True, head_norms=True),
    "Qwen/Qwen3-4B": ModelShape(2560, 36, 32, 8, 128, 9728, 151936, tied=True, head_norms=True),
    "google/gemma-3-1b-it": ModelShape(1152, 26, 4, 1, 256, 6912, 262144, tied=True, norms=4, head_norms=True),
    "google/gemma-3-4b-it": ModelShape(
        2560, 34, 8, 4, 256, 10240, 262208, tied=True, norms=4, head_norms=True, tower=419_816_304
    ),
    "HuggingFaceTB/SmolLM3-3B": ModelShape(2048, 36, 16, 4, 128, 11008, 128256, tied=True),
    "Qwen/Qwen2.5-14B-Instruct": ModelShape(5120, 48, 40, 8, 128, 13824, 152064, qkv_bias=True),
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA3_70B,
}
"""Initial models of sweeps/, from their config.json."""


NOT_COUNTED = "published, not counted here"
"""What a plan says of rows and tokens that it takes from PUBLISHED_DATASETS."""


@dataclass(frozen=True, slots=True)
class PublishedDataset:
    """A data set of the hub as others have described it: rows by split, and the mean tokens of a pair.

    `tokens_per_pair` has the prompt twice, once for each response.
    """

    rows: Mapping[str, int]
    tokens_per_pair: int
    source: str


_CARD = "rows: its card on the hub"
_VIEWER = "rows: the hub's viewer, rounded"
_OF_ULTRAFEEDBACK = (
    "tokens: the UltraFeedback paper, arXiv 2310.01377, 185 of a prompt and 305 of a response, not looked up again; "
    "the card's size in bytes gives 900 a pair"
)
_ON_POLICY = (
    "tokens: by the card of snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset, the same prompts answered five times by "
    "Mistral-7B-Instruct: 14.0 kB a row, so 370 of a response"
)

PUBLISHED_DATASETS = {
    "HuggingFaceH4/ultrafeedback_binarized": PublishedDataset(
        {"train_prefs": 61_135, "test_prefs": 2_000}, 980, f"{_CARD}; {_OF_ULTRAFEEDBACK}"
    ),
    "princeton-nlp/llama3-ultrafeedback": PublishedDataset(
        {"train": 59_900, "test": 1_960}, 1_110, f"{_VIEWER}; {_ON_POLICY}"
    ),
    "princeton-nlp/llama3-ultrafeedback-armorm": PublishedDataset(
        {"train": 59_900, "test": 1_960}, 1_110, f"{_VIEWER}; {_ON_POLICY}"
    ),
    "princeton-nlp/mistral-instruct-ultrafeedback": PublishedDataset(
        {"train": 59_700, "test": 2_990}, 1_110, f"{_VIEWER}; {_ON_POLICY}"
    ),
    "princeton-nlp/gemma2-ultrafeedback-armorm": PublishedDataset(
        {"train": 59_600, "test": 1_940}, 1_110, f"{_VIEWER}; {_ON_POLICY}"
    ),
}
"""Data sets of sweeps/ by their names on the hub."""
