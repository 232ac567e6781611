"""`FileRights`: what of this machine a sweep file may name, for files of people who have no account on it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.loading.search_section import location_of
from orchestrator.spec.loading.validation_errors import ErrorCollector
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import DataConfig, FileSource, GeneratedSource, HubSource, ModelConfig, Source
from trainer.config.yaml_files import Document, Location

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""Of models and data sets: `name` or `organization/name`, which in an empty folder is no path."""
_MODEL, _TOKENIZER, _TEMPLATE = "model.name_or_path", "model.tokenizer", "data.chat_template"
_MOST_ROWS = 10_000_000
_MOST_PARAMETERS = 2_000_000_000
"""Limits of generated rows and models, which need no download that would bound them."""


@dataclass(frozen=True, slots=True)
class FileRights:
    """What a sweep file may name on this machine."""

    folders: tuple[Path, ...]
    """Relative file names are looked up in these folders, in this order."""
    environment: Mapping[str, str] | None
    """What `${NAME}` stands for; None: no variable is read, and only `${NAME:-default}` is expanded."""
    is_closed: bool = False
    """Whether files outside of `folders` are refused, without looking whether they exist."""
    advice: str = ""
    """Added to such a refusal: who opens another folder, and how."""
    forbidden: Mapping[str, str] | None = None
    """Sections and their settings that the file must not have, each with the reason."""
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names in the file that stand for other paths, as of files that were uploaded with it."""

    @classmethod
    def of_command(cls, folder: Path) -> FileRights:
        """Return the rights of a user of this machine: names relative to the file's `folder`, then to the current."""
        try:
            folders = (folder, Path.cwd())
        except FileNotFoundError:  # the working directory was removed
            folders = (folder,)
        return cls(folders, os.environ)

    def candidates(self, given: str) -> list[Path]:
        """Return the absolute paths that a name may mean; of a closed file only those inside its folders.

        Links are followed only where the written path is inside, so that no answer depends on other files.
        """
        given = self.aliases.get(given, given)
        if "\0" in given:
            return []
        if not self.is_closed:
            try:
                path = Path(given).expanduser()
            except RuntimeError:  # ~name of an unknown user
                path = Path(given)
            return list(dict.fromkeys((folder / path).resolve() for folder in self.folders))
        found: dict[Path, None] = {}
        for folder in self.folders:
            written = Path(os.path.normpath(folder / given))
            if not given.startswith("~") and self.contains(written) and self.contains(resolved := _resolved(written)):
                found[resolved] = None
        return list(found)

    def contains(self, path: Path) -> bool:
        """Return whether an absolute path is one of the folders or inside one."""
        return any(path.is_relative_to(folder) for folder in self.folders)

    def outside(self, given: str) -> tuple[str, str]:
        """Return problem and hint for a name that no folder contains."""
        return f"{given} is outside of the folders that this file may read", self.advice

    def with_names_of(self, spec: SweepSpec) -> FileRights:
        """Return the rights to change a stored sweep: the files that it names already, and no setting is forbidden.

        `check_forbidden` checks what was changed.
        """
        if not self.is_closed:
            return replace(self, forbidden=None)
        named, sources = _names_in(spec)
        names = [value for _, _, value in named] + [each.path for _, each in sources if isinstance(each, FileSource)]
        own = dict.fromkeys(Path(name) for name in names if isinstance(name, str) and name.startswith("/"))
        return replace(self, folders=(*self.folders, *own), forbidden=None)

    def remove_forbidden(self, problems: ErrorCollector, tree: dict[str, Any]) -> None:
        """Report the settings that the file must not have; remove their sections, so that the others are checked."""
        found: set[str] = set()
        for path, reason in (self.forbidden or {}).items():
            section, _, name = path.partition(".")
            given: Any = tree.get(section)
            if name:
                given = cast(dict[str, Any], given).get(name) if isinstance(given, dict) else None
            if given is not None:
                problems.add(tuple(path.split(".")), "is not allowed in this file", reason)
                found.add(section)
        for section in found:
            del tree[section]


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links, a name too long
        return path


def check_names(spec: SweepSpec, rights: FileRights, document: Document) -> None:
    """Check every name of a loaded sweep whose file is closed, wherever it stands: base, search, enqueue, judge, SFT.

    Raises:
        SpecError: a name is neither the hub's nor in the folders, or what is generated is too large.
    """
    problems = [
        SpecProblem(document.location(loc), ".".join(map(str, document.as_written(loc))), *problem)
        for loc, problem in _name_problems(spec, rights)
    ]
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))


def check_settings(rights: FileRights, settings: Mapping[str, Any]) -> None:
    """Check the names among the settings of one trial, as `enqueue` and `clone` take them. Raises SpecError."""
    found = [
        SpecProblem(f"--set {path}={value}", path, *problem)
        for path, value in settings.items()
        if (problem := _problem_of(path, value, rights)) is not None
    ]
    if found:
        raise SpecError(found)


