"""Write docs/configuration.md from the JSON Schema of sweep files: `make docs`.

Types, defaults and meanings are the schema's; the examples are those of configuration_examples.yaml.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.spec.loading.serialization import schema
from orchestrator.spec.sweep_spec import SECTION_ORDER

PAGE = Path(__file__).parent / "configuration.md"
_HIDDEN = ("kind",)
_LINKS = {
    "data": "[data](data.md)",
    "lora": "[models](models.md#adapters)",
    "engine": "[engines](engines.md)",
    "sampler": "[search](search.md#samplers)",
    "pruner": "[search](search.md#pruners)",
    "order": "[search](search.md#which-results-a-decision-may-use)",
    "budget": "[operating](operating.md#budget)",
    "notify": "[operating](operating.md#notices)",
    "resources": "[clusters](clusters.md#one-trial-on-several-gpus)",
    "storage": "[clusters](clusters.md)",
    "mirror": "[clusters](clusters.md#copies-at-a-url)",
    "judge": "[judge](judge.md)",
}
"""Where a section is explained."""

EXAMPLES = Path(__file__).parent / "configuration_examples.yaml"
"""Parts of sweep files by section: `--- # NAME` begins each."""


def read_examples() -> dict[str, list[str]]:
    """Section (`top` for the whole file) -> its examples."""
    parts = re.split(r"^--- # (\w+)\n", EXAMPLES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    out: dict[str, list[str]] = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        out.setdefault(name, []).append(text.strip())
    return out


_FILE = """\
## The file: variables, shared parts

```yaml
x-training: &training {max_steps: 300, warmup_ratio: 0.1}
name: ${USER:-someone}-simpo
base:
  model: ${MODELS:-org}/model
  data: {train: "${DATA:-.}/pairs.jsonl"}
  training:
    <<: *training
    learning_rate: 6e-7
sft:
  training: {<<: *training, learning_rate: 2e-5}
```

`${NAME}` is the environment variable's value and `${NAME:-default}` its default where it is not set or empty, in
paths, URLs and names: of the sweep, models, tokenizers, chat templates, data, tracking, storage, mirror, the judge's
endpoint and warm start, and in `search` and `enqueue` of such settings. The expanded text is what the sweep records
and what a resume uses. `$${` is the text `${`. A variable that is not set, that looks like a secret (by its name, its
value or its place in a URL) or that stands anywhere else is an error with its line; `notify.command` and
`description` are left as they are. Inside `{...}` and `[...]`, YAML wants quotes around `${...}`.

Keys at the top that begin with `x-` hold anchors for other sections and are no part of the sweep. `<<: *name`, or
`<<: [*one, *other]`, adds the keys that a mapping lacks; mistakes in them are reported where they are written. Words
are YAML 1.2's: `true`, `false` and `null`; `yes`, `no` and `None` are text and refused where they are no value.
"""
"""What is not in the schema: variables, anchors and merge keys."""


def make_page() -> str:
    """The whole page."""
    whole, examples = schema(), read_examples()
    definitions: dict[str, Any] = whole["$defs"]
    base = definitions["TrialConfig"]
    out = [
        "# Configuration",
        "",
        "<!-- Written by `make docs` from the schema. Change the descriptions in the source instead. -->",
        "",
        "Every key of a sweep's YAML. `orchestrate schema` prints the same for editors, `--set PATH=VALUE` changes any",
        "key from the command line (`training.learning_rate` is short for `base.training.learning_rate`), and",
        "`orchestrate plan FILE` reports every mistake at once, with its line. `6e-7` is a number here.",
        "",
        *_table(whole, definitions, required=whole["required"], order=SECTION_ORDER),
        "",
        *_example(examples["top"][0]),
        *_FILE.splitlines(),
        "",
        "## base: one trial",
        "",
        _sentence(base),
        "",
        *_table(base, definitions, required=base.get("required", [])),
        "",
    ]
    for name, own in base["properties"].items():
        out += _section(f"base.{name}", name, own, definitions, examples)
    out += _search_section(whole["properties"]["search"], definitions, examples["search"])
    for name in SECTION_ORDER:
        if name in examples and name != "search":
            out += _section(name, name, whole["properties"][name], definitions, examples)
    return "\n".join(out).rstrip() + "\n"


def _section(
    title: str,
    name: str,
    own: Mapping[str, Any],
    definitions: Mapping[str, Any],
    examples: Mapping[str, list[str]],
) -> list[str]:
    members = list(_members(own, definitions))
    out = [f"## {title}", ""]
    if not members:
        out += [_meaning(own, definitions), ""]
    if name in _LINKS:
        out += [f"More: {_LINKS[name]}.", ""]
    for member in members:
        out += _member(member, definitions, alone=len(members) == 1)
    for example in examples[name]:
        out += _example(example)
    return out


def _member(member: Mapping[str, Any], definitions: Mapping[str, Any], *, alone: bool) -> list[str]:
    """One model: its sentence, its table, and the models inside it."""
    out = [_sentence(member) if alone else f"**{_label(member)}**: {_sentence(member)}", ""]
    table = _table(member, definitions, required=member.get("required", []))
    if table:
        out += [*table, ""]
    shown: list[str] = []
    for name, own in member["properties"].items():
        if name == "wrapped" or member["title"] in ("SftStage",):
            continue  # models that have their own section
        for inner in _members(own, definitions):
            if inner["title"] in shown:
                continue
            shown.append(inner["title"])
            out += [
                f"**{', '.join(filter(None, [f'`{name}`', _label(inner)]))}**: {_sentence(inner)}",
                "",
                *_table(inner, definitions, inner.get("required", [])),
                "",
            ]
    return out


def _search_section(own: Mapping[str, Any], definitions: Mapping[str, Any], examples: list[str]) -> list[str]:
    out = ["## search", "", f"{own['description']} `zip` holds lists that advance together.", ""]
    for name in ("Choice", "Uniform", "LogUniform", "IntUniform"):
        out += _member(definitions[name], definitions, alone=False)
    return [*out, *(line for example in examples for line in _example(example))]


def _members(own: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The models that a value may be."""
    if "$ref" in own:
        yield definitions[own["$ref"].rsplit("/", 1)[-1]]
    elif "oneOf" in own and "properties" not in own:
        for option in own["oneOf"]:
            yield from _members(option, definitions)
    elif own.get("type") == "array" and "items" in own:
        yield from _members(own["items"], definitions)
    for option in own.get("anyOf", ()):
        if option.get("type") != "array":
            yield from _members(option, definitions)


