"""GPU memory of one trial by formula, and the largest micro-batch that fits. Nothing here is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from orchestrator.spec.estimates.input_sizes import ModelShape
from trainer import memory_limits
from trainer.config.loss_config import DpoLoss
from trainer.config.trial import LoraConfig, TrialConfig

GB = 10**9
_BYTES_PER_4BIT_WEIGHT = 0.516
"""Bytes per weight in NF4 with double quantization: 4 bits and 0.127 of scales (Dettmers et al. 2023)."""
_RESERVED_FRACTION = 0.1
"""Share of a GPU's memory reserved for CUDA itself and fragmentation."""
_MAX_TOKENS = 1 << 17


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the peak of an update, by use."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    """bfloat16 copies of float32 weights that autocast caches from the forward to the backward pass."""
    activations: int
    head: int
    """Logits of one chunk (engine trl: all logits) and, if the output layer is trained, its gradient in float32."""
    together: int = 0
    """Gathered weights of a sharded model: two layers, and the weights outside of the layers."""
    embedding: int = 0
    """Bytes of the embedding's gradient or the optimizer step beyond activations and head, which are freed by then."""

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(asdict(self).values())


def memory(config: TrialConfig, shape: ModelShape, tokens: int, processes: int = 1, trials: int = 1) -> Memory:
    """Return the memory of a trial on each of its GPUs; training.distributed sets what is sharded.

    Args:
        config: The trial.
        shape: Shape of its initial model.
        tokens: Tokens of a micro-batch.
        processes: Processes of the trial, each on a GPU.
        trials: Trials that take turns in one process, with adapters over one base. Each has its own adapters and
            moments; the rest exists once, as gradients and activations are freed after each turn.

    Full fine-tuning, per weight: 16 bytes in float32, 12 in bfloat16 with stochastic rounding (moments in float32), 8
    in bfloat16 without. With adapters: the base without gradients, and 16 bytes per adapter weight. A reference that
    moves (loss.sync_ref_model) is the trained weights a second time.

    An update has three peaks, of which the highest counts: the output layer, with all activations; the end of the
    backward pass, where the gradients of output layer and embedding wait to be added; the optimizer's step.
    """
    each = 4 if config.model.dtype == "float32" else 2
    linear, count = shape.linear_parameters, shape.parameters
    base = int(_BYTES_PER_4BIT_WEIGHT * linear + each * (count - linear)) if config.model.load_in_4bit else each * count
    copies = 2 if config.loss.moves_reference else 1
    if config.lora is not None:
        trained = shape.adapters(config.lora.r)
        weights, gradients, optimizer = base + trials * copies * 4 * trained, 4 * trained, trials * 8 * trained
    else:
        moments = 8 if each == 4 or config.training.stochastic_rounding else 4
        weights, gradients, optimizer = copies * base, each * count, moments * count
    autocast = config.training.bf16 and each == 4 and not config.model.load_in_4bit
    cut = processes > 1 and config.training.distributed != "ddp"
    again = config.training.gradient_checkpointing
    has_copies = autocast and not (again if cut else config.lora is not None and again)
    parts = processes if cut else 1
    activations = _activations(config, shape, tokens)
    # Gradients are there before the first micro-batch's backward pass only where others went before.
    first = 0 if _accumulates(config, tokens, processes) else -(-gradients // parts)
    head = max(_head(config, shape, tokens) - first, 0)
    later = max(_backward_end(config, shape, each, first > 0), _step(config, shape, parts))
    return Memory(
        weights=-(-weights // parts),
        gradients=-(-gradients // parts),
        optimizer=-(-optimizer // parts),
        copies=2 * linear if has_copies else 0,
        activations=activations,
        head=head,
        together=_gathered_bytes(config, shape, each) if cut else 0,
        embedding=max(0, later - activations - head),
    )


def _accumulates(config: TrialConfig, tokens: int, processes: int) -> bool:
    """Return whether a process computes an update in several micro-batches, with every pair at full length."""
    pairs = -(-config.training.pairs_per_update // processes)
    return pairs > 1 and pairs * 2 * config.data.max_length > tokens


def _backward_end(config: TrialConfig, shape: ModelShape, each: int, is_first: bool) -> int:
    """Gradients of the embedding and, if tied, of the output layer until they are added.

    In the first micro-batch one of them becomes the gradient that is counted already.
    """
    if config.lora is not None:
        return 0
    waiting = 1 + shape.tied - is_first
    return waiting * each * shape.vocabulary * shape.hidden


def _step(config: TrialConfig, shape: ModelShape, parts: int) -> int:
    """Fused AdamW works in place; stochastic rounding goes part by part."""
    if config.lora is None and config.model.dtype == "bfloat16" and config.training.stochastic_rounding:
        # Weight and gradient in float32; weight, random bits and the rounded weight.
        return 10 * min(-(-shape.parameters // parts), memory_limits.ROUNDING_CHUNK_ELEMENTS)
    return 0


def _gathered_bytes(config: TrialConfig, shape: ModelShape, each: int) -> int:
    """A layer and the next one, fetched meanwhile; embedding and output layer; where trained, their gradients."""
    ends = shape.parameters - shape.linear_parameters
    return each * (2 * shape.linear_parameters // shape.layers + ends) * (1 if config.lora is not None else 2)


def _activations(config: TrialConfig, shape: ModelShape, tokens: int) -> int:
    """Activations stored for the backward pass; with checkpointing each layer's input, and all of one layer.

    tests/orchestrator/spec/test_gpu_memory.py compares it with measured peaks of small models.
    """
    stream = 4 if config.model.dtype == "float32" else 2
    inner = 2 if config.training.bf16 or stream == 2 else 4
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Twice: the residual stream, its norm in float32, the norm's output. Queries and the attention's output; keys and
    # values; four tensors of the feed-forward layer.
    norms = shape.hidden * 2 * (stream + 4 + inner)
    layer = tokens * (norms + inner * (2 * wide + 2 * narrow + 4 * shape.intermediate))
    if config.lora is not None and inner == 2:
        layer += tokens * inner * (shape.hidden + shape.intermediate)  # inputs copied for adapters in float32
    # Outside of the layers the last norm; in backward the gradients of the widest part of one layer.
    once = tokens * (3 * 4 * shape.hidden + 2 * inner * shape.intermediate)
    if config.training.gradient_checkpointing:
        return shape.layers * tokens * stream * shape.hidden + layer + once
    return shape.layers * layer + once


def _head(config: TrialConfig, shape: ModelShape, tokens: int) -> int:
    """Logits and, if the output layer is trained, its gradient."""
    narrow = config.training.bf16 or config.model.dtype == "bfloat16"
    weight, trained = shape.vocabulary * shape.hidden, config.lora is None
    copy = 2 * weight if narrow and config.model.dtype == "float32" else 0  # weight copied for bfloat16 products
    if config.engine == "trl":
        # The logits, their log-softmax and its gradient.
        return 3 * 4 * tokens * shape.vocabulary + copy + (4 * weight + copy if trained else 0)
    logits = 4 * min(tokens, _rows(config, shape)) * shape.vocabulary
    squares = isinstance(config.loss, DpoLoss) and config.loss.use_weighting  # squared probabilities, for WPO
    visit = int(logits * (1.0 + max(0.5 * narrow, squares) + shape.softcap))
    if not trained:
        return visit + copy
    # The sum in float32; the product of one chunk, and on a CPU its copy in float32.
    product = 6 * min(weight, max(shape.hidden, memory_limits.GRADIENT_CHUNK_ELEMENTS)) if narrow else 0
    rounded = 2 * weight if config.model.dtype == "bfloat16" else 0  # after the logits are freed
    return copy + 4 * weight + max(visit + product, rounded)


def _rows(config: TrialConfig, shape: ModelShape) -> int:
    """Scored tokens per chunk of the output layer on a GPU, as in trainer/forward/pair_model.py."""
    gathered_bytes, most = (
        memory_limits.rows_within(size["cuda"], shape.vocabulary)
        for size in (memory_limits.LOGITS_BYTES, memory_limits.LONG_LOGITS_BYTES)
    )
    return max(gathered_bytes, min(most, 2 * config.data.max_length))


def usable_bytes(gpu_bytes: float) -> float:
    """Return the bytes that trials may use of a GPU's memory, or of their share of it."""
    return gpu_bytes * (1 - _RESERVED_FRACTION)


def max_micro_batch_tokens(
    config: TrialConfig, shape: ModelShape, gpu_bytes: float, processes: int = 1, trials: int = 1
) -> int | None:
    """Return the largest `training.tokens_per_micro_batch` (a power of two) that fits; None if one pair does not.

    A pair is never split, so a micro-batch has at least two sequences of `max_length`.
    """
    available, pair, found = usable_bytes(gpu_bytes), 2 * config.data.max_length, None
    tokens = 256
    while tokens <= _MAX_TOKENS:
        if memory(config, shape, max(tokens, pair), processes, trials).total <= available:
            found = tokens
        tokens *= 2
    return found


def max_trials_per_gpu(config: TrialConfig, shape: ModelShape, gpu_bytes: float) -> tuple[int, int]:
    """Return how many trials fit a GPU, one pair at a time: with a copy of the model each, and over one base."""
    available, pair = usable_bytes(gpu_bytes), 2 * config.data.max_length
    one, two = (memory(config, shape, pair, trials=n).total for n in (1, 2))
    over = int((available - one) // (two - one)) + 1 if config.lora is not None and one <= available else 0
    return int(available // one), over


def suggest_change(
    config: TrialConfig, shape: ModelShape, gpu_bytes: float, processes: int = 1, trials: int = 1
) -> str | None:
    """Return the first combination of settings that makes one pair fit, as text; None if none does."""
    can_cut = processes > 1 and config.model.can_be_sharded
    steps: list[tuple[str, str, dict[str, object]]] = [
        ("base.training.gradient_checkpointing: true", "training", {"gradient_checkpointing": True}),
        *([("base.training.distributed: fsdp2", "training", {"distributed": "fsdp2"})] if can_cut else ()),
        ("base.model.dtype: bfloat16", "model", {"dtype": "bfloat16"}),
        ("base.lora: {}", "", {"lora": config.lora or LoraConfig()}),
        *(() if can_cut else [("base.model.load_in_4bit: true", "model", {"load_in_4bit": True})]),
    ]
    done: list[str] = []
    for words, part, change in steps:
        inner = getattr(config, part).model_copy(update=change) if part else None
        changed = config.model_copy(update=change if inner is None else {part: inner})
        if changed != config:
            config = changed
            done.append(words)
        if max_micro_batch_tokens(config, shape, gpu_bytes, processes, trials) is not None:
            return ", ".join(done)
    return None
