"""Rehearsal of a sweep: a tiny random model of the same architecture, few rows, few updates, only the corners."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from orchestrator.commands.data_preview import has_labels
from orchestrator.spec.estimates.input_sizes import count_rows
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.samplers import GridSampler
from orchestrator.spec.search.corners import extreme_values
from orchestrator.spec.search.dimensions import Choice, Dimension, Scalar, end_values
from orchestrator.spec.search.space import SearchSpace
from orchestrator.spec.sweep_spec import Budget, Finalists, Resources, SftStage, SweepSpec
from trainer.config.hub_cache import hub_reachable, model_file
from trainer.config.trial import DataConfig, GeneratedModel, GeneratedSource, HubSource, ModelConfig, TrainingConfig

ROWS, EVAL_ROWS, STEPS, PAIRS, LENGTH, MAX_TRIALS = 64, 16, 4, 4, 256, 20
MORE_LABELLED_ROWS = 8
"""Times as many rows with one response and a label, so that each split has both labels where one of them is rare."""
_FIXED = ("model.", "data.", "evaluation.", "training.max_steps", "training.num_train_epochs")
_ALSO_FIXED = ("training.pairs_per_update", "training.tokens_per_micro_batch", "training.eval_steps")
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2}


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A small copy of a sweep, and notices about differences other than its size."""

    spec: SweepSpec
    notices: tuple[str, ...]


def rehearse(spec: SweepSpec, root: Path) -> Rehearsal:
    """Return a copy of this sweep small enough for any machine, named NAME-rehearsal, NAME-rehearsal-2, ..."""
    notices: list[str] = []
    model = _model(spec.base.model, notices)
    data = _data(spec.base.data, notices)
    base = spec.base.model_copy(
        update={
            "model": model,
            "data": data,
            "training": _training(spec.base.training),
            "evaluation": spec.base.evaluation.model_copy(
                update={"prompts": min(2, spec.base.evaluation.prompts), "samples": 2, "max_new_tokens": 8}
            ),
        }
    )
    search = _search(spec.search, notices)
    enqueued = _enqueued(spec)
    if spec.mirror is not None:
        notices.append(f"not rehearsed: copies to {spec.mirror}; check the mirror with `orchestrate doctor FILE`")
    size = (search.size() or 1) + len(enqueued)
    small = spec.model_copy(
        update={
            "name": _free_name(spec.name, root),
            "base": base,
            "auto": (),
            "search": search,
            "enqueue": enqueued,
            "sampler": GridSampler(),
            "finalists": None if spec.finalists is None else Finalists(top=1, seeds=2),
            "require": (),  # a few updates of a random model say nothing about them
            "budget": Budget(trials=MAX_TRIALS if size > MAX_TRIALS else None, concurrency=spec.budget.concurrency),
            "resources": Resources(),
            "notify": None,
            "mirror": None,
            "judge": _judge(spec.judge, notices),
            "sft": _sft(spec.sft, notices),
        }
    )
    # `model_copy` skips validation; loading the dump validates.
    return Rehearsal(SweepSpec.model_validate_json(small.model_dump_json()), tuple(notices))


def is_rehearsal(spec: SweepSpec) -> bool:
    """Return whether a sweep is a rehearsal: it has a rehearsal's name and number of updates."""
    return bool(re.search(r"-rehearsal(-\d+)?$", spec.name)) and spec.base.training.max_steps == STEPS


def _judge(judge: JudgeConfig | None, notices: list[str]) -> JudgeConfig | None:
    """Reduce judging to a few short answers, without reward model and endpoint."""
    if judge is None:
        return None
    left = [name for name in ("reward_model", "endpoint") if getattr(judge, name) is not None]
    if left:
        notices.append(f"not rehearsed: {' and '.join(f'judge.{name}' for name in left)}")
    few = {"top": 1, "prompts": min(judge.prompts, 8), "max_new_tokens": min(judge.max_new_tokens, 16)}
    return judge.model_copy(update={**few, "reward_model": None, "endpoint": None})


