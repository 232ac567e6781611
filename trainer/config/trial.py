"""`TrialConfig` and its sections: the complete configuration of one trial, and its fingerprint.

Frozen types without torch, since `plan` and `--help` import this module. Defaults are defined here only. Names are
Hugging Face's, else the papers'. Equal configurations have equal fingerprints.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from trainer.config.base import (
    Fraction,
    FrozenModel,
    LaterFields,
    NonEmptyStr,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from trainer.config.loss_config import LossConfig, SimpoLoss
from trainer.config.trl_support import EngineName, pairs_per_micro_batch, unsupported_by_trl

# --- model -----------------------------------------------------------------------------------------------------------


Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2"]


class GeneratedModel(FrozenModel):
    """A small causal LM with random weights, with a tokenizer trained on the generated task."""

    architecture: Architecture = Field(default="llama", description="The transformers architecture.")
    vocab_size: Annotated[int, Field(ge=64)] = Field(default=512, description="Tokens of its tokenizer.")
    hidden_size: PositiveInt = Field(default=128, description="Width of the hidden states.")
    intermediate_size: PositiveInt = Field(default=352, description="Width of the MLP.")
    num_hidden_layers: PositiveInt = Field(default=4, description="Layers.")
    num_attention_heads: PositiveInt = Field(default=4, description="Attention heads.")
    num_key_value_heads: PositiveInt = Field(default=4, description="Heads of keys and values.")
    max_position_embeddings: PositiveInt = Field(default=512, description="Longest sequence, in tokens.")
    seed: int = Field(default=0, description="Of the random weights.")


FUSED_ARCHITECTURES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text"}
)
"""Model types whose layers `model.kernels: liger` replaces: tests compare them with transformers' own."""
LIGER_MISSING = "model.kernels: liger needs liger-kernel, which is not installed: pip install 'prefsweep[liger]'"


def unknown_architecture(kind: str) -> str:
    """Return why `model.kernels: liger` is refused for a model type that is not in `FUSED_ARCHITECTURES`."""
    return f"models of type {kind} are not among {', '.join(sorted(FUSED_ARCHITECTURES))}; write auto or none"


