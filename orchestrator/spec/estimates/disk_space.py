"""Peak disk space of a sweep: checkpoints of running trials, and final weights that stay on disk."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from orchestrator.spec.search.trial_params import SEED
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.hub_cache import model_file
from trainer.config.model_folder import count_elements
from trainer.config.trial import GeneratedModel, LoraConfig, ModelConfig

_BYTES = {"float32": 4, "bfloat16": 2}
_STATES = 3
"""Tensors per trained weight in a checkpoint: the weight and two moments of AdamW, in its dtype; one more where the
reference model moves (loss.sync_ref_model)."""
_CHECKPOINTS = 2
"""Checkpoints of a trial at its peak: the older one is deleted after the new one is complete."""
_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """Bytes at the peak. `checkpoint` and `model` are one trial's."""

    bytes: int
    checkpoint: int
    model: int
    trials: int
    kept_models: int
    checkpoints: int = _CHECKPOINTS
    """Checkpoints of a trial at its peak."""
    sft_checkpoint: int = 0
    sft_model: int = 0
    """Bytes of the SFT stage, whose checkpoints are removed before the trials begin; its model stays."""

    def __str__(self) -> str:
        sft = f"the SFT stage's model of {format_bytes(self.sft_model)}"
        if self.sft_model and self.bytes == self.checkpoints * self.sft_checkpoint + self.sft_model:
            checkpoints = f"{self.checkpoints} checkpoints of {format_bytes(self.sft_checkpoint)} during the SFT stage"
            return f"about {format_bytes(self.bytes)}: {checkpoints}, and {sft}"
        return (
            f"about {format_bytes(self.bytes)}: {self.trials} trial{'s' if self.trials > 1 else ''} at a time with "
            f"{self.checkpoints} checkpoints of {format_bytes(self.checkpoint)}, final weights of "
            f"{format_bytes(self.model)} each of {self.kept_models + self.trials} trials"
            f"{f', and {sft}' if self.sft_model else ''}"
        )


def disk_need(spec: SweepSpec, trials: int) -> DiskNeed | None:
    """Return the disk space with `trials` at a time; None if the initial model's size is unknown."""
    config = spec.base
    count = parameter_count(config.model)
    if count is None:
        return None
    trained = count if config.lora is None else _adapter_count(config.lora, count)
    each = _BYTES[config.model.dtype]
    moves = config.loss.moves_reference or True in (spec.search.choices("loss.sync_ref_model") or ())
    checkpoint, model = trained * each * (_STATES + moves), trained * each
    several = _CHECKPOINTS + (spec.mirror is not None)  # one more is being uploaded
    kept = spec.models_kept + _undecided(spec, trials)
    need = trials * several * checkpoint + (kept + trials) * model
    if spec.sft is None:
        return DiskNeed(need, checkpoint, model, trials, kept, several)
    sft_checkpoint, sft_model = count * each * _STATES, count * each  # of all weights
    need = max(need, several * sft_checkpoint) + sft_model
    return DiskNeed(need, checkpoint, model, trials, kept, several, sft_checkpoint, sft_model)


def _undecided(spec: SweepSpec, trials: int) -> int:
    """Return how many configurations at most wait for more seeds and keep a model each."""
    if spec.seeds_per_configuration == 1:
        return 0
    if spec.repeats > 1 or spec.search.paths[-1] == SEED:
        return trials
    return (spec.search.size() or 0) // spec.seeds_per_configuration


def parameter_count(model: ModelConfig) -> int | None:
    """Return the number of parameters of the initial model; None if unknown.

    Read from its files or its description; for a model that is not downloaded yet, from the size in its name. Raises
    ModelError where its files are damaged.
    """
    if model.generated is not None:
        return _generated_count(model.generated)
    name = str(model.name_or_path)
    config = model_file(name, "config.json", model.revision)
    files = [] if config is None else sorted(config.parent.glob("*.safetensors"))
    if files:
        return sum(map(count_elements, files))
    sizes_in_name = _IN_NAME.findall(name.rpartition("/")[2])
    return int(float(sizes_in_name[-1]) * 1e9) if sizes_in_name else None


def format_bytes(count: float) -> str:
    """Return a number of bytes as text with a unit, such as "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _generated_count(model: GeneratedModel) -> int:
    hidden, per_head = model.hidden_size, model.hidden_size // model.num_attention_heads
    attention = 2 * hidden * hidden + 2 * hidden * per_head * model.num_key_value_heads
    layer = attention + 3 * hidden * model.intermediate_size + 2 * hidden
    return model.num_hidden_layers * layer + model.vocab_size * hidden + hidden  # input and output share weights


def _adapter_count(lora: LoraConfig, count: int) -> int:
    """Approximate: rank r for each row and column of the linear layers, with the width estimated from the size."""
    width = max(64.0, math.sqrt(count / 450))
    return int(count * min(1.0, 1.2 * lora.r / width))