def _free_name(name: str, root: Path) -> str:
    stem = f"{name[:50]}-rehearsal"
    number = 1
    while (root / (free := stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return free


def _training(training: TrainingConfig) -> TrainingConfig:
    return training.model_copy(
        update={
            "max_steps": STEPS,
            "pairs_per_update": min(PAIRS, training.pairs_per_update),
            "tokens_per_micro_batch": min(2048, training.tokens_per_micro_batch),
            "eval_steps": STEPS // 2,
            "save_steps": STEPS // 2,
            "logging_steps": 1,
        }
    )


def _sft(sft: SftStage | None, notices: list[str]) -> SftStage | None:
    if sft is None:
        return None
    return SftStage(training=_training(sft.training), data=_data(sft.data, notices) if sft.data else None)


def _enqueued(spec: SweepSpec) -> tuple[dict[str, Scalar], ...]:
    """Return the distinct manual trials without the settings that the rehearsal fixes."""
    remaining = [{path: value for path, value in one.items() if not _is_fixed(path)} for one in spec.enqueue]
    return tuple(one for i, one in enumerate(remaining) if one and one not in remaining[:i])


# --- search ----------------------------------------------------------------------------------------------------------


def _search(space: SearchSpace, notices: list[str]) -> SearchSpace:
    """Return a search with each end of each range at least once; unconditional settings are zipped into one group."""
    remaining = {p: d for p, d in space.dimensions.items() if not _is_fixed(p) and not any(map(_is_fixed, d.when))}
    groups = [{p: v for p, v in group.items() if not _is_fixed(p)} for group in space.zipped]
    dropped = [p for p in space.paths if p not in remaining and not any(p in group for group in groups)]
    if dropped:
        notices.append(f"the rehearsal fixes {', '.join(dropped)}, so their search is not rehearsed")
    condition_paths = {path for d in remaining.values() for path in d.when}
    conditional = {p: _reduced_to_ends(d) for p, d in remaining.items() if d.when or p in condition_paths}
    unconditional = {p: extreme_values(end_values(d)) for p, d in remaining.items() if p not in conditional}
    rows = min(MAX_TRIALS, max(map(len, unconditional.values()), default=0))
    zipped_ends = {p: tuple(listed[i % len(listed)] for i in range(rows)) for p, listed in unconditional.items()}
    zipped = (*([zipped_ends] if zipped_ends else []), *(group for group in groups if group))
    return SearchSpace(dimensions=conditional, zipped=zipped)


def _reduced_to_ends(dimension: Dimension) -> Dimension:
    """Reduce a range to its ends; a list keeps all values, as conditions may refer to each of them."""
    if isinstance(dimension, Choice):
        return dimension
    return Choice(choice=end_values(dimension), when=dimension.when)


def _is_fixed(path: str) -> bool:
    return path.startswith(_FIXED) or path in _ALSO_FIXED or path == "training.save_steps"


# --- model -----------------------------------------------------------------------------------------------------------


def _model(model: ModelConfig, notices: list[str]) -> ModelConfig:
    known: tuple[str, ...] = get_args(GeneratedModel.model_fields["architecture"].annotation)
    if model.generated is not None:
        architecture = model.generated.architecture
    else:
        name = str(model.name_or_path)
        found = _architecture(name, model.revision)
        plain = name.lower().replace("-", "")
        alike = [kind for kind in known if kind.rstrip("23") in plain]
        guessed = found or next((kind for kind in alike if kind in plain), alike[0] if alike else None)
        architecture = guessed if guessed in known else "llama"
        if found is None:
            notices.append(f"the configuration of {name} cannot be read; rehearsing with a tiny {architecture}")
        elif found not in known:
            notices.append(
                f"{name} is a {found}, for which there is no tiny model; rehearsing with a tiny {architecture}"
            )
    generated = GeneratedModel.model_validate({"architecture": architecture, **_SMALL})
    return ModelConfig(generated=generated, dtype=model.dtype, attention=model.attention)


def _architecture(name: str, revision: str | None) -> str | None:
    """Return `model_type` of a folder or a hub model; None where neither can be read."""
    file = model_file(name, "config.json", revision)
    if file is None:
        if not hub_reachable():
            return None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(name, "config.json", revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None
    try:
        return str(json.loads(file.read_bytes())["model_type"])
    except (OSError, ValueError, KeyError):
        return None


# --- data ------------------------------------------------------------------------------------------------------------


def _data(data: DataConfig, notices: list[str]) -> DataConfig:
    length = min(LENGTH, data.max_length)
    prompt = None if data.max_prompt_length is None else min(data.max_prompt_length, length // 2)
    small: dict[str, object] = {"max_length": length, "max_prompt_length": prompt}
    more = MORE_LABELLED_ROWS if has_labels(data) else 1
    small |= {"max_train_rows": min(more * ROWS, data.max_train_rows or more * ROWS)}
    small |= {"max_eval_rows": min(more * EVAL_ROWS, data.max_eval_rows or more * EVAL_ROWS)}
    hub = [s for s in (*data.train, *(data.eval or ())) if isinstance(s, HubSource)]
    if hub and count_rows(data).train is None and not hub_reachable():
        names = ", ".join(dict.fromkeys(source.dataset for source in hub))
        notices.append(f"the hub cannot be reached for {names}; rehearsing with the quickstart's generated rows")
        small["train"] = (GeneratedSource(generated="instructions", rows=ROWS),)
        small["eval"] = (GeneratedSource(generated="instructions", split="eval", rows=EVAL_ROWS),)
    return data.model_copy(update=small)
