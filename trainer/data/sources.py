"""Read data sources: local files, Hugging Face data sets and the generated task. Row numbers count from 1."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from trainer.config.trial import FileSource, GeneratedSource, HubSource, Source
from trainer.data.columns import find_columns
from trainer.data.data_findings import RowNotice, UnreadableData
from trainer.data.public_formats import conversion
from trainer.results import clause
from trainer.storage.atomic_files import digest_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read. `fields` is None where the record could not be parsed; `error` then gives the reason."""

    number: int
    fields: dict[str, Any] | None
    error: str = ""
    notices: tuple[RowNotice, ...] = ()
    """Findings about the columns of this row (unused or recognized ones)."""


def source_name(source: Source) -> str:
    """Return the name of a source in findings and reports."""
    match source:
        case FileSource():
            return source.path
        case HubSource():
            subset = f"/{source.subset}" if source.subset else ""
            return f"{source.dataset}{subset}:{source.split}"
        case GeneratedSource():
            return f"generated {source.generated}:{source.split}"
    assert_never(source)


def source_digest(source: Source) -> str:
    """Return a hex digest of the content of a source: of the file's bytes, of the data set's Arrow tables, or of the
    generator's settings. Raises UnreadableData if the source cannot be opened.
    """
    match source:
        case FileSource():
            return _file_digest(_existing_file(source.path))
        case HubSource():
            dataset = _load_hub(source)
            files = [Path(entry["filename"]) for entry in dataset.cache_files]
            content = [_file_digest(file) for file in files] or [str(dataset._fingerprint)]  # pyright: ignore[reportPrivateUsage]
            return digest_of({"content": content, "split": source.split, "rows": dataset.num_rows})
        case GeneratedSource():
            from trainer.synthetic.instructions import VERSION

            return digest_of({"version": VERSION} | source.model_dump(mode="json", exclude={"weight"}))
    assert_never(source)


def _file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex; the file name does not enter."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_source(source: Source, required: Collection[str] | None = None) -> list[RawRow]:
    """Return every row of a source, with its columns renamed to the standard fields (`trainer.data.columns.FIELDS`).

    Raises UnreadableData if the source cannot be opened or lacks a `required` column (`find_columns`).
    """
    match source:
        case FileSource():
            path = _existing_file(source.path)
            rows = list(_reader(path)(path))
        case HubSource():
            rows = [RawRow(i, _without_fillers(dict(row))) for i, row in enumerate(_load_hub(source), start=1)]
        case GeneratedSource():
            from trainer.synthetic.instructions import generate_rows

            return [RawRow(i, row) for i, row in enumerate(generate_rows(source), start=1)]
        case _:
            assert_never(source)
    return _rename_columns(rows, source, required)


def first_rows(source: FileSource, count: int) -> list[RawRow]:
    """Return the first rows of a local file as `read_source` does; of a .json file all rows are parsed.

    Raises UnreadableData if the file cannot be opened or these rows lack a column.
    """
    path = _existing_file(source.path)
    return _rename_columns(list(islice(_reader(path)(path), count)), source, None)


def _rename_columns(rows: list[RawRow], source: FileSource | HubSource, needed: Collection[str] | None) -> list[RawRow]:
    fields = [row.fields for row in rows if row.fields is not None]
    try:
        found = find_columns(fields, source.columns, source_name(source), needed)
    except UnreadableData as error:
        present = {key for row in fields for key in row}
        code = "" if present & {"chosen", "rejected"} else conversion(source, present)
        if not code:
            raise
        raise UnreadableData(f"{error} This code writes pairs.jsonl, which can be trained on:\n\n{code}") from error
    return [
        row if row.fields is None else RawRow(row.number, found.fields(row.fields), notices=found.notices(row.fields))
        for row in rows
    ]


def _without_fillers(row: dict[str, Any]) -> dict[str, Any]:
    """Remove the nulls that Arrow writes into messages and tools for keys that only other rows have, as TRL's
    `remove_none_values` does. A cell that is null stays null.
    """
    return {key: _without_nulls(value) if isinstance(value, (list, dict)) else value for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return value


# --- local files -----------------------------------------------------------------------------------------------------


def _existing_file(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise UnreadableData(f"data file not found: {path} (searched in {Path.cwd()})")
    return found


def _reader(path: Path) -> Callable[[Path], Iterator[RawRow]]:
    readers: dict[str, Callable[[Path], Iterator[RawRow]]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UnreadableData(f"{path} has an unknown file type; use one of {', '.join(readers)}")
    return reader


def _decode(raw: bytes) -> str:
    """Decode UTF-8. Invalid bytes become lone surrogates U+DC80..DCFF, which the row checks report."""
    return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def _to_raw_row(number: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(number, {str(k): v for k, v in value.items()})
    return RawRow(number, None, f"a {type(value).__name__}, not an object")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    """Read one object per line. The row number is the line number; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(_decode(line))
            except (json.JSONDecodeError, RecursionError) as error:
                yield RawRow(number, None, f"line {number}: {_where(error)}")
                continue
            yield _to_raw_row(number, value)


def _where(error: json.JSONDecodeError | RecursionError) -> str:
    """Return what is wrong in one line of JSON, and where in it."""
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_json(path: Path) -> Iterator[RawRow]:
    """Read a list of objects, or an object with such a list under `data`."""
    try:
        value = json.loads(_decode(path.read_bytes()))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnreadableData(f"{path} is not JSON: {clause(error)}. For one object per line, name it .jsonl") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise UnreadableData(f"{path} has no list of rows, neither at the top level nor under `data`")
    for number, one in enumerate(value, start=1):
        yield _to_raw_row(number, one)


def _read_csv(path: Path) -> Iterator[RawRow]:
    """Read a header line and records; every value is text."""
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        number = 0
        while True:
            number += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(number, None, f"record {number}: {error}")
                continue
            if None in row:
                yield RawRow(number, None, f"record {number} has more values than the header has columns")
            else:
                yield RawRow(number, dict(row))


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield RawRow(number, _without_fillers(batch.slice(index, 1).to_pylist()[0]))
                except UnicodeDecodeError as error:
                    yield RawRow(number, None, f"row {number}: {error.reason}")
    except pa.ArrowException as error:
        raise UnreadableData(f"{path} is not a Parquet file: {error}") from error


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _load_hub(source: HubSource) -> Dataset:
    """Load a data set with `datasets.load_dataset`; a local folder is accepted too. Raises UnreadableData."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        if not Path(source.dataset).is_dir():
            builder = load_dataset_builder(source.dataset, source.subset, revision=source.revision)
            if local := local_files(builder):
                raise UnreadableData(
                    f"the data set {source_name(source)} of the hub names a file of this machine, {local[0]}, and is "
                    "not loaded"
                )
        dataset = load_dataset(source.dataset, source.subset, split=source.split, revision=source.revision)
    except (OSError, ValueError, DatasetsError) as error:
        lines = str(error).strip().splitlines()
        raise UnreadableData(
            f"the data set {source_name(source)} cannot be loaded: {lines[0] if lines else type(error).__name__}. "
            "Check dataset, subset, split and revision; without access to the hub, download it on a machine "
            "with access and set the folder as `dataset`, or its files as `path`."
        ) from error
    return dataset


def local_files(builder: DatasetBuilder) -> list[str]:
    """Return the data files of a data set that are paths of this machine; its description may name any."""
    listed: Mapping[str, Sequence[str]] = builder.config.data_files or {}
    return [str(file) for files in listed.values() for file in files if "://" not in str(file)]
