"""Locations in a configuration: file names and model folders, which do not change what is trained.

Whether the contents of two locations are equal is for the caller to check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainer.config.trial import STORED, DataConfig, FileSource, ModelConfig, Source, TrialConfig

CONFIG_FILES = ("trial.yaml", "trial.json")
"""Files in the folder of a run with the configuration with which it was started."""
_TEXTS = ("model.name_or_path", "model.tokenizer", "data.chat_template")
_SOURCES = ("data.train", "data.eval")


def is_move(path: str, old: object, new: object) -> bool:
    """Return whether these values of a setting of a trial or of `sft` differ in nothing but locations.

    `old`, `new`: as in JSON; `path`: dotted, such as `data.train`.
    """
    if path in _TEXTS:
        return isinstance(old, str) and isinstance(new, str)
    return path in _SOURCES and old is not None and new is not None and _masked(old) == _masked(new)


def differ_in_locations_only(one: TrialConfig, other: TrialConfig) -> bool:
    """Return whether two configurations are equal but for locations."""
    left, right = one.canonical_params(), other.canonical_params()
    differing = [path for path in left.keys() | right.keys() if left.get(path) != right.get(path)]
    return all(is_move(path, left.get(path), right.get(path)) for path in differing)


def relocated(config: TrialConfig, old: TrialConfig, new: TrialConfig) -> TrialConfig:
    """Return `config` with each location that it has in common with `old` replaced by that of `new`."""
    model, data = config.model, config.data
    moved_model = {name: getattr(new.model, name) for name in _fields("model") if _equal(model, old.model, name)}
    moved_data = {name: getattr(new.data, name) for name in _fields("data") if _equal(data, old.data, name)}
    return config.model_copy(
        update={"model": model.model_copy(update=moved_model), "data": data.model_copy(update=moved_data)}
    )


def stored_config(folder: Path) -> TrialConfig | None:
    """Return the configuration with which the run in this folder was started; None if there is none that is valid."""
    for name in CONFIG_FILES:
        path = folder / name
        if path.is_file():
            try:
                loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
                return TrialConfig.model_validate(yaml.load(path.read_bytes(), Loader=loader), context=STORED)  # noqa: S506
            except (yaml.YAMLError, ValueError):
                return None
    return None


def found_below(path: Path, root: Path) -> Path | None:
    """Return where something of a folder that was moved lies below `root`: the longest end of `path` that exists there.

    None if no end of it exists.
    """
    for first in range(1, len(path.parts)):
        candidate = root.joinpath(*path.parts[first:])
        if candidate.exists():
            return candidate
    return None


def with_source_paths(sources: tuple[Source, ...], place: dict[str, str]) -> tuple[Source, ...]:
    """Return the sources with the files in `place` (from the old path to the new one) at their new paths."""
    return tuple(
        source.model_copy(update={"path": place[source.path]})
        if isinstance(source, FileSource) and source.path in place
        else source
        for source in sources
    )


def _fields(section: str) -> list[str]:
    return [path.partition(".")[2] for path in (*_TEXTS, *_SOURCES) if path.startswith(f"{section}.")]


def _equal(one: ModelConfig | DataConfig, other: ModelConfig | DataConfig, name: str) -> bool:
    return getattr(one, name) == getattr(other, name)


def _masked(sources: Any) -> list[Any]:
    """Return sources without the paths of files."""
    return [{key: value for key, value in source.items() if key != "path"} | _is_file(source) for source in sources]


def _is_file(source: dict[str, Any]) -> dict[str, bool]:
    return {"path": True} if "path" in source else {}
