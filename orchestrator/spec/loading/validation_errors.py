"""Converts errors of YAML and of pydantic to findings with the file's own lines and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from orchestrator.errors import SpecError, SpecProblem, closest_match
from trainer.config.trial import STORED
from trainer.config.yaml_files import Document, InvalidYaml, Location, parse_yaml, read_yaml

M = TypeVar("M", bound=BaseModel)

_EXPECTED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}
SOURCE_MODELS = {"FileSource": "path", "HubSource": "dataset", "GeneratedSource": "generated"}
"""Each kind of data source and its key."""
UNKNOWN_KEY = "unknown key"
NOT_A_MAPPING = "must be a mapping"
NONE_PROBLEM = "None is text in YAML"
_BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}


def read_document(path: Path) -> Document:
    """Parse a YAML file. Raises SpecError with all findings."""
    try:
        return read_yaml(path)
    except InvalidYaml as error:
        known = () if path.is_file() or not path.parent.is_dir() else sorted(p.name for p in path.parent.glob("*.y*ml"))
        near = closest_match(path.name, known)
        raise _spec_error(error, f"did you mean {path.parent / near}?" if near else "") from None


def parse_document(text: str, source: str) -> Document:
    """Parse YAML 1.2; `source` is the file's name in findings. Raises SpecError with all findings."""
    try:
        return parse_yaml(text, source)
    except InvalidYaml as error:
        raise _spec_error(error) from None


def _spec_error(error: InvalidYaml, hint: str = "") -> SpecError:
    return SpecError([SpecProblem(p.where, p.path, p.problem, hint) for p in error.problems])


def describe_value(value: Any) -> str:
    """Return a value as YAML writes it, shortened."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:60]!r}..."
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return str(value)


class ErrorCollector:
    """Collects findings; `validate` builds a pydantic model or adds its errors."""

    def __init__(
        self,
        document: Document,
        *,
        is_new: bool = True,
        explain: Callable[[str, Location, Any], str] = lambda _problem, _loc, _value: "",
    ) -> None:
        """Collect findings of a file.

        Args:
            document: The parsed file.
            is_new: A user's file, in which values that are no longer allowed are refused.
            explain: The form to write, by the problem, its place and the file's value there; "" if it is not known.
        """
        self.document, self.is_new, self._explain = document, is_new, explain
        self.items: list[SpecProblem] = []
        self.explained: set[Location] = set()
        """Places whose value is known to be wrong: what pydantic says of it is left out."""

    def add(self, loc: Location, problem: str, hint: str = "") -> None:
        """Add a finding at this location of the file."""
        path = ".".join(map(str, self.document.as_written(loc)))
        self.items.append(SpecProblem(self.document.location(loc), path, problem, hint))

    def unknown_key(self, loc: Location, known: list[str]) -> None:
        """Add a finding for an unknown key: the form to write, else the most similar known key or all of them."""
        near = closest_match(str(loc[-1]), known)
        hint = f"did you mean {near}?" if near else f"valid: {', '.join(known)}"
        self.add(loc, UNKNOWN_KEY, self.form(UNKNOWN_KEY, loc) or hint)

    def form(self, problem: str, loc: Location) -> str:
        """Return what to write instead of the file's value at this place; "" if it is not known."""
        return self._explain(problem, loc, self.value_at(loc))

    def value_at(self, loc: Location) -> Any:
        """Return the file's value at this place; None without one."""
        value = self.document.value
        for part in loc:
            if isinstance(value, dict):
                value = cast(dict[Any, Any], value).get(part)
            elif isinstance(value, tuple) and isinstance(part, int) and part < len(cast(tuple[Any, ...], value)):
                value = cast(Any, value[part])
            else:
                return None
        return value

    def validate(
        self,
        model: type[M],
        value: Any,
        loc: Location,
        to_file_location: Callable[[Location], Location] = lambda inner: inner,
        *,
        already_reported: frozenset[str] = frozenset(),
        invalid: frozenset[Location] = frozenset(),
    ) -> M | None:
        """Return `model` built from `value`, or None after its errors were added.

        Args:
            model: The pydantic type.
            value: The parsed value at `loc` of the file.
            loc: Location in the file.
            to_file_location: Maps a path inside the model to the path in the file.
            already_reported: Keys that are missing because of errors that were added before.
            invalid: Locations below which errors were added before.
        """
        try:
            return model.model_validate(value, strict=True, context=None if self.is_new else STORED)
        except ValidationError as error:
            for inner, problem, hint in _error_messages(model, value, error):
                if (inner[:1] and inner[0] in already_reported) or any(inner[: len(w)] == w for w in invalid):
                    continue
                at = (*loc, *to_file_location(inner))
                if at not in self.explained:
                    self.add(at, problem, self.form(problem, at) or hint)
        return None


def first_error(model: type[BaseModel], error: ValidationError) -> tuple[Location, str, str]:
    """Return path, message and hint of the first error of a value that does not come from a file."""
    item = error.errors(include_url=False)[0]
    fields = [part for part in item["loc"] if not _is_member(model, part)]
    return (tuple(fields), *_error_message(model, item))