class ModelConfig(FrozenModel):
    """The initial model: a hub name, a folder, or a generated one. Shorthand: `model: NAME`."""

    name_or_path: NonEmptyStr | None = Field(
        default=None, description="Hub name or folder; exactly one of name_or_path and generated."
    )
    generated: GeneratedModel | None = Field(
        default=None, description="A small model with random weights, created on this machine."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    tokenizer: NonEmptyStr | None = Field(default=None, description="Hub name or folder; default: the model's own.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Dtype of the stored weights. The papers use float32 with training.bf16."
    )
    attention: Literal["auto", "packed", "separate"] = Field(
        default="auto",
        description="packed: padding-free with the prompt computed once; separate: two padded sequences.",
    )
    load_in_4bit: bool = Field(
        default=False, description="Load the base in 4 bits by bitsandbytes (NF4); with lora only."
    )
    kernels: Literal["auto", "liger", "none"] = Field(
        default="auto",
        description="Norms, rotary embeddings and MLPs. liger: fused, by liger-kernel; none: transformers' own; auto: "
        "fused on a GPU where liger-kernel is installed and knows the architecture. Equal to rounding.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the layers by torch.compile, for varying lengths: the first updates take minutes, which "
        "only long trials win back. Equal to rounding.",
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"name_or_path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if (self.name_or_path is None) == (self.generated is None):
            raise ValueError("give exactly one of name_or_path and generated")
        return self

    @property
    def can_be_sharded(self) -> bool:
        """Whether several processes can hold the weights together (FSDP2)."""
        return not self.load_in_4bit and not self.compile

    @model_validator(mode="after")
    def _check_kernels(self) -> Self:
        if self.compile and self.kernels == "liger":
            raise ValueError("compile fuses the layers itself: use either compile: true or kernels: liger")
        return self


# --- data ------------------------------------------------------------------------------------------------------------


class _WeightedSource(FrozenModel):
    weight: PositiveFloat | None = Field(
        default=None,
        description="Share of the mixture, relative to the other sources; without weights every row of every source.",
    )
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="Our field to the column of the source: {prompt: question, chosen: good}; null ignores a field: "
        "{system: null}.",
    )


class FileSource(_WeightedSource):
    """Preference rows in a local file. Shorthand: the path alone."""

    path: NonEmptyStr = Field(description="JSONL, JSON, Parquet or CSV.")


class HubSource(_WeightedSource):
    """A Hugging Face data set."""

    dataset: NonEmptyStr = Field(description="Name on the Hugging Face hub.")
    split: NonEmptyStr = Field(description="Split of the data set.")
    subset: str | None = Field(default=None, description="Configuration of the data set.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")


class GeneratedSource(FrozenModel):
    """Rows of the generated task with checkable answers (trainer/synthetic); determined by rows, split and seed."""

    generated: Literal["instructions"] = Field(description="The name of the task.")
    split: Literal["train", "eval"] = Field(
        default="train", description="Disjoint prompts for training and evaluation."
    )
    rows: PositiveInt = Field(default=2000, description="Number of rows.")
    seed: int = Field(default=0, description="Same seed, same rows.")
    weight: PositiveFloat | None = Field(default=None, description="Share of the mix, relative to the others'.")


Source = FileSource | HubSource | GeneratedSource


class DataConfig(LaterFields):
    """Preference pairs for training and evaluation, and how they are tokenized."""

    later: ClassVar[tuple[str, ...]] = ("confirm_share", "eval_on")

    train: Annotated[tuple[Source, ...], Field(min_length=1)] = Field(
        description="Preference pairs to train on: a source or a list of sources."
    )
    eval: tuple[Source, ...] | None = Field(
        default=None, description="By default eval_share of train, held out by prompt."
    )
    eval_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.1, description="Share of train's prompts that is held out where eval is not given."
    )
    apply_template: bool | None = Field(
        default=None,
        description="For plain text if the tokenizer has a chat template. true: the prompt becomes a user message and "
        "the answers assistant messages; false: the text is trained on unchanged. Must be set, unless the text already "
        "has a template's markers. No effect on dialogues.",
    )
    score: Literal["all", "last"] = Field(
        default="all",
        description="For answers of several messages. all: score every token after the prompt, as TRL does; last: only "
        "the last assistant message, with the turns before it as context.",
    )
    max_train_rows: PositiveInt | None = Field(default=None, description="Keep at most this many training rows.")
    max_eval_rows: PositiveInt | None = Field(default=None, description="Keep at most this many held-out rows.")
    confirm_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None,
        description="Share of the held-out prompts that the search does not evaluate on: finalists are confirmed on "
        "them. By default none; 0.5 with finalists.",
    )
    eval_on: Literal["search", "confirm"] = Field(
        default="search", description="Which held-out prompts are evaluated; finalists set it to confirm themselves."
    )
    max_length: Annotated[int, Field(ge=8)] = Field(default=1024, description="Tokens of prompt and response together.")
    max_prompt_length: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Longer prompts lose their oldest tokens. By default only rows longer than max_length are cut: "
        "first the prompt, down to max_length - 256 tokens (at least half of max_length), then the answers.",
    )
    chat_template: str | None = Field(default=None, description="Jinja text or a file with it; else the model's own.")
    bad_rows: Literal["refuse", "skip"] = Field(
        default="skip",
        description="Rows that cannot be trained on. skip: leave out and count up to max_bad_share of all rows; "
        "refuse: allow none.",
    )
    max_bad_share: Fraction = Field(
        default=0.01, description="With bad_rows: skip, the largest share of rows left out; more is an error."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        out = dict(value)  # pyright: ignore[reportUnknownVariableType]
        for key in ("train", "eval"):
            sources = out.get(key)
            if sources is not None:
                source_list = sources if isinstance(sources, (list, tuple)) else [sources]
                out[key] = tuple({"path": one} if isinstance(one, str) else one for one in source_list)
        return out

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        for side in (self.train, self.eval or ()):
            if len({source.weight is None for source in side}) > 1:
                raise ValueError("give every source of a mix a weight, or none of them")
        return self

    @property
    def prompt_budget(self) -> int:
        """Minimum number of tokens a prompt keeps if its row is cut; with `max_prompt_length` also the maximum."""
        if self.max_prompt_length is not None:
            return self.max_prompt_length
        return max(self.max_length - 256, self.max_length // 2)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt: without `max_prompt_length`, rows that fit keep their whole prompt."""
        return self.max_prompt_length or self.max_length - 1

    @model_validator(mode="after")
    def _check_prompt_length(self) -> Self:
        if self.prompt_budget >= self.max_length:
            raise ValueError(f"max_prompt_length {self.prompt_budget} must be below max_length {self.max_length}")
        return self


# --- training --------------------------------------------------------------------------------------------------------


ZERO3_REMOVED = (
    "zero3 (DeepSpeed) is no longer part of this program: write fsdp2, which shards weights, gradients and moments "
    "over the processes in the same way, with torch alone"
)
STORED = {"stored": True}
"""Validation context for a configuration that an earlier version stored: a value removed since is read as it is."""


def is_removed_distributed(value: object) -> bool:
    """Return whether this is a value of `training.distributed` that only sweeps of earlier versions can have."""
    return value == "zero3"


def _check_distributed(value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
    if is_removed_distributed(value):
        if info.context == STORED:
            return value
        raise ValueError(ZERO3_REMOVED)
    return handler(value)


Distributed = Annotated[Literal["ddp", "fsdp2"], WrapValidator(_check_distributed)]


class TrainingConfig(FrozenModel):
    """Optimizer, schedule, batch size and intervals."""

    learning_rate: PositiveFloat = Field(default=1e-6, description="Peak learning rate of AdamW.")
    pairs_per_update: PositiveInt = Field(
        default=128, description="Exact, independent of micro-batches and number of GPUs."
    )
    tokens_per_micro_batch: PositiveInt = Field(
        default=8192, description="Token budget of a micro-batch; no effect on results."
    )
    num_train_epochs: PositiveFloat = Field(default=1.0, description="Passes over the training pairs.")
    max_steps: PositiveInt | None = Field(default=None, description="Updates; overrides num_train_epochs.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        default="cosine", description="Shape of the learning rate after warm-up."
    )
    warmup_ratio: Fraction = Field(
        default=0.1, description="Share of the updates over which the learning rate rises from 0."
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Decoupled weight decay of AdamW.")
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.9, description="AdamW's decay rate of the first moment."
    )
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.999, description="AdamW's decay rate of the second moment."
    )
    adam_epsilon: PositiveFloat = Field(default=1e-8, description="AdamW's epsilon.")
    max_grad_norm: NonNegativeFloat = Field(default=1.0, description="0 turns clipping off.")
    bf16: bool = Field(default=False, description="Autocast to bfloat16; weights stay in model.dtype.")
    stochastic_rounding: bool = Field(
        default=True,
        description="For updates of bfloat16 weights (model.dtype: bfloat16 without lora), most of which rounding to "
        "nearest would lose; no effect on float32 weights.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, more time."
    )
    distributed: Distributed = Field(
        default="ddp",
        description="How the processes of a trial on several GPUs hold the model. ddp: each all of it; fsdp2: "
        "each a slice of weights, gradients and moments. No effect in one process.",
    )
    seed: int = Field(default=42, description="Of the data order and of whatever is random in training.")
    logging_steps: PositiveInt = Field(default=1, description="Updates between logged metrics.")
    eval_steps: PositiveInt | None = Field(
        default=None, description="Updates between evaluations; by default a tenth of the run."
    )
    save_steps: PositiveInt | None = Field(
        default=None, description="Updates between checkpoints; by default at every evaluation."
    )


class LoraConfig(FrozenModel):
    """Low-rank adapters (peft); dropout is 0 by default, as all objectives expect."""

    r: PositiveInt = Field(default=16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(default=32.0, description="Scale: adapters are multiplied by alpha / r.")
    dropout: Fraction = Field(default=0.0, description="Dropout before the adapters.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear", description="Names of the layers that get adapters, or all-linear."
    )


class EvaluationConfig(FrozenModel):
    """Evaluation in addition to the held-out pairs."""

    prompts: Annotated[int, Field(ge=0)] = Field(
        default=4,
        description="Held-out prompts completed greedily; checked if rows have `answer`.",
    )
    answer_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Updates between completions of those prompts, which cost max_new_tokens forward passes each; by "
        "default at every evaluation; 0: only at the start and the end.",
    )
    samples: Annotated[int, Field(ge=0)] = Field(default=4, description="Number of completions stored as text.")
    max_new_tokens: PositiveInt = Field(default=64, description="Longest completion, in tokens.")


class TrialConfig(FrozenModel):
    """Complete configuration of one trial; `python -m trainer trial.yaml` runs it."""

    model: ModelConfig = Field(description="The model from which every trial starts.")
    data: DataConfig = Field(description="Training and held-out pairs.")
    loss: LossConfig = Field(default=SimpoLoss(), description="The objective, by its kind.")
    training: TrainingConfig = Field(default=TrainingConfig(), description="Optimizer, schedule and intervals.")
    lora: LoraConfig | None = Field(default=None, description="Train adapters instead of all weights.")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="Answers to held-out prompts.")
    engine: EngineName = Field(
        default="packed", description="packed: padding-free updates; trl: updates by TRL's trainers."
    )

    @model_validator(mode="after")
    def _check_pairs_per_update(self) -> Self:
        if self.loss.couples_pairs and self.training.pairs_per_update < 2:
            raise ValueError(
                "this loss compares the pairs of an update with each other: pairs_per_update must be at least 2"
            )
        return self

    @model_validator(mode="after")
    def _check_sharding(self) -> Self:
        if not self.model.can_be_sharded and self.training.distributed != "ddp":
            what, setting = (
                ("weights in 4 bits", "load_in_4bit") if self.model.load_in_4bit else ("compiled layers", "compile")
            )
            raise ValueError(
                f"{what} cannot be sharded: use training.distributed ddp with model.{setting}, "
                f"not {self.training.distributed}"
            )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "trl":
            single_batch = self.pairs_per_micro_batch == self.training.pairs_per_update
            stochastic = self.training.stochastic_rounding and self.model.dtype == "bfloat16" and self.lora is None
            four = self.model.load_in_4bit
            unsupported = list(
                unsupported_by_trl(
                    self.loss, single_batch=single_batch, stochastic_rounding=stochastic, load_in_4bit=four
                )
            )
            if unsupported:
                raise ValueError("; ".join(unsupported))
        return self

    @property
    def pairs_per_micro_batch(self) -> int:
        """Pairs per micro-batch of engine trl (TRL's per_device_train_batch_size); equal for all micro-batches."""
        training = self.training
        return pairs_per_micro_batch(training.pairs_per_update, training.tokens_per_micro_batch, self.data.max_length)

    def flat_params(self) -> dict[str, Any]:
        """Return every setting by its dotted path, gamma and gamma_beta_ratio both included, as logged by tracking."""
        return flatten(self.model_dump(mode="json")) | self._equivalent_params()

    def canonical_params(self) -> dict[str, Any]:
        """Return settings that are equal for equal configurations, independent of how they are written (gamma or its
        ratio).

        Settings with default values are left out, so that a new setting of a later version changes no fingerprint.
        """
        flat = flatten(self.model_dump(mode="json", exclude_defaults=True)) | self._equivalent_params()
        flat["loss.kind"] = self.loss.kind
        return {k: float(f"{v:.12g}") if isinstance(v, float) else v for k, v in flat.items()}

    def _equivalent_params(self) -> dict[str, Any]:
        """Return settings that have two equivalent names, under both."""
        if not isinstance(self.loss, SimpoLoss):
            return {}
        weight = self.loss.cross_entropy_weight
        margin = {"loss.gamma": self.loss.gamma_value, "loss.gamma_beta_ratio": self.loss.gamma_over_beta}
        return margin | {"loss.sft_weight": weight, "loss.nll_scale": weight}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to dotted paths; lists, scalars and empty dicts are values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{path}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            out[path] = value
    return out


def config_fingerprint(config: TrialConfig) -> str:
    """Return a hash that is equal for equal configurations, independent of how they are written."""
    return hashlib.sha256(json.dumps(config.canonical_params(), sort_keys=True).encode()).hexdigest()
