"""Number of positions of a model, from its configuration, and which lengths of a trial exceed it. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from trainer.config.hub_cache import model_file
from trainer.config.trial import ModelConfig, TrialConfig
from trainer.results import ModelError

TABLES: dict[str, tuple[str, int]] = {
    "gpt2": ("n_positions", 1024),
    "gpt_bigcode": ("n_positions", 1024),
    "gpt_neo": ("max_position_embeddings", 2048),
    "gptj": ("n_positions", 2048),
    "codegen": ("n_positions", 2048),
    "opt": ("max_position_embeddings", 2048),
    "biogpt": ("max_position_embeddings", 1024),
    "openai-gpt": ("n_positions", 512),
    "ctrl": ("n_positions", 256),
    "mpt": ("max_seq_len", 2048),
    "bert": ("max_position_embeddings", 512),
    "electra": ("max_position_embeddings", 512),
    "xlm": ("max_position_embeddings", 512),
}
"""Model types with a table of positions, learned or fixed, beyond which they fail: the field of config.json with its
size, and transformers' default.
"""
_WITHOUT = frozenset({"bloom", "mamba", "mamba2", "rwkv", "falcon_mamba", "xglm"})
"""Model types without a position limit; their max_position_embeddings is not one."""
_STRETCHED = ("linear", "dynamic", "yarn")
_SWITCHING = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Positions:
    """Position limits in tokens; None if there is no such limit or it is unknown."""

    field: str
    """Field of config.json that the numbers are from."""
    table: int | None = None
    """Size of the position table; longer sequences cannot be computed."""
    trained: int | None = None
    """Longest sequence that a rotary model was trained for, its scaling included."""
    switch: int | None = None
    """Length from which on the rotary frequencies depend on the longest sequence of a batch."""


@dataclass(frozen=True, slots=True)
class LengthFinding:
    """A length of a trial that exceeds the model's positions."""

    path: str
    """Dotted path of the setting."""
    problem: str
    hint: str
    refused: bool
    """Whether the model cannot compute it; else the model was only not trained for it."""


def positions_of(config: Mapping[str, Any]) -> Positions:
    """Return the position limits that a config.json states."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = cast("Mapping[str, Any]", inner)
    kind = str(config.get("model_type", ""))
    if kind in TABLES:
        field, default = TABLES[kind]
        found = next(
            (config[name] for name in (field, "max_position_embeddings", "n_positions") if name in config), None
        )
        return Positions(field, table=_whole(found) or default)
    max_positions, field = _whole(config.get("max_position_embeddings")), "max_position_embeddings"
    if kind in _WITHOUT or max_positions is None or config.get("alibi"):
        return Positions(field)
    trained, switches = max_positions, list[int]()
    for scaling in _scalings(config):
        rope = str(scaling.get("rope_type", scaling.get("type", "default")))
        original = _whole(config.get("original_max_position_embeddings"))
        original = original or _whole(scaling.get("original_max_position_embeddings"))
        factor = scaling.get("factor")
        if any(name in rope for name in _STRETCHED) and isinstance(factor, (int, float)):
            trained = max(trained, int((original or max_positions) * factor))
        if any(name in rope for name in _SWITCHING):
            switches.append(max_positions if "dynamic" in rope else original or max_positions)
    return Positions(field, trained=trained, switch=min(switches, default=None))


def _scalings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary scaling settings, under their newer or older name, once or for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        setting = config.get(name)
        if isinstance(setting, Mapping) and setting:
            scaling = cast("Mapping[str, Any]", setting)
            nested = [cast("Mapping[str, Any]", each) for each in scaling.values() if isinstance(each, Mapping)]
            yield from nested or [scaling]
            return


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def length_findings(
    positions: Positions, config: TrialConfig, answers: Mapping[str, int] | None = None
) -> Iterator[LengthFinding]:
    """Yield the lengths of this trial that exceed the model's positions.

    `answers`: new tokens after a prompt of full length, by the setting that gives their number; by default those of
    `evaluation`.
    """
    data, evaluation = config.data, config.evaluation
    if answers is None:
        answers = {"evaluation.max_new_tokens": evaluation.max_new_tokens} if evaluation.prompts else {}
    if positions.table is not None:
        has = f"the {positions.table:,} positions that the model has ({positions.field} in its config.json)"
        if data.max_length > positions.table:
            problem = f"{data.max_length:,} tokens exceed {has}"
            yield LengthFinding("data.max_length", problem, f"write {positions.table} or less", refused=True)
        for path, new in answers.items():
            if data.max_length > positions.table or data.longest_prompt + new <= positions.table:
                continue
            # Rows that fit keep their whole prompt, so that only `max_prompt_length` is a strict bound.
            refused = data.prompt_budget + new > positions.table
            up_to = data.prompt_budget if refused else data.longest_prompt
            problem = f"{new:,} new tokens after a prompt of up to {up_to:,} exceed {has}"
            yield LengthFinding(path, problem, "lower it, or give data.max_prompt_length", refused=refused)
    if positions.trained is not None and data.max_length > positions.trained:
        problem = (
            f"{data.max_length:,} tokens are more than the {positions.trained:,} that the model was trained for "
            f"({positions.field} in its config.json)"
        )
        yield LengthFinding("data.max_length", problem, f"write {positions.trained} or less", refused=False)
    if positions.switch is not None and config.engine == "trl" and data.max_length > positions.switch:
        problem = (
            f"beyond {positions.switch:,} tokens the rotary frequencies of this model depend on the longest sequence "
            "of a batch, so that results of TRL's trainers would depend on training.tokens_per_micro_batch"
        )
        hint = f"use engine packed, or data.max_length {positions.switch} or less"
        yield LengthFinding("engine", problem, hint, refused=True)


def refuse_long_answers(positions: Positions, longest_prompt: int, new: int) -> None:
    """Raise ModelError if a model has no positions for its longest prompt plus `new` tokens."""
    if positions.table is not None and longest_prompt + new > positions.table:
        raise ModelError(
            f"a prompt of {longest_prompt:,} tokens with {new:,} new ones exceeds the {positions.table:,} positions "
            f"of the model ({positions.field} in its config.json): lower max_new_tokens or data.max_prompt_length"
        )


def known_positions(model: ModelConfig) -> Positions | None:
    """Return the limits of an initial model without network access; None if its config.json is not on this machine."""
    if model.generated is not None:
        length = model.generated.max_position_embeddings
        return positions_of({"model_type": model.generated.architecture, "max_position_embeddings": length})
    file = model_file(str(model.name_or_path), "config.json", model.revision)
    if file is None:
        return None
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None  # loading the model reports the error
    return positions_of(cast("Mapping[str, Any]", found)) if isinstance(found, dict) else None
