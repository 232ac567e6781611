"""What to write instead of another tool's name, of a key at the wrong place, or of one value in a section's place.

The names are in `known_names`; every answer is the form written out with the file's own value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast, get_args

from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.loading.known_names import FAMILIES, FIRST_KEYS, LOSS_NAMES, METHODS, SENTENCES, SETTINGS, VALUES
from orchestrator.spec.loading.validation_errors import NOT_A_MAPPING, UNKNOWN_KEY
from orchestrator.spec.search.trial_params import config_paths, list_paths
from orchestrator.spec.sweep_spec import SECTION_ORDER, Budget, Notify, Resources, Tracking
from trainer.config.loss_config import DpoLossType
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Location


def explain(problem: str, loc: Location, value: Any) -> str:
    """Return what to write instead of `value` at this place of a file, by the problem found there; "" if not known."""
    path = ".".join(map(str, loc)).removeprefix("base.")
    if problem == UNKNOWN_KEY:
        return right_form(loc, value)
    if loc == ("base", "loss"):
        given: dict[str, Any] = cast(dict[str, Any], value) if isinstance(value, dict) else {"kind": value}
        return loss_form(given.get("kind"), given) or section_form(path, value)
    if problem.startswith(NOT_A_MAPPING):
        return section_form(path, value)
    if isinstance(value, str) and (own := VALUES.get(path, {}).get(value.lower())):
        return f"write {path.rpartition('.')[2]}: {own}"
    if path == "lora.target_modules" and isinstance(value, str):
        return f"write target_modules: {flow(re.split(r'[, ]+', value.strip()))}"
    return ""


def section_form(path: str, value: Any) -> str:
    """Return the section to write where the file has one value in its place; "" if it is not known."""
    if path == "sft":
        if value in (False, "none", "off", "no", "None"):
            return "leave sft out"
        steps = {"max_steps": value} if isinstance(value, int) and value is not True else {"num_train_epochs": 1}
        return f"write sft: {flow({'training': {'learning_rate': 2e-5, **steps}})}"
    if value in (False, "none", "off", "no", "None") and path not in ("budget", "resources", "loss", "data"):
        return f"leave {path} out"
    key = FIRST_KEYS.get(path, {}).get(type(value))
    if key is not None:
        return f"write {path}: {flow({key: value})}"
    return f"write {path}: {{}}" if value is True and path in ("lora", "judge", "evaluation") else ""


def loss_form(kind: object, given: Mapping[str, Any] | None = None) -> str:
    """Return the loss section for a name that is no `loss.kind` but a loss type or another paper's name; else ""."""
    name = str(kind).lower()
    rest = {key: value for key, value in (given or {}).items() if key not in ("kind", "loss_type")}
    if name in get_args(DpoLossType):
        return f"write loss: {flow({'kind': 'dpo', 'loss_type': name} | rest)}"
    if name in LOSS_NAMES:
        return f"write loss: {LOSS_NAMES[name]}"
    if name == "rdpo":
        return (
            "write loss: {kind: dpo, length_alpha: 0.01} for R-DPO's length term, or "
            "{kind: dpo, loss_type: robust, label_smoothing: 0.1} for robust DPO"
        )
    if name in ("ppo", "grpo", "rloo", "online_dpo", "nash_md", "xpo"):
        return f"{name} does not train on preference pairs"
    return ""


