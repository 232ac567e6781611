"""Expands the shorthands of a sweep file and resolves its file names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import closest_match
from orchestrator.spec.loading.file_rights import FileRights
from orchestrator.spec.loading.validation_errors import ErrorCollector
from orchestrator.spec.sweep_spec import AUTO, AUTO_TRAINING, GPUS_PER_TRIAL, MICRO_BATCH
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Document, Location


def expand_shorthands(document: Document) -> None:
    """Expand the shorthands in place: `model: NAME`, `train: FILE`, `reward_model: NAME`, a loss without its kind.

    Their places are added to the document's `shorthands`.
    """
    tree = document.value
    base = _group(tree, "base")
    if base is not None:
        _model_name(document, base, ("base", "model"))
        loss = base.get("loss")
        if isinstance(loss, dict) and "kind" not in loss:
            base["loss"] = {"kind": TrialConfig.model_fields["loss"].default.kind, **cast(dict[str, Any], loss)}
        _sources(document, _group(base, "data"), ("base", "data"))
    _sources(document, _group(_group(tree, "sft"), "data"), ("sft", "data"))
    judge = _group(tree, "judge")
    if judge is not None:
        _model_name(document, judge, ("judge", "reward_model"))


def _model_name(document: Document, group: dict[str, Any], loc: Location) -> None:
    name = str(loc[-1])
    if isinstance(group.get(name), str):
        group[name] = {"name_or_path": group[name]}
        document.shorthands[*loc, "name_or_path"] = loc


def resolve_paths(problems: ErrorCollector, tree: Any, rights: FileRights) -> list[str]:
    """Make file names absolute in place, relative to the first folder of `rights` that has them.

    A name from the command line is looked up in the opposite order. Missing files are added to `findings`, except those
    of a stored sweep, which can be looked at without them. Returns a
    notice for each name that is taken as the hub's although a folder here has nearly the same.
    """
    finder = _PathResolver(problems, rights)
    base = _group(tree, "base")
    finder.data_sources(_group(base, "data"), ("base", "data"))
    finder.data_sources(_group(_group(tree, "sft"), "data"), ("sft", "data"))
    finder.prompts(_group(tree, "judge"))
    named = ("judge", "reward_model", "name_or_path")
    finder.optional_path(_group(_group(tree, "judge"), "reward_model"), "name_or_path", named)
    for section, path in (("model", "name_or_path"), ("model", "tokenizer"), ("data", "chat_template")):
        finder.optional_path(_group(base, section), path, ("base", section, path))
        searched = _group(tree, "search")
        if searched is not None:
            finder.searched_paths(searched, f"{section}.{path}")
    return finder.notices


def take_auto(problems: ErrorCollector, tree: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the file without settings left to `auto`, and their paths: those that are absent or have this word.

    In a stored sweep only the word counts, as earlier versions wrote every default. Engine trl keeps the default
    micro-batch, which sets the batches of TRL's trainers. Searched settings are not left to auto.
    """
    searched = {*(_group(tree, "search") or {}), *(path for group in _zipped(tree) for path in group)}
    engine = (_group(tree, "base") or {}).get("engine")
    found: list[str] = []
    for path in (GPUS_PER_TRIAL, *(f"{section}.{path}" for section in ("base", "sft") for path in AUTO_TRAINING)):
        section, _, setting = path.partition(".")
        if section == "sft" and _group(tree, "sft") is None:
            continue
        *groups, name = path.split(".")
        tree, group = _copied(tree, groups, create=problems.is_new)
        if group is None or not (group.get(name) == AUTO or (name not in group and problems.is_new)):
            continue
        group.pop(name, None)
        uses_trl = engine == "trl" or "engine" in searched
        if not (section == "base" and (setting in searched or (uses_trl and setting == MICRO_BATCH))):
            found.append(path)
    return tree, tuple(found)


