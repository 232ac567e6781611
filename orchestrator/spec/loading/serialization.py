"""A SweepSpec as YAML with every default written out, its hash, and the JSON Schema of sweep files.

Loading the YAML gives an equal SweepSpec. The schema includes shorthands and refuses unknown keys.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import yaml
from pydantic import BaseModel, TypeAdapter

from orchestrator.spec.guard_config import GuardConfig
from orchestrator.spec.judge_config import JudgeConfig
from orchestrator.spec.loading.method_sections import ORDERS, PRUNERS, SAMPLERS
from orchestrator.spec.loading.validation_errors import models_in
from orchestrator.spec.loading.variables import escape_names
from orchestrator.spec.objectives import objective_metrics
from orchestrator.spec.pruners import BROKEN_EVALUATIONS, PRUNED_FROM
from orchestrator.spec.requirements import BOUND_PATTERN, DEFAULT_BOUNDS, OFF, default_requirements, written_bounds
from orchestrator.spec.samplers import GridSampler
from orchestrator.spec.search.dimensions import DIMENSION_KINDS, Choice, Scalar
from orchestrator.spec.search.trial_params import config_paths, list_settings, read_list
from orchestrator.spec.sweep_spec import (
    AUTO,
    AUTO_TRAINING,
    GPUS_PER_TRIAL,
    SECTION_ORDER,
    Budget,
    Finalists,
    Notify,
    Resources,
    SftStage,
    SweepSpec,
    Tracking,
)
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import InvalidScalar, parse_scalar
from trainer.metrics import COMPARISON_METRIC

_OMITTED_WHEN_UNSET = ("storage", "mirror", "notify", "judge", "finalists")
"""Keys that are not written if they are unset."""


def dump_spec(spec: SweepSpec, *, brief: bool = False) -> str:
    """Return the resolved sweep as YAML, in the order of the file's keys; `brief`: without default values."""
    tree = _with_explicit(spec, _changed_fields(spec)) if brief else spec.written()
    for name in ("goal", "also", *(unset for unset in _OMITTED_WHEN_UNSET if getattr(spec, unset) is None)):
        tree.pop(name, None)
    if spec.tracking.artifacts is None and "tracking" in tree:
        tree["tracking"].pop("artifacts", None)
    for direction in ("maximize", "minimize"):
        metrics = [objective.metric for objective in spec.objectives if objective.direction == direction]
        if metrics:
            tree[direction] = metrics if len(metrics) > 1 else metrics[0]
    if brief and spec.pruner == spec.default_pruner:
        tree.pop("pruner", None)
    elif brief:
        tree["pruner"] = _without_defaults(spec.pruner, spec.pruner.model_dump(mode="json"))
    tree.pop("require", None)
    if not brief or spec.require != default_requirements(spec.base):
        tree["require"] = written_bounds(spec.require)
    tree["search"] = _search(spec)
    ordered = escape_names({key: tree[key] for key in SECTION_ORDER if key in tree})
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _with_explicit(spec: SweepSpec, tree: dict[str, Any]) -> dict[str, Any]:
    """Add the settings that are not left to `auto` although they have their default, as without them `auto` is meant.

    A searched setting needs no value here.
    """
    tree.pop("auto", None)
    paths = [*(f"base.{path}" for path in AUTO_TRAINING if path not in spec.search.paths)]
    paths += [f"sft.{path}" for path in AUTO_TRAINING] if spec.sft is not None else []
    for path in [*paths, GPUS_PER_TRIAL]:
        if path not in spec.auto:
            *groups, name = path.split(".")
            value, section = spec.model_dump(mode="json"), tree
            for group in groups:
                value, section = value[group], section.setdefault(group, {})
            section[name] = value[name]
    return tree