def method_form(section: str, kind: object, given: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    """Return the sampler, pruner or order to write for another tool's name of it; "" if the name is not known.

    `given`: the section of the file. W&B and Ray write `type`, `name` or `method` where `kind` belongs.
    """
    name = str(
        kind if kind is not None else next((given[k] for k in ("type", "name", "method") if k in given), "")
    ).lower()
    own = name if name in kinds or name in _PRUNERS else METHODS.get(name, METHODS.get(name.removesuffix("search"), ""))
    if own in kinds:
        return f"write {section}: {own}"
    if name in ("pbt", "pb2", "populationbasedtraining", "populationbasedtrainingreplay"):
        return "population based training is not offered; use hyperband or successive_halving"
    return f"{own} is a pruner: write pruner: {own}" if section == "sampler" and own in _PRUNERS else ""


_PRUNERS = ("hyperband", "successive_halving", "median", "percentile", "threshold", "wilcoxon", "patient")


def right_form(loc: Location, value: Any) -> str:
    """Return what to write in place of the unknown key at `loc`; "" if its name is not known.

    `value`: what the file gives there. A setting is written out with it.
    """
    name, parents = str(loc[-1]), [str(part) for part in loc[:-1]]
    if loc[0] in ("search", "enqueue"):
        if name.startswith("base.") and name.removeprefix("base.") in config_paths():
            return f"write {name.removeprefix('base.')}: paths begin below base"
        name = name.rpartition(".")[2]
    special = _special_form(name, parents, value)
    if special:
        return special
    if name in SETTINGS and not _same_place(loc, SETTINGS[name]):
        return written(SETTINGS[name], value, loc)
    if name in SENTENCES:
        return SENTENCES[name]
    family = next((sentence for start, sentence in FAMILIES.items() if name.startswith(start)), "")
    return family or _own_place(name, value, loc)


def _special_form(name: str, parents: list[str], value: Any) -> str:
    """Return the form of keys whose meaning depends on their value."""
    given = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    match name, parents:
        case (("steps" | "epochs" | "max_steps" | "num_train_epochs" | "learning_rate" | "lr"), ["sft"]):
            own = {"steps": "max_steps", "epochs": "num_train_epochs", "lr": "learning_rate"}.get(name, name)
            return f"write sft: {flow({'training': {own: value}})}"
        case "data", [] if "columns" in given:
            return f"write base: {flow({'data': {'train': {'path': 'FILE', 'columns': given['columns']}}})}"
        case "metric", [] if isinstance(given.get("name"), str):
            return f"write {_direction(given.get('goal', given.get('mode')))}: {given['name']}"
        case "metric", [] if isinstance(value, str):
            return f"write maximize: {value}, or minimize: {value}"
        case (("direction" | "mode" | "goal"), []) if isinstance(value, str):
            metric = "eval_accuracies/logp" if _direction(value) == "maximize" else "eval_nll_loss"
            return f"write {_direction(value)}: METRIC, such as {_direction(value)}: {metric}"
        case (("method" | "search_alg" | "algorithm"), []) if isinstance(value, str):
            return f"write sampler: {METHODS.get(value.lower(), value.lower())}"
        case (("early_terminate" | "early_stopping" | "scheduler"), []) if "type" in given or isinstance(value, str):
            kind = str(given.get("type", value)).lower()
            return f"write pruner: {METHODS.get(kind, kind)}"
        case (("seeds" | "num_seeds" | "n_seeds"), _) if isinstance(value, tuple):
            return f"write search: {flow({'training.seed': value})}"
        case (("seeds" | "num_seeds" | "n_seeds"), _) if isinstance(value, int) and value > 1:
            return f"write repeats: {value}"
        case (("kind" | "type" | "model" | "name" | "model_name" | "path"), ["judge"]):
            return _judge_form(value if isinstance(value, str) else "MODEL")
        case ("columns", ["base", "data"]):
            return f"write it with its file: train: {flow({'path': 'FILE', 'columns': value})}"
        case (("gpus" | "gpu"), ["resources"]):
            return f"write gpus_per_trial: {flow(value)}"
        case (("cpus" | "cpu"), ["resources"]):
            return f"write cpus_per_trial: {flow(value)}"
        case (("time_budget_s" | "timeout"), _) if isinstance(value, int | float) and not isinstance(value, bool):
            return f"write budget: {flow({'hours': round(value / 3600, 4)})}"
        case (("kind" | "loss_type" | "type" | "name"), ["sampler" | "pruner" | "order" as section]):
            return f"write {section}: {METHODS.get(str(value).lower(), value)}"
        case _:
            return ""


def _judge_form(given: str) -> str:
    """Return how a judge is named: by the folder or hub name of a reward model, or by an endpoint."""
    model = "MODEL" if given in ("reward_model", "reward", "rm", "llm", "endpoint", "api", "openai") else given
    reward = f"write judge: {flow({'reward_model': model})}"
    return f"{reward}, or judge: {flow({'endpoint': {'url': 'URL', 'model': model}})} for a language model"


def _direction(given: Any) -> str:
    return "minimize" if str(given).lower().startswith("min") else "maximize"


def _same_place(loc: Location, path: str) -> bool:
    return tuple(path.split(".")) == tuple(loc[1:] if loc[:1] == ("base",) else loc)


def written(path: str, value: Any, loc: Location) -> str:
    """Return the sentence that writes `value` at a setting's path, as a key of the file or of `search`."""
    if loc[:1] in (("search",), ("enqueue",)):
        return (
            f"write {path}" if path in config_paths() else f"{path} is not a trial's setting; write it outside search"
        )
    first = path.partition(".")[0]
    if isinstance(value, dict):
        value = {_own_key(first, key): each for key, each in cast(dict[str, Any], value).items()}
    parts = path.split(".") if first in SECTION_ORDER else ["base", *path.split(".")]
    tree: Any = value
    for part in reversed(parts[1:]):
        tree = {part: tree}
    return f"write {parts[0]}: {flow(tree)}"


def _own_key(section: str, key: str) -> str:
    """Return this program's name of a key of a section."""
    own = SETTINGS.get(key, key).removeprefix(f"{section}.")
    return key if "." in own else own


def option_form(path: str, text: str) -> str:
    """Return the option `--set` for another tool's name, or for a setting without its section; else ""."""
    name = path.rpartition(".")[2]
    target = SETTINGS.get(path) or SETTINGS.get(name)
    if target is None:
        near = [known for known in config_paths() if known.rpartition(".")[2] == path or known == path]
        near += [f"{section}.{path}" for section, model in _SECTIONS.items() if path in model.model_fields]
        target = near[0] if len(near) == 1 else None
        if len(near) > 1:
            return f"write {' or '.join(near[:4])}"
    if path.startswith("base.") and path.removeprefix("base.") in config_paths():
        target = path.removeprefix("base.")
    return SENTENCES.get(name, "") if target is None else f"write --set {target}={text}"


_SECTIONS: Mapping[str, Any] = {
    "budget": Budget, "resources": Resources, "judge": JudgeConfig, "tracking": Tracking, "notify": Notify,
}  # fmt: skip


def _own_place(name: str, value: Any, loc: Location) -> str:
    """Return where a key of this program that stands at the wrong place belongs."""
    if name in TrialConfig.model_fields and loc[:1] != ("search",):
        return written(name, value, loc) if loc != ("base", name) else ""
    if name in SECTION_ORDER and len(loc) > 1 and loc[0] == "base":
        return f"goes to the top of the file, not under base: write {name}: {flow(value)}"
    paths = [path for path in (*config_paths(), *list_paths()) if path.rpartition(".")[2] == name]
    paths += [f"{section}.{name}" for section, model in _SECTIONS.items() if name in model.model_fields]
    paths = [path for path in paths if path.rpartition(".")[0] != ".".join(map(str, loc[:-1])).removeprefix("base.")]
    if loc[:1] == ("search",):
        paths = [path for path in paths if path in config_paths()]
    if len(paths) == 1:
        return written(paths[0], value, loc)
    return f"write it in its section: {' or '.join(paths)}" if 1 < len(paths) <= 4 else ""


def flow(value: Any) -> str:
    """Return a value in YAML's flow form, its long parts as `...`."""
    match value:
        case dict():
            inner = cast(dict[str, Any], value)
            return "{" + ", ".join(f"{key}: {flow(each)}" for key, each in inner.items()) + "}"
        case list() | tuple():
            items = cast(tuple[Any, ...], value)
            return "[" + ", ".join(flow(each) for each in items) + "]" if len(items) <= 8 else "[...]"
        case bool() | None:
            return "null" if value is None else str(value).lower()
        case float():
            return f"{value:g}"
        case str() if len(value) > 60:
            return "..."
        case _:
            return str(value)