def _label(member: Mapping[str, Any]) -> str:
    kind = member["properties"].get("kind", {}).get("const")
    required = [key for key in member.get("required", ()) if key != "kind"]
    return f"`kind: {kind}`" if kind else f"`{required[0]}:`" if required else ""


def _table(
    model: Mapping[str, Any], definitions: Mapping[str, Any], required: list[str], order: tuple[str, ...] = ()
) -> list[str]:
    names = [name for name in (order or model["properties"]) if name not in _HIDDEN]
    if not names:
        return []
    rows = ["| key | type and valid values | default | meaning |", "|---|---|---|---|"]
    for name in names:
        own = model["properties"][name]
        default = "required" if name in required else _default(own)
        rows.append(f"| `{name}` | {_type(own, definitions)} | {default} | {_meaning(own, definitions)} |")
    return rows


def _default(own: Mapping[str, Any]) -> str:
    if "default" not in own:
        return "none"
    value = own["default"]
    if isinstance(value, dict):
        return "its own defaults"
    return "none" if value is None or value in ((), [], "") else f"`{json.dumps(value)}`".replace('"', "")


def _meaning(own: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    text = own.get("description") or next((_sentence(member) for member in _members(own, definitions)), "")
    assert text, f"no description: {own}"
    return " ".join(text.split()).replace("|", "\\|")


def _sentence(model: Mapping[str, Any]) -> str:
    """The first paragraph of a model's docstring."""
    return " ".join(model["description"].split("\n\n")[0].split())


def _type(own: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(_types(own, definitions)))
    if any(option.get("enum") for option in own.get("anyOf", ())):  # a name alone, or a mapping with it
        names = ["a mapping with `kind`" if name.startswith("`{kind") else name for name in names]
    names = ["a list of them" if name == f"list of {names[0]}" else name for name in dict.fromkeys(names)]
    return " or ".join([*(name for name in names if name != "null"), *(["null"] if "null" in names else [])])


def _types(own: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    for option in (*own.get("anyOf", ()), *own.get("oneOf", ())):
        yield from _types(option, definitions)
    if "$ref" in own:
        member = definitions[own["$ref"].rsplit("/", 1)[-1]]
        kind = member["properties"].get("kind", {}).get("const")
        yield f"`{{kind: {kind}, ...}}`" if kind else "mapping"
    elif "enum" in own:
        yield ", ".join(
            "null" if value is None else f"`{str(value).lower() if value is False else value}`" for value in own["enum"]
        )
    elif "const" in own:
        yield f"`{own['const']}`"
    elif own.get("type") == "array":
        if "prefixItems" in own:
            yield "[number, number]"
        else:
            yield f"list of {_type(own['items'], definitions)}"
    elif "type" in own:
        yield _scalar(own)


def _scalar(own: Mapping[str, Any]) -> str:
    if own["type"] == "null":
        return "null"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "object": "mapping",
    }
    bounds = [
        f"{sign} {own[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in own
    ]
    return " ".join([words[own["type"]], *(["and ".join(f"{bound} " for bound in bounds).strip()] if bounds else [])])


def _example(text: str) -> list[str]:
    yaml.safe_load(text)
    return ["```yaml", text.strip(), "```", ""]


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
