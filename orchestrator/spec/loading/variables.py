"""`${NAME}` and `${NAME:-default}` in the paths, URLs and names of a sweep file; `$${` is the text `${`.

The expanded text is what the sweep records, so that a variable that holds a secret, or stands where one belongs, is
refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from orchestrator.redaction import is_secret_name, redact
from orchestrator.spec.loading.validation_errors import ErrorCollector
from trainer.config.yaml_files import Location

_SOURCE_KEYS = ("path", "dataset", "subset", "split", "revision")
_MODEL = tuple(f"model.{key}" for key in ("name_or_path", "tokenizer", "revision"))
_NAMED: frozenset[str] = frozenset(
    (
        *("name", "storage", "mirror", "warm_start", "tracking.uri", "tracking.experiment", "tracking.artifacts"),
        *("judge.reward_model.name_or_path", "judge.reward_model.revision", "judge.prompts_from"),
        *("judge.endpoint.url", "judge.endpoint.model", "base.model", "judge.reward_model"),
        *(f"base.{path}" for path in _MODEL),
        *(f"{at}.data.{side}" for at in ("base", "sft") for side in ("train", "eval")),
        *(f"{at}.data.{side}.{key}" for at in ("base", "sft") for side in ("train", "eval") for key in _SOURCE_KEYS),
        *(f"{at}.data.chat_template" for at in ("base", "sft")),
        *(f"judge.prompts_from.{key}" for key in _SOURCE_KEYS),
    )
)
"""Where a file names a path, a URL or a name, without the positions in lists."""
_SEARCHED = frozenset((*_MODEL, "data.chat_template"))
_LITERAL = ("description", "notify.command", "base.data.train.columns", "base.data.eval.columns")
"""Text in which `${` is left as it is: a command's own shell expands it."""

_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\}|\$\{")
_IN_CREDENTIALS = re.compile(r"://[^/\s]*\$\{[^}]*\}[^/\s]*@|[?&][^=&\s]*=[^&\s]*\$\{")
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{12,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|glpat-[\w-]{12,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,})"
)
_FORMS = "write ${NAME}, or ${NAME:-default}; $${ for the text itself"


def expand_variables(
    problems: ErrorCollector, tree: dict[str, Any], environment: Mapping[str, str] | None = os.environ
) -> list[str]:
    """Expand the variables of the file's paths, URLs and names in place; return a notice for each variable.

    `environment`: their values; None: none is read, and only defaults are expanded. Added to `findings`: variables that
    are not set, that look like secrets, or that stand at any other place.
    """
    notices: list[str] = []

    def expand(loc: Location, text: str) -> str:
        """Return the text with its variables' values; a variable where none is allowed is a problem."""
        if is_name(loc, text):
            return _expand(problems, loc, text, notices, environment)
        match = _VARIABLE.search(text)
        if match and match["name"] and not _plain(loc).startswith(_LITERAL) and not _is_template(loc, text):
            problems.add(
                loc, f"{match[0]} is text here: variables are expanded in paths, URLs and names only",
                f"write the value, or give --set {_option(loc)}=${match['name']}",
            )  # fmt: skip
            problems.explained.add(loc)
        return text

    tree.update(cast(dict[str, Any], map_texts(tree, expand)))
    return list(dict.fromkeys(notices))


def keep_variables(tree: dict[str, Any]) -> None:
    """Read a stored file's names in place: `$${` is the text `${`, and nothing is expanded."""
    tree.update(map_texts(tree, lambda loc, text: text.replace("$${", "${") if is_name(loc, text) else text))


def escape(text: str) -> str:
    """Return the text as a file must write it, so that loading gives it back."""
    return text.replace("${", "$${")


def escape_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a file's tree whose paths, URLs and names are escaped."""
    return cast(dict[str, Any], map_texts(tree, lambda loc, text: escape(text) if is_name(loc, text) else text))


def map_texts(tree: Any, change: Callable[[Location, str], str], loc: Location = ()) -> Any:
    """Return the tree with each text changed."""
    match tree:
        case str():
            return change(loc, tree)
        case dict():
            group = cast(dict[str, Any], tree)
            return {key: map_texts(value, change, (*loc, key)) for key, value in group.items()}
        case list() | tuple():
            items = [map_texts(each, change, (*loc, i)) for i, each in enumerate(cast(list[Any], tree))]
            return items if isinstance(tree, list) else tuple(items)
        case _:
            return tree


def is_name(loc: Location, text: str) -> bool:
    """Return whether the text at this place of a file is a path, a URL or a name."""
    if _is_template(loc, text):
        return False
    if loc[:1] in (("search",), ("enqueue",)):
        return any(part in _SEARCHED for part in loc)
    return _plain(loc) in _NAMED


def _is_template(loc: Location, text: str) -> bool:
    """Return whether this is a chat template itself and not the name of a file with it."""
    return any(str(part).endswith("chat_template") for part in loc) and any(mark in text for mark in ("{{", "{%", "\n"))


def _plain(loc: Location) -> str:
    return ".".join(part for part in loc if isinstance(part, str))


def _option(loc: Location) -> str:
    path = ".".join(map(str, loc))
    return path.removeprefix("base.")


def _expand(
    problems: ErrorCollector, loc: Location, text: str, notices: list[str], environment: Mapping[str, str] | None
) -> str:
    if "${" not in text:
        return text
    known: Mapping[str, str] = environment or {}
    wrong: list[tuple[str, str]] = []
    values: list[str] = []

    def value_of(match: re.Match[str]) -> str:
        """Return the value of a matched variable; an unusable one stays as written and is listed in `wrong`."""
        name, default = match["name"], match["default"]
        if match[0] == "$${":
            return "${"
        if name is None:
            wrong.append((f"{text[match.start() :][:40]} is no variable", _FORMS))
            return match[0]
        if is_secret_name(name):
            wrong.append((f"${{{name}}} looks like a secret by its name", _RECORDED))
            return match[0]
        value = known.get(name) or default
        if not value and environment is None:
            advice = f"write the value, or ${{{name}:-default}}"
            wrong.append((f"${{{name}}}: a submitted file reads no environment variables", advice))
            return match[0]
        if not value:
            state = "is empty" if name in known else "is not set"
            wrong.append((f"the environment variable {name} {state}", f"set it, or write ${{{name}:-default}}"))
            return match[0]
        if redact(value) != value or _TOKEN.search(value):
            wrong.append((f"the value of ${{{name}}} contains a password or a token", _RECORDED))
            return match[0]
        values.append(f"{name} is {value}" if known.get(name) else f"{name} is not set, its default is {value}")
        return value

    if _IN_CREDENTIALS.search(text):
        wrong.append(("a variable stands where a URL has its password or key", _RECORDED))
        expanded = text
    else:
        expanded = _VARIABLE.sub(value_of, text)
        if not wrong and redact(expanded) != expanded:
            wrong.append(("the expanded text contains a password", _RECORDED))
    for problem, hint in wrong:
        problems.add(loc, problem, hint)
    if wrong:
        problems.explained.add(loc)
        return text
    path = ".".join(map(str, problems.document.as_written(loc)))
    notices += [f"{path}: {value}" for value in values]
    return expanded


_RECORDED = (
    "what stands here is recorded in the sweep's folder and in MLflow; keys and passwords stay in the environment: "
    "judge.endpoint.api_key_env, notify.webhook_env, $PGPASSWORD, MLFLOW_TRACKING_PASSWORD"
)
