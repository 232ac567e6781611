"""The JSON Schema of the sweep's file, for editors: shorthands included, unknown keys refused."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, TypeAdapter

from orchestrator.spec.dimensions import KINDS
from orchestrator.spec.guard import GuardConfig
from orchestrator.spec.judge import JudgeConfig
from orchestrator.spec.leaves import leaves
from orchestrator.spec.methods_door import ORDERS, PRUNERS, SAMPLERS
from orchestrator.spec.notify import Notify
from orchestrator.spec.objective import goals
from orchestrator.spec.problems import models_in
from orchestrator.spec.space import Scalar
from orchestrator.spec.sweep import Budget, Resources, SftStage, SweepSpec, Tracking
from trainer.config import TrialConfig
from trainer.metrics import COMMON_RULER

Json = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> Json:
    """What a sweep's file may say. Rules between leaves (one margin, legal corners) are the loader's."""
    definitions: Json = {}
    base = _model(TrialConfig, definitions)
    spec = SweepSpec.model_json_schema()["properties"]
    goal = {"type": "string", "enum": goals()}
    dimensions = [_model(kind, definitions) for kind in KINDS.values()]
    for kind in KINDS:
        definitions[KINDS[kind].__name__]["required"] = [kind]
    listed = {"type": "array", "minItems": 1, "items": TypeAdapter(Scalar).json_schema()}
    group = {"type": "object", "minProperties": 1, "propertyNames": {"enum": list(leaves())}}
    zipped: Json = {"type": "array", "items": group | {"additionalProperties": listed}}
    several: Json = {
        "anyOf": [goal, {"type": "array", "minItems": 1, "uniqueItems": True, "items": goal}, {"type": "null"}]
    }
    given: Json = {"type": "object", "minProperties": 1, "propertyNames": {"enum": list(leaves())}}
    given["additionalProperties"] = TypeAdapter(Scalar).json_schema()
    properties: Json = {
        "name": spec["name"] | {"description": "Of the sweep's folder and its run in MLflow."},
        "description": {"type": "string"},
        "base": base | {"description": "One whole trial; the search changes leaves of it."},
        "search": {
            "description": "Dotted path of a leaf of base -> its values, as a list or a range.",
            "anyOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "properties": {leaf: {"anyOf": [listed, *dimensions]} for leaf in leaves()} | {"zip": zipped},
                    "additionalProperties": False,
                },
            ],
        },
        "enqueue": {
            "description": "Trials that run first; leaves they do not name are as in base.",
            "anyOf": [{"type": "null"}, {"type": "array", "items": given}],
        },
        "sampler": _by_kind(SAMPLERS, definitions),
        "warm_start": spec["warm_start"] | {"description": "A finished sweep whose trials the sampler learns from."},
        "order": _by_kind(ORDERS, definitions),
        "maximize": several | {"description": f"The goal, or several. When none is given: {COMMON_RULER}."},
        "minimize": several,
        "pruner": _by_kind(PRUNERS, definitions),
        "guard": {"anyOf": [{"enum": ["off", False, None]}, _model(GuardConfig, definitions)]},
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
        "required": ["name", "base"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _model(model: type[BaseModel], definitions: Json) -> Json:
    """A reference to the model's schema, which goes to the definitions with all it needs."""
    own = model.model_json_schema()
    definitions |= own.pop("$defs", {})
    definitions[model.__name__] = own
    return {"$ref": f"#/$defs/{model.__name__}"}


def _by_kind(kinds: dict[str, type[BaseModel]], definitions: Json) -> Json:
    """A name alone, or a mapping that says its kind."""
    models = [_model(model, definitions) for model in kinds.values()]
    for model in kinds.values():
        definitions[model.__name__]["required"] = ["kind", *_needed(definitions[model.__name__])]
    return {"anyOf": [{"enum": [*kinds, None]}, *models]}


def _needed(own: Json) -> list[str]:
    return [key for key in own.get("required", []) if key != "kind"]


def _shorthands(definitions: Json) -> None:
    """What the models' own validators accept, which pydantic cannot know."""
    trial = definitions["TrialConfig"]["properties"]
    trial["model"] = _also_text(trial["model"], "A hub name or a folder; short for name_or_path.")
    data = definitions["DataConfig"]["properties"]
    sources = data["train"]["items"]["anyOf"]
    source: Json = {"anyOf": [{"type": "string", "description": "A file; short for path."}, *sources]}
    several = {"type": "array", "minItems": 1, "items": source}
    data["train"] = _kept(data["train"]) | {"anyOf": [*source["anyOf"], several]}
    data["eval"] = _kept(data["eval"]) | {"anyOf": [*source["anyOf"], several, {"type": "null"}]}
    for rule in definitions["GuardConfig"]["properties"].values():
        rule["anyOf"] = [*rule["anyOf"], {"enum": ["off", False]}]
    wrapped = definitions["PatientPruner"]["properties"]["wrapped"]
    names = [kind for kind in PRUNERS if kind not in ("none", "patient")]
    definitions["PatientPruner"]["properties"]["wrapped"] = _kept(wrapped) | {
        "anyOf": [{"enum": names}, *wrapped["anyOf"]]
    }
    judge = definitions["JudgeConfig"]["properties"]
    judge["reward_model"] = _also_text(judge["reward_model"], "A hub name or a folder; short for name_or_path.")
    # Without its kind a loss is the default one: of the others the kind must be said, or both would fit.
    loss = TrialConfig.model_fields["loss"]
    for member in models_in(loss.annotation):
        if member is not type(loss.default):
            definitions[member.__name__]["required"] = ["kind"]


def _also_text(own: Json, description: str) -> Json:
    return {"anyOf": [{"type": "string", "description": description}, own]}


def _kept(own: Json) -> Json:
    return {key: value for key, value in own.items() if key in ("description", "title", "default")}


def _or_null(own: Json) -> Json:
    return {"anyOf": [own, {"type": "null"}]}
