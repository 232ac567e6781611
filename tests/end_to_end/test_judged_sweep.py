"""A whole sweep whose file asks for a judge, through the command."""

from pathlib import Path

import pytest

from orchestrator.folders import SweepFolder
from orchestrator.judge.judgements import parse_judgements
from orchestrator.study.study import Study
from tests.end_to_end.test_sweep import TINY
from tests.support.processes import finished

JUDGE = """judge:
  top: 2
  prompts: 6
  max_new_tokens: 6
  endpoint: {url: 'http://127.0.0.1:9/v1', model: big}
"""


@pytest.mark.slow
def test_a_sweep_is_judged_at_its_end(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "tiny.yaml"
    file.write_text(TINY.replace("max_steps: 60", "max_steps: 20") + JUDGE)
    assert "big was not called" in finished(root, "sweep", str(file))[1]
    folder = SweepFolder(root, "tiny")
    with Study.open(folder) as study:
        decisions = parse_judgements(study.judgements())
    assert {(v.judge, v.decoding) for v in decisions} == {("checker", "greedy"), ("checker", "sampled")}
    assert (len(decisions), len(list(folder.path.glob("trials/*/*/model")))) == (4, 2)
    assert len(list((root / "artifacts").rglob("judge.json"))) == 1
    assert len(list((root / "artifacts").rglob("report.html"))) == 1
    assert "Judgements" in folder.report.read_text(encoding="utf-8")
