"""`write_advice`: writes advised values into the user's sweep file, with a backup and nothing else changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import SpecError
from orchestrator.spec.advice.advice_lines import AdviceLine
from orchestrator.spec.loading.file_edits import CannotEdit, ValueEdit, edit_yaml
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import flatten
from trainer.storage.atomic_files import write_file

_BOM = "\ufeff"


@dataclass(frozen=True, slots=True)
class WrittenAdvice:
    """What was written. `backup`: the file as it was, None if nothing was written; `refused`: setting -> reason."""

    written: tuple[str, ...]
    refused: Mapping[str, str]
    backup: Path | None


def write_advice(file: Path, lines: Sequence[AdviceLine]) -> WrittenAdvice:
    """Set the advised values in the file, each with its reason as a comment above.

    Each edit is loaded: one that changes another setting too, or that the loader refuses, is left out. Symbolic links
    are followed; the file keeps its permissions.

    Raises:
        OSError: the file or its backup cannot be written.
    """
    target = file.resolve()
    before = target.read_bytes()
    text = before.decode("utf-8")
    start = _BOM if text.startswith(_BOM) else ""
    text = text.removeprefix(_BOM)
    written: list[str] = []
    refused: dict[str, str] = {}
    for line in lines:
        if line.yaml is None or line.setting is None or line.value is None:
            continue
        try:
            text = _edited(text, target, line, line.setting, line.value)
            written.append(line.yaml)
        except CannotEdit as error:
            refused[line.setting] = str(error)
    if not written:
        return WrittenAdvice((), refused, None)
    backup = _back_up(target, before)
    mode = target.stat().st_mode & 0o7777

    def write(temporary: Path) -> None:
        temporary.write_bytes((start + text).encode("utf-8"))
        temporary.chmod(mode)

    write_file(target, write)
    return WrittenAdvice(tuple(written), refused, backup)


def _edited(text: str, file: Path, line: AdviceLine, setting: str, value: str) -> str:
    """Return the text with the advised value. Raises CannotEdit where that would change more, or is refused."""
    section, _, path = setting.partition(".")
    keys = (section, path) if section == "search" else (section, *path.split("."))
    try:
        made = edit_yaml(text, ValueEdit(keys, value, f"{line.reason} (was {line.current})"))
        old, new = (load_spec_text(one, file.parent, source=str(file)) for one in (text, made))
    except yaml.YAMLError as error:
        raise CannotEdit(f"the file with {value} would be no YAML: {error}") from error
    except SpecError as error:
        raise CannotEdit(f"the file with {value} would be refused: {error.problems[0].problem}") from error
    changed = [key for key in _changes(old, new) if not key.startswith(setting)]
    if changed:
        raise CannotEdit(f"{', '.join(changed)} would change too, which an alias shares")
    return made


def _changes(old: SweepSpec, new: SweepSpec) -> list[str]:
    before, after = _settings(old), _settings(new)
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _settings(spec: SweepSpec) -> dict[str, Any]:
    """Return the values of a sweep by their places in the file; what follows from others is left out."""
    tree = spec.model_dump(mode="json", exclude={"search", "sampler"})
    searched = {path: dimension.model_dump(mode="json") for path, dimension in spec.search.dimensions.items()}
    return (
        flatten(tree)
        | {f"search.{path}": value for path, value in searched.items()}
        | {"search.zip": [dict(group) for group in spec.search.zipped]}
    )


def _back_up(target: Path, content: bytes) -> Path:
    """Write the content to a new file beside the target: sweep.yaml.bak, else sweep.yaml.bak-2, ..."""
    number = 1
    while True:
        backup = target.with_name(f"{target.name}.bak{'' if number == 1 else f'-{number}'}")
        try:
            handle = os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, target.stat().st_mode & 0o777)
        except FileExistsError:
            number += 1
            continue
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        return backup
