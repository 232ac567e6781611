"""Checks of a model's files by their names, indexes and headers, without reading weights. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.hub_cache import model_file
from trainer.results import ModelError

_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of safetensors."""
_REMEDY = "copy or download it again"
_OF_TOKENIZERS = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json", "*.py")
"""Files of which a folder with a tokenizer has at least one."""


def check_model_files(name_or_path: str, revision: str | None = None) -> None:
    """Check a model's folder, or what the hub cache has of it.

    Raises:
        ModelError: config.json or an index cannot be read, a shard is absent, or a file of weights is cut.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        config = model_file(name_or_path, "config.json", revision)
        if config is None:
            return
        _read_json(config)
        for file in sorted(config.parent.glob("*.safetensors")):
            count_elements(file)
        return
    for name in ("config.json", "adapter_config.json"):
        if (path / name).exists():
            _read_json(path / name)
    for problem in _incomplete_files(path):
        raise ModelError(problem)
    for file in sorted(path.glob("*.safetensors")):
        count_elements(file)


def check_whole_model(name_or_path: str, revision: str | None = None) -> None:
    """Check that a folder has a model that can be trained or scored with: configuration and weights, and none damaged.

    Raises:
        ModelError: as of `check_model_files`; the folder has only adapters, no config.json, or no safetensors.
    """
    check_model_files(name_or_path, revision)
    folder = Path(name_or_path)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} has adapters, not a whole model; merge them into their base first")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model: it has no config.json; save the model again with save_pretrained")
    if not any(folder.glob("*.safetensors")):
        pickled = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        others = f" ({pickled} in pickle form can run code when opened and is refused)" if pickled else ""
        raise ModelError(f"{folder} has no .safetensors weights{others}; save the model again with save_pretrained")


def check_tokenizer_files(name_or_path: str) -> None:
    """Check that a folder has a tokenizer. Raises ModelError with what to do if it has none."""
    folder = Path(name_or_path)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _OF_TOKENIZERS):
        raise ModelError(
            f"{folder} has no tokenizer; save it there with its save_pretrained, or name its folder or hub name in "
            "model.tokenizer"
        )


def count_elements(file: Path) -> int:
    """Return the number of elements of all tensors of a safetensors file, from its header.

    Format: https://huggingface.co/docs/safetensors. Raises ModelError if the file is cut or is no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ModelError(f"{file}: cut within its header ({size:,} bytes), or no safetensors file; {_REMEDY}")
            header: dict[str, Any] = json.loads(stream.read(length))
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
        count = sum(math.prod(tensor["shape"]) for tensor in tensors)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{file}: its header is damaged, or it is no safetensors file; {_REMEDY}") from error
    if size < end:
        raise ModelError(f"{file}: cut: it has {size:,} of the {end:,} bytes that its header names; {_REMEDY}")
    return count


def _incomplete_files(folder: Path) -> Iterator[str]:
    for index in sorted(folder.glob("*.index.json")):
        content = _read_json(index)
        shards: Any = content.get("weight_map")
        if not isinstance(shards, dict):
            yield f"{index}: has no weight_map; {_REMEDY}"
            return
        names: set[str] = {str(name) for name in shards.values()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        absent = sorted(name for name in names if not (folder / name).is_file())
        if absent:
            yield (
                f"{folder / absent[0]}: absent, but {index.name} names it ({len(absent)} of {len(names)} shards are "
                "absent); download the model again"
            )
    for partial in sorted(folder.glob("*.incomplete")):
        if not partial.with_suffix("").exists():
            yield f"{partial}: its download has not ended; continue it, or download the model again"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ModelError(f"{file}: is no valid JSON ({error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is no JSON object; {_REMEDY}")
    return content  # pyright: ignore[reportUnknownVariableType]
