"""Case 22: bad rows are found before the first trial: counted, by reason and row number; a changed file is refused."""

import json
from pathlib import Path

import pytest

from orchestrator.driver.data_stage import check_data
from orchestrator.errors import DataError
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.sweep_spec import SweepSpec
from tests.support.preparation import PreparedHere
from trainer.data import BadData, prepare

SWEEP = """
name: s
base:
  model: {generated: {}}
  data: {train: rows.jsonl, eval_share: 0.2, max_length: 128, apply_template: false}
  loss: {kind: simpo}
  training: {max_steps: 2, pairs_per_update: 4}
search: {loss.beta: [2.0, 3.0]}
maximize: eval_accuracies/logp
"""
GOOD = [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(40)]
BAD = {
    "a boolean": {"prompt": "q", "chosen": True, "rejected": "no"},
    "empty": {"prompt": "q", "chosen": "", "rejected": "no"},
    "equal": {"prompt": "q", "chosen": "same", "rejected": "same"},
    "missing": {"prompt": "q", "chosen": "yes"},
    "null": {"prompt": "q", "chosen": "yes", "rejected": None},
}


def write(path: Path, rows: list[dict[str, object]], result: str = "\n") -> SweepSpec:
    (path / "rows.jsonl").write_bytes((result.join([json.dumps(row) for row in rows]) + result).encode())
    return load_spec_text(SWEEP, path)


@pytest.mark.parametrize("kind", BAD)
def test_the_row_is_named(tmp_path: Path, kind: str) -> None:
    spec = write(tmp_path, [*GOOD[:7], BAD[kind], *GOOD[7:]])
    with pytest.raises(BadData, match="8") as found:
        prepare(spec.base.data, spec.base.model, tmp_path / "cache")
    assert "1" in str(found.value)


def test_lines_that_are_no_text(tmp_path: Path) -> None:
    spec = write(tmp_path, list(GOOD))
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'{"prompt": "\xff\xfe", "chosen": "a", "rejected": "b"}\n')
        file.write(b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(BadData, match="41"):
        prepare(spec.base.data, spec.base.model, tmp_path / "cache")


def test_a_long_row_and_carriage_returns_are_no_fault(tmp_path: Path) -> None:
    long = {"prompt": "word " * 200_000, "chosen": "yes", "rejected": "no"}
    spec = write(tmp_path, [*GOOD, long], result="\r\n")
    assert len(prepare(spec.base.data, spec.base.model, tmp_path / "cache").train) > 20


def test_a_file_that_changed_since_the_start_is_refused_with_what_changed(tmp_path: Path) -> None:
    from tests.support.recorders import SilentView

    folder = SweepFolder(tmp_path / "runs", "s")
    folder.path.mkdir(parents=True)
    worker, spec = PreparedHere(folder.cache), write(tmp_path, list(GOOD))
    check_data(spec, folder, SilentView(), worker)  # pyright: ignore[reportArgumentType]
    check_data(spec, folder, SilentView(), worker)  # pyright: ignore[reportArgumentType]
    before = (folder.path / "data.json").read_bytes()
    changed = [*GOOD[:4], GOOD[4] | {"chosen": "maybe"}, *GOOD[5:], {"prompt": "new", "chosen": "a", "rejected": "b"}]
    write(tmp_path, changed)
    with pytest.raises(DataError, match=r"rows\.jsonl row 5\b") as refused:
        check_data(spec, folder, SilentView(), worker)  # pyright: ignore[reportArgumentType]
    messages = str(refused.value)
    assert "1 altered" in messages
    assert "1 new (" in messages
    assert "row 41" in messages
    assert (folder.path / "data.json").read_bytes() == before
    write(tmp_path, list(GOOD))
    check_data(spec, folder, SilentView(), worker)  # pyright: ignore[reportArgumentType]