def _changed_fields(model: BaseModel) -> dict[str, Any]:
    """Return the fields that differ from their defaults, and `kind`, which selects a union's member."""
    tree = model.model_dump(mode="json")
    out: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if name != "kind" and not field.is_required() and value == field.get_default(call_default_factory=True):
            continue
        out[name] = _without_defaults(value, tree[name])
    return out


def _without_defaults(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return _changed_fields(value)
    if isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in cast(tuple[Any, ...], value)):
        return [
            _without_defaults(item, message) for item, message in zip(cast(tuple[Any, ...], value), dumped, strict=True)
        ]
    return dumped


def sweep_identity(spec: SweepSpec) -> str:
    """Return the sweep's identity as hex SHA-256: equal for specs that train the same trials, however they are written.

    Notifications, judge, mirror and artifact location are not part of it; `full_spec_digest` covers every setting.
    """
    tree = spec.model_dump(
        mode="json", exclude={"notify": True, "judge": True, "mirror": True, "auto": True, "tracking": {"artifacts"}}
    )
    if isinstance(spec.sampler, GridSampler) and spec.sampler.order is None:  # a sweep of before there was an order
        tree["sampler"] = {"kind": spec.sampler.kind}
    if spec.repeats == 1:  # as before there were repeats
        del tree["repeats"]
    if not spec.require:  # as before there were requirements
        del tree["require"]
    for pruner in (tree["pruner"], tree["pruner"].get("wrapped") or {}):  # as before pruners looked at requirements
        if pruner.get("broken_evaluations") == BROKEN_EVALUATIONS:
            del pruner["broken_evaluations"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _search(spec: SweepSpec) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, dimension in spec.search.dimensions.items():
        body = dimension.model_dump(mode="json")
        if isinstance(dimension, Choice):
            body["choice"] = _listed(path, dimension.choice)
        when = body.pop("when")
        if isinstance(dimension, Choice) and not when:
            out[path] = _listed(path, dimension.choice)
        else:
            out[path] = {key: value for key, value in body.items() if value is not None} | (
                {"when": when} if when else {}
            )
    if spec.search.zipped:
        out["zip"] = [{path: _listed(path, listed) for path, listed in group.items()} for group in spec.search.zipped]
    return out


def _listed(path: str, values: tuple[Scalar, ...]) -> list[Any]:
    lists = [read_list(path, value) for value in values]
    return [list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value for value in lists]


_LINE_ENDS = "\x85\u2028\u2029"
"""Line ends of YAML 1.1 that are text in 1.2: both read them alike only if escaped."""


class _Dumper(yaml.SafeDumper):
    """Writes values that YAML 1.1 and 1.2 read alike: 6.0e-07 with a point, and quotes around `no` and '6e-7'."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Return True: equal values are written out each time, without anchors."""
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        """Quote text that YAML 1.2 would read as another type; PyYAML quotes those of YAML 1.1."""
        try:
            quoted = parse_scalar(data) != data or data == "None"
        except InvalidScalar:
            quoted = True
        style = '"' if any(line_end in data for line_end in _LINE_ENDS) else "'" if quoted else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_list_short(self, data: list[Any]) -> yaml.SequenceNode:
        """Write a list of scalars on one line."""
        flat = not any(isinstance(item, (dict, list)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_list_short)


_DEFAULTS = ", ".join(f"{metric} {bound}" for metric, bound in DEFAULT_BOUNDS.items())
Json = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> Json:
    """Return the JSON Schema of a sweep file. Rules between settings (one margin, valid corners) are the loader's."""
    definitions: Json = {}
    base = _model(TrialConfig, definitions)
    spec = SweepSpec.model_json_schema()["properties"]
    objective = {"type": "string", "enum": objective_metrics()}
    dimensions = [_model(kind, definitions) for kind in DIMENSION_KINDS.values()]
    for kind in DIMENSION_KINDS:
        definitions[DIMENSION_KINDS[kind].__name__]["required"] = [kind]
    listed = {"type": "array", "minItems": 1, "items": TypeAdapter(Scalar).json_schema()}
    one_list = {"type": "array", "items": TypeAdapter(Scalar).json_schema()}
    lists = {"type": "array", "minItems": 1, "items": {"anyOf": [TypeAdapter(Scalar).json_schema(), one_list]}}
    group = {"type": "object", "minProperties": 1, "propertyNames": {"enum": list(config_paths())}}
    zipped: Json = {"type": "array", "items": group | {"additionalProperties": listed}}
    several: Json = {
        "anyOf": [
            objective,
            {"type": "array", "minItems": 1, "uniqueItems": True, "items": objective},
            {"type": "null"},
        ]
    }
    bound: Json = {"type": "string", "pattern": BOUND_PATTERN}
    bounds: Json = {"anyOf": [bound, {"type": "array", "minItems": 1, "items": bound}, {"enum": [OFF, False]}]}
    given: Json = {"type": "object", "minProperties": 1, "propertyNames": {"enum": list(config_paths())}}
    given["additionalProperties"] = TypeAdapter(Scalar).json_schema()
    properties: Json = {
        "name": spec["name"] | {"description": "Name of the sweep's folder and of its run in MLflow."},
        "description": {"type": "string", "description": "One line about the sweep."},
        "base": base | {"description": "One complete trial; the search changes some of its settings."},
        "search": {
            "description": "Dotted path of a setting of base -> its values, as a list or a range.",
            "anyOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "properties": {
                        path: {"anyOf": [lists if path in list_settings() else listed, *dimensions]}
                        for path in config_paths()
                    }
                    | {"zip": zipped},
                    "additionalProperties": False,
                },
            ],
        },
        "enqueue": {
            "description": "Trials that run first; settings they do not name are as in base.",
            "anyOf": [{"type": "null"}, {"type": "array", "items": given}],
        },
        "sampler": _by_kind(SAMPLERS, definitions) | {"description": "Which settings are tried; grid by default."},
        "repeats": spec["repeats"],
        "warm_start": spec["warm_start"] | {"description": "A finished sweep whose trials the sampler learns from."},
        "order": _by_kind(ORDERS, definitions)
        | {"description": "Which results a proposal or a pruning decision may depend on; reproducible by default."},
        "maximize": several | {"description": f"The objective, or several. By default {COMPARISON_METRIC}."},
        "minimize": several | {"description": "A metric to minimize, or several; with maximize: a Pareto front."},
        "require": {
            "description": "Metric -> a bound that a trial must keep at its end to be the best: >= or <= and a number, "
            "or initial (the initial model's value), also with + or - a number or multiplied by one (2 * initial); or "
            f"a list of bounds; or off. Metrics that it does not name keep their default: {_DEFAULTS}. off: no bound.",
            "default": DEFAULT_BOUNDS,
            "anyOf": [
                {"enum": [OFF, "none", False, None]},
                {"type": "object", "propertyNames": objective, "additionalProperties": bounds},
            ],
        },
        "pruner": _by_kind(PRUNERS, definitions)
        | {
            "description": f"Which trials are stopped early; by default median from {PRUNED_FROM} trials on, else none."
        },
        "guard": {
            "description": "Stops trials that have diverged; on by default.",
            "anyOf": [{"enum": ["off", False, None]}, _model(GuardConfig, definitions)],
        },
        "finalists": _or_null(_model(Finalists, definitions)),
        "budget": _or_null(_model(Budget, definitions)),
        "resources": _or_null(_model(Resources, definitions)),
        "tracking": _or_null(_model(Tracking, definitions)),
        "notify": _or_null(_model(Notify, definitions)),
        "judge": _or_null(_model(JudgeConfig, definitions)),
        "sft": _or_null(_model(SftStage, definitions)),
        "keep_models": spec["keep_models"]
        | {"description": "How many of the best trials' final weights stay on disk."},
        "storage": spec["storage"],
        "mirror": spec["mirror"],
    }
    _shorthands(definitions)
    return {
        "$schema": DIALECT,
        "title": "A sweep of prefsweep",
        "type": "object",
        "properties": properties,
        "patternProperties": {"^x-": {"description": "Anchors that other sections share; no part of the sweep."}},
        "required": ["name", "base"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _model(model: type[BaseModel], definitions: Json) -> Json:
    """A reference to the model's schema, which is added to `definitions` with the schemas it refers to."""
    own = model.model_json_schema()
    definitions |= own.pop("$defs", {})
    definitions[model.__name__] = own
    return {"$ref": f"#/$defs/{model.__name__}"}


def _by_kind(kinds: dict[str, type[BaseModel]], definitions: Json) -> Json:
    """A name alone, or a mapping with its kind."""
    models = [_model(model, definitions) for model in kinds.values()]
    for model in kinds.values():
        definitions[model.__name__]["required"] = ["kind", *_required(definitions[model.__name__])]
    return {"anyOf": [{"enum": [*kinds, None]}, *models]}


def _required(own: Json) -> list[str]:
    return [key for key in own.get("required", []) if key != "kind"]


def _shorthands(definitions: Json) -> None:
    """Add the shorthands, which validators accept and pydantic's schema does not show."""
    trial = definitions["TrialConfig"]["properties"]
    trial["model"] = _or_text(trial["model"], "A hub name or a folder; short for name_or_path.")
    data = definitions["DataConfig"]["properties"]
    sources = data["train"]["items"]["anyOf"]
    source: Json = {"anyOf": [{"type": "string", "description": "A file; short for path."}, *sources]}
    several = {"type": "array", "minItems": 1, "items": source}
    data["train"] = _annotations(data["train"]) | {"anyOf": [*source["anyOf"], several]}
    data["eval"] = _annotations(data["eval"]) | {"anyOf": [*source["anyOf"], several, {"type": "null"}]}
    for rule in definitions["GuardConfig"]["properties"].values():
        rule["anyOf"] = [*rule["anyOf"], {"enum": ["off", False]}]
    wrapped = definitions["PatientPruner"]["properties"]["wrapped"]
    names = [kind for kind in PRUNERS if kind not in ("none", "patient")]
    definitions["PatientPruner"]["properties"]["wrapped"] = _annotations(wrapped) | {
        "anyOf": [{"enum": names}, *wrapped["anyOf"]]
    }
    training, resources = definitions["TrainingConfig"]["properties"], definitions["Resources"]["properties"]
    for name in (path.partition(".")[2] for path in AUTO_TRAINING):
        otherwise = json.dumps(training[name]["default"]).strip('"')
        training[name] = _or_auto(training[name])
        training[name]["description"] += f" auto: chosen for the GPUs at hand; without GPUs {otherwise}."
    resources["gpus_per_trial"] = _or_auto(resources["gpus_per_trial"])
    judge = definitions["JudgeConfig"]["properties"]
    judge["reward_model"] = _or_text(judge["reward_model"], "A hub name or a folder; short for name_or_path.")
    # A loss without `kind` is the default one: for the others `kind` is required, else both would match.
    loss = TrialConfig.model_fields["loss"]
    for member in models_in(loss.annotation):
        if member is not type(loss.default):
            definitions[member.__name__]["required"] = ["kind"]


def _or_text(own: Json, description: str) -> Json:
    return {"anyOf": [{"type": "string", "description": description}, own]}


def _or_auto(own: Json) -> Json:
    members = own.get("anyOf") or [{key: value for key, value in own.items() if key not in _annotations(own)}]
    return _annotations(own) | {"anyOf": [{"const": AUTO}, *members], "default": AUTO}


def _annotations(own: Json) -> Json:
    return {key: value for key, value in own.items() if key in ("description", "title", "default")}


def _or_null(own: Json) -> Json:
    return {"anyOf": [own, {"type": "null"}]}