def value_problem(fields: Sequence[FieldInfo], value: Any) -> tuple[str, str] | None:
    """Return message and hint where none of a setting's fields (several where kinds of loss differ) takes the value."""
    found: tuple[str, str] | None = None
    for field in fields:
        try:
            create_model("Setting", value=(cast(Any, field.annotation), field)).model_validate(
                {"value": value}, strict=True, context=STORED
            )
        except ValidationError as error:
            found = found or _error_message(BaseModel, error.errors(include_url=False)[0])
        else:
            return None
    return found


def _is_member(model: type[BaseModel], part: str | int) -> bool:
    return any(part in (m.__name__, _kind(m)) for m in _all_models(model))


def _all_models(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [m for field in model.model_fields.values() for m in models_in(field.annotation)]
    return [model, *(deep for m in inner for deep in _all_models(m))]


def _error_messages(model: type[BaseModel], value: Any, error: ValidationError) -> list[tuple[Location, str, str]]:
    """One message per location: several errors of a union's members are joined with `or`."""
    at: dict[Location, list[tuple[str, str]]] = {}
    for item in error.errors(include_url=False):
        if _other_member(value, item["loc"]) or (item["type"] == "too_short" and item["input"]):
            continue  # a list is too short only without its invalid items, which have errors of their own
        clean = _clean_location(value, item)
        messages = _error_message(model, item)
        if messages not in at.setdefault(clean, []):
            at[clean].append(messages)
    return [
        (loc, " or ".join(p for p, _ in messages), next((h for _, h in messages if h), ""))
        for loc, messages in at.items()
    ]


def _other_member(value: Any, loc: tuple[str | int, ...]) -> bool:
    """Return whether the error is of another kind of source than the file's (no `dataset` of a local file)."""
    for part in loc:
        if part in SOURCE_MODELS and isinstance(value, dict):
            return SOURCE_MODELS[str(part)] not in value
        if isinstance(value, dict) and part in value:
            value = cast(Any, value[part])
        elif isinstance(value, tuple) and isinstance(part, int) and part < len(cast(tuple[Any, ...], value)):
            value = value[part]
    return False


def _clean_location(value: Any, item: ErrorDetails) -> Location:
    """Return the error's path without the names of union members, which are not in the file."""
    out: list[str | int] = []
    for index, part in enumerate(item["loc"]):
        last = index + 1 == len(item["loc"])
        if isinstance(value, dict) and part in value:
            value = cast(Any, value[part])
        elif isinstance(value, tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not (last and item["type"] == "missing"):
            continue
        out.append(part)
    return tuple(out)


def _error_message(model: type[BaseModel], item: ErrorDetails) -> tuple[str, str]:
    kind, given = item["type"], item["input"]
    context: Mapping[str, Any] = item.get("ctx", {})
    if kind == "extra_forbidden":
        known = known_keys(model, item["loc"][:-1])
        near = closest_match(str(item["loc"][-1]), known)
        return UNKNOWN_KEY, f"did you mean {near}?" if near else f"valid: {', '.join(known)}"
    if kind == "missing":
        return ("is missing: a range is [low, high]" if isinstance(item["loc"][-1], int) else "is required"), ""
    if kind == "literal_error":
        return _one_of(str(context["expected"]).replace(" or ", ", ").replace("'", ""), given)
    if kind == "union_tag_invalid":
        return _one_of(str(context["expected_tags"]).replace("'", ""), context["tag"])
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, not {describe_value(given)}", _meant_by(given, _EXPECTED[kind])
    if kind in _BOUNDS:
        bound = kind.replace("_", " ").removesuffix(" equal")
        least = {"greater_than_equal": "at least", "less_than_equal": "at most"}.get(kind, bound)
        return f"must be {least} {context[_BOUNDS[kind]]:g}, not {describe_value(given)}", ""
    if kind == "finite_number":
        return "must be a finite number", ""
    if kind == "value_error":
        return str(context["error"]), ""
    return item["msg"][:1].lower() + item["msg"][1:], ""


_YES, _NO, _NONE = ("yes", "y", "on"), ("no", "n", "off"), ("none", "nil", "nan", "undefined")


def _meant_by(given: Any, expected: str) -> str:
    """Return what to write for a word that is a value of YAML 1.1 or Python and text in YAML 1.2."""
    word = given.lower() if isinstance(given, str) else ""
    if word in _NONE:
        return "write null"
    if expected == _EXPECTED["bool_type"] and word in (*_YES, *_NO):
        return "write true" if word in _YES else "write false"
    return ""


def _one_of(listed: str, given: Any) -> tuple[str, str]:
    near = closest_match(str(given), listed.split(", "))
    return f"must be one of {listed}; not {describe_value(given)}", f"did you mean {near}?" if near else ""


def known_keys(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Return the keys of the model at this path, which is pydantic's and names union members."""
    here = [model]
    for part in loc:
        named = [m for m in here if m.__name__ == part or _kind(m) == part]
        if named:
            here = named
            continue
        fields = [m.model_fields[part].annotation for m in here if isinstance(part, str) and part in m.model_fields]
        if fields:
            here = [m for annotation in fields for m in models_in(annotation)]
    return list(dict.fromkeys(key for m in here for key in m.model_fields))


def _kind(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return every model inside a type: members of unions, annotations and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in models_in(part)]