def _zipped(tree: dict[str, Any]) -> list[dict[str, Any]]:
    zipped = (_group(tree, "search") or {}).get("zip")
    return [cast(dict[str, Any], group) for group in _as_list(zipped) if isinstance(group, dict)]


def _copied(tree: dict[str, Any], groups: list[str], *, create: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the tree with copies of these nested groups, which anchors may share, and the innermost one.

    None where it is something else than a mapping.
    """
    if not groups:
        copied = dict(tree)
        return copied, copied
    inner = tree.get(groups[0])
    if inner is None and create:
        inner = dict[str, Any]()
    if not isinstance(inner, dict):
        return tree, None
    below, group = _copied(cast(dict[str, Any], inner), groups[1:], create=create)
    return (tree | {groups[0]: below} if group is not None else tree), group


_SIMILAR = 0.75
"""Similarity above which a folder's name counts as a name misspelt; hub names and folders often share a few letters."""


class _PathResolver:
    def __init__(self, problems: ErrorCollector, rights: FileRights) -> None:
        self._findings, self._rights = problems, rights
        self.notices: list[str] = []

    def data_sources(self, data: dict[str, Any] | None, loc: Location) -> None:
        """Resolve the sources that are files; report missing ones."""
        for split in ("train", "eval"):
            sources = (data or {}).get(split)
            for index, source in enumerate(_as_list(sources)):
                if isinstance(source, dict) and isinstance(path := cast(Any, source.get("path")), str) and path:
                    self._resolve_file(cast(dict[str, Any], source), (*loc, split, index, "path"))

    def prompts(self, judge: dict[str, Any] | None) -> None:
        """Resolve `judge.prompts_from`, a source or the path of a file alone."""
        given = (judge or {}).get("prompts_from")
        loc: Location = ("judge", "prompts_from")
        if judge is not None and isinstance(given, str) and given:
            judge["prompts_from"] = source = {"path": given}
            self._findings.document.shorthands[*loc, "path"] = loc
            self._resolve_file(source, (*loc, "path"))
        elif isinstance(given, dict) and isinstance(cast(Any, given.get("path")), str) and given["path"]:
            self._resolve_file(cast(dict[str, Any], given), (*loc, "path"))

    def optional_path(self, group: dict[str, Any] | None, path: str, loc: Location) -> None:
        """Resolve a value that may be a file, a folder, or something else (a hub name, a template's text)."""
        given = (group or {}).get(path)
        if group is not None and isinstance(given, str):
            group[path] = self._if_exists(given, loc)

    def searched_paths(self, search: dict[str, Any], path: str) -> None:
        """Resolve the values of a searched setting in the same way."""
        listed = search.get(path)
        if isinstance(listed, tuple):
            values = cast(tuple[Any, ...], listed)
            search[path] = tuple(self._if_exists(v, ("search", path)) if isinstance(v, str) else v for v in values)

    def _if_exists(self, given: str, loc: Location) -> str:
        if "\n" in given or "{" in given:
            return given
        found = next((p for p in self._candidates(given, loc) if _path_exists(p.exists)), None)
        if found is not None:
            return str(found)
        is_path = given.startswith(("./", "../", "/", "~"))
        if self._rights.is_closed and not self._candidates(given, loc):
            if is_path:
                self._findings.add(loc, *self._rights.outside(given))
            return given
        near = _as_given(given, self._nearest_folder(given, loc))
        if is_path and not self._is_stored(loc):
            hint = f"did you mean {near}?" if near else self._first_existing(given, loc)
            self._findings.add(loc, f"there is no {given}", hint)
        elif near is not None and loc[-1] != "chat_template":
            path = ".".join(map(str, self._findings.document.as_written(loc)))
            self.notices.append(f"{path}: there is no folder {given}, so it is a name on the hub; did you mean {near}?")
        return given

    def _nearest_folder(self, given: str, loc: Location) -> Path | None:
        """Return the folder or file whose path differs from the given one by misspelt parts only; None without one."""
        for candidate in self._candidates(given, loc):
            at = Path(candidate.anchor)
            for part in candidate.parts[1:]:
                if not _path_exists((at / part).exists):
                    names = sorted(p.name for p in at.iterdir()) if self._may_list(at) else []
                    part = closest_match(part, names, _SIMILAR) or ""
                at = at / part
                if not part:
                    break
            else:
                return at if not self._rights.is_closed or self._rights.contains(at.resolve()) else None
        return None

    def _resolve_file(self, source: dict[str, Any], loc: Location) -> None:
        given: str = source["path"]
        tried = self._candidates(given, loc)
        if self._rights.is_closed and not tried:
            self._findings.add(loc, *self._rights.outside(given))
            return
        found = next((p for p in tried if _path_exists(p.is_file)), None)
        if found is None and self._is_stored(loc):
            return
        if found is None:
            names = sorted({p.name for t in tried if self._may_list(t.parent) for p in t.parent.iterdir()})
            near = closest_match(Path(given).name, names)
            hint = f"did you mean {near}?" if near else self._first_existing(given, loc)
            if near is None and re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not Path(given).suffix:
                key = next(part for part in reversed(loc[:-1]) if isinstance(part, str))
                hint = f"a data set of the hub: write {key}: {{dataset: {given}, split: train}}"
            self._findings.add(loc, f"there is no file {given}", hint)
        else:
            source["path"] = str(found)

    def _is_stored(self, loc: Location) -> bool:
        return not self._findings.is_new and not self._findings.document.location(loc).startswith("--set ")

    def _candidates(self, given: str, loc: Location) -> list[Path]:
        found = self._rights.candidates(given)
        if self._findings.document.location(loc).startswith("--set "):
            found.reverse()
        return found

    def _may_list(self, folder: Path) -> bool:
        """Return whether the names in a folder may be read, for a hint."""
        if self._rights.is_closed and not self._rights.contains(folder.resolve()):
            return False
        return _path_exists(folder.is_dir) and os.access(folder, os.R_OK | os.X_OK)

    def _first_existing(self, given: str, loc: Location) -> str:
        return "looked for " + (
            ", ".join(str(p) for p in self._candidates(given, loc)) or "nothing: a path cannot contain a NUL"
        )


def _path_exists(test: Callable[[], bool]) -> bool:
    """Return whether the path exists; False for a name that no file can have (too long)."""
    try:
        return test()
    except OSError:
        return False


def _sources(document: Document, data: dict[str, Any] | None, loc: Location) -> None:
    for split in ("train", "eval"):
        given = (data or {}).get(split)
        if data is None or given is None:
            continue
        many = cast(tuple[Any, ...], given) if isinstance(given, tuple) else (given,)
        if not isinstance(given, tuple):
            document.shorthands[*loc, split, 0] = (*loc, split)
        for index, one in enumerate(many):
            if isinstance(one, str):
                at = (*loc, split, index)
                document.shorthands[*at, "path"] = document.as_written(at)
        data[split] = tuple({"path": one} if isinstance(one, str) else one for one in many)


def _group(tree: Any, key: str) -> dict[str, Any] | None:
    inner = cast(dict[str, Any], tree).get(key) if isinstance(tree, dict) else None
    return cast(dict[str, Any], inner) if isinstance(inner, dict) else None


def _as_list(given: Any) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], given) if isinstance(given, tuple) else ()


def _as_given(given: str, near: Path | None) -> str | None:
    """Return the path as the file writes the given one: relative where that is relative."""
    if near is None or given.startswith(("/", "~")):
        return None if near is None else str(near)
    parts = Path(given).parts
    above = [part for part in parts if part == ".."]
    own = Path(*above, *near.parts[len(near.parts) - len(parts) + len(above) :])
    return f"./{own}" if given.startswith("./") else str(own)