def check_forbidden(rights: FileRights, old: SweepSpec, new: SweepSpec, overrides: Sequence[str]) -> None:
    """Check that changes of a stored sweep leave the forbidden settings as they are. Raises SpecError."""
    before, after = (spec.model_dump(mode="json") for spec in (old, new))
    problems: list[SpecProblem] = []
    for path, reason in (rights.forbidden or {}).items():
        section = path.partition(".")[0]
        if _value_at(before, path) != _value_at(after, path):
            where = next((f"--set {one}" for one in overrides if one.strip().startswith(section)), "")
            problems.append(SpecProblem(where, path, "may not be changed here", reason))
    if problems:
        raise SpecError(problems)


def _value_at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = cast(dict[str, Any], tree).get(part) if isinstance(tree, dict) else None
    return tree


def _name_problems(spec: SweepSpec, rights: FileRights) -> Iterator[tuple[Location, tuple[str, str]]]:
    named, sources = _names_in(spec)
    for loc, path, value in named:
        if (problem := _problem_of(path, value, rights)) is not None:
            yield loc, problem
    for loc, source in sources:
        if (problem := _source_problem(source, rights)) is not None:
            yield loc, problem
    if (problem := _size_problem(spec.base.model)) is not None:
        yield ("base", "model", "generated"), problem


def _names_in(spec: SweepSpec) -> tuple[list[tuple[Location, str, Any]], list[tuple[Location, Source]]]:
    """Return the settings that name a model or a chat template, and the sources of data, with their places."""
    named: list[tuple[Location, str, Any]] = [
        (("base", "model", "name_or_path"), _MODEL, spec.base.model.name_or_path),
        (("base", "model", "tokenizer"), _TOKENIZER, spec.base.model.tokenizer),
        (("base", "data", "chat_template"), _TEMPLATE, spec.base.data.chat_template),
    ]
    sources: list[tuple[Location, Source]] = list(_sources(spec.base.data, "base"))
    if spec.sft is not None and spec.sft.data is not None:
        named.append((("sft", "data", "chat_template"), _TEMPLATE, spec.sft.data.chat_template))
        sources += _sources(spec.sft.data, "sft")
    if spec.judge is not None and spec.judge.prompts_from is not None:
        sources.append((("judge", "prompts_from"), spec.judge.prompts_from))
    if spec.judge is not None and spec.judge.reward_model is not None:
        loc = ("judge", "reward_model", "name_or_path")
        named.append((loc, _MODEL, spec.judge.reward_model.name_or_path))
    for path in (_MODEL, _TOKENIZER, _TEMPLATE):
        values = spec.search.listed_values(path)
        named += [(location_of(spec.search.zipped, path), path, value) for value in values]
    for number, trial in enumerate(spec.enqueue):
        named += [(("enqueue", number, path), path, value) for path, value in trial.items()]
    return named, sources


def _sources(data: DataConfig, section: str) -> Iterator[tuple[Location, Source]]:
    for split, listed in (("train", data.train), ("eval", data.eval or ())):
        for number, source in enumerate(listed):
            yield (section, "data", split, number), source


def _problem_of(path: str, value: Any, rights: FileRights) -> tuple[str, str] | None:
    """Return problem and hint of a setting that names a model or a chat template, else None."""
    if not isinstance(value, str):
        return None
    match path.removeprefix("base."):
        case "model.name_or_path" | "model.tokenizer":
            is_allowed = _HUB_NAME.fullmatch(value) is not None and ".." not in value
        case "data.chat_template":
            is_allowed = "{{" in value or "{%" in value  # Jinja text, by the trainer's rule
        case _:
            return None
    return None if is_allowed or _is_inside(value, rights) else rights.outside(value)


def _source_problem(source: Source, rights: FileRights) -> tuple[str, str] | None:
    match source:
        case FileSource(path=path):
            return None if _is_inside(path, rights) else rights.outside(path)
        case HubSource(dataset=name):
            is_name = _HUB_NAME.fullmatch(name) is not None and ".." not in name
            return None if is_name else (f"{name} is no name of a data set of the hub", "a file is path: FILE")
        case GeneratedSource(rows=rows):
            return None if rows <= _MOST_ROWS else (f"{rows:,} rows are generated", f"at most {_MOST_ROWS:,}")


def _is_inside(name: str, rights: FileRights) -> bool:
    """Return whether this is the resolved path of a file or folder that the rights include."""
    return name.startswith("/") and Path(name) in rights.candidates(name)


def _size_problem(model: ModelConfig) -> tuple[str, str] | None:
    if (made := model.generated) is None:
        return None
    layer = 4 * made.hidden_size**2 + 3 * made.hidden_size * made.intermediate_size
    parameters = made.vocab_size * made.hidden_size + made.num_hidden_layers * layer
    if parameters <= _MOST_PARAMETERS:
        return None
    return f"a model of {parameters:,} parameters is generated", f"at most {_MOST_PARAMETERS:,}"
