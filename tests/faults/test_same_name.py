"""Case 5: a name that is taken is refused, and not one byte of what lies there changes."""

import hashlib
from pathlib import Path

import pytest

from orchestrator import cli
from tests.support.local_driver import drive, forked

SWEEP = """
name: s
base:
  model: {generated: {}}
  data: {train: {generated: instructions, rows: 64}}
  loss: {kind: simpo}
  training: {max_steps: 2}
search: {loss.beta: [2.0, 3.0]}
maximize: eval_accuracies/logp
"""


def digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_run_twice(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = fast_tmp_path / "runs"
    root.mkdir()
    assert forked(lambda: drive(root)) == 0
    file = fast_tmp_path / "s.yaml"
    file.write_text(SWEEP)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(root))
    before = digests(root)
    assert cli.main(["sweep", str(file)]) == 2
    assert "orchestrate resume s" in capsys.readouterr().err
    assert digests(root) == before
