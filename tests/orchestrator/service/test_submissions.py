"""What a person's sweep file can do to the service: what its role allows, within limits of time, memory and number."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import HTTPException

from orchestrator.errors import SpecError
from orchestrator.service import submissions as module
from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.submissions import FORBIDDEN, SubmissionRefused, Submissions
from orchestrator.spec.loading.loader import load_spec_text
from tests.support.processes import environment

OPERATOR, ADMIN = Person("ann", Role.OPERATOR), Person("bea", Role.ADMIN)
ROWS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 40
SWEEP = """\
name: a
base:
  model: {generated: {}}
  data: {train: rows.jsonl, apply_template: false}
  training: {pairs_per_update: 8}
search: {loss.beta: [2.0, 2.5]}
maximize: eval_accuracies/logp
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(ROWS)
    return folder


@pytest.fixture
def sent(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submissions]:
    for name, value in environment(tmp_path / "runs").items():
        monkeypatch.setenv(name, value)
    found = Submissions(tmp_path / "runs", [data], processes=1)
    yield found
    found.close()


def problems(sent: Submissions, text: str, person: Person = OPERATOR) -> list[str]:
    with pytest.raises(SpecError) as caught:
        sent.load(person, text, (), None)
    return [str(problem) for problem in caught.value.problems]


def test_an_operator_submits_and_plans_within_the_data_folders(sent: Submissions, data: Path) -> None:
    loaded = sent.load(OPERATOR, SWEEP, ["loss.gamma=3.0"], "b")
    spec = load_spec_text(loaded.spec, data)
    assert (loaded.name, spec.base.flat_params()["loss.gamma"], loaded.gpus) == ("b", 3.0, 0)
    assert f"path: {data}/rows.jsonl" in loaded.spec
    assert sent.plan(OPERATOR, SWEEP, (), None)["name"] == "a"
    outside = data.parent / "other.jsonl"
    outside.write_text(ROWS)
    (found,) = problems(sent, SWEEP.replace("rows.jsonl", str(outside)))
    assert found == (
        f"sweep.yaml:4: base.data.train: {outside} is outside of the folders that this file may read (the service "
        f"opens {data}; an administrator adds one by `orchestrate serve --data-folder FOLDER`, and a file of your own "
        "machine is sent by `orchestrate --server URL sweep FILE --upload`)"
    )
    assert sent.load(ADMIN, SWEEP.replace("rows.jsonl", str(outside)), (), None).name == "a"
    assert Submissions(data.parent).rights(OPERATOR).advice.startswith("the service opens none")


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("storage", "storage: postgresql://db/x"),
        ("mirror", "mirror: s3://bucket/x"),
        ("tracking.uri", "tracking: {uri: 'http://mlflow'}"),
        ("tracking.artifacts", "tracking: {artifacts: 's3://bucket/x'}"),
        ("notify", "notify: {command: [/bin/sh, -c, 'id > /tmp/x']}"),
        ("notify", "notify: {webhook_env: AWS_SECRET_ACCESS_KEY}"),
        ("judge.endpoint", "judge: {endpoint: {url: 'http://169.254.169.254', model: m, api_key_env: HF_TOKEN}}"),
    ],
)
def test_only_an_administrator_names_servers_databases_and_commands(sent: Submissions, setting: str, text: str) -> None:
    (found,) = problems(sent, SWEEP + text)
    assert found == f"sweep.yaml:8: {setting}: is not allowed in this file ({FORBIDDEN[setting]})"
    assert sent.load(ADMIN, SWEEP + text, (), None).name == "a"


def test_code_of_a_model_is_never_run_for_a_file(sent: Submissions) -> None:
    text = SWEEP.replace("base:\n", "base:\n  trust_remote_code: true\n")
    for person in (OPERATOR, ADMIN):
        (found,) = problems(sent, text, person)
        assert "base.trust_remote_code" in found


def test_no_variable_of_the_service_reaches_an_answer(sent: Submissions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_HOST", "db.internal")
    for person in (OPERATOR, ADMIN):
        (found,) = problems(sent, SWEEP + "tracking: {experiment: '${DATABASE_HOST}'}", person)
        assert "${DATABASE_HOST}: a submitted file reads no environment variables" in found
        with pytest.raises(SpecError, match="no environment variables"):
            sent.check_overrides(person, ["model.name_or_path=${DATABASE_HOST}"])


def test_settings_of_one_trial_are_checked_too(sent: Submissions, data: Path) -> None:
    sent.check_overrides(OPERATOR, ["loss.beta=2", f"data.chat_template={data}/rows.jsonl"])
    sent.check_overrides(ADMIN, ["data.chat_template=/etc/passwd"])
    with pytest.raises(SpecError, match=r"--set data.chat_template=/etc/passwd: .*is outside of the folders"):
        sent.check_overrides(OPERATOR, ["loss.beta=2", "data.chat_template=/etc/passwd"])


def test_a_file_that_takes_too_long_ends_with_its_process(tmp_path: Path, data: Path) -> None:
    sent = Submissions(tmp_path / "runs", [data], processes=1, seconds=0.0)
    try:
        with pytest.raises(SubmissionRefused, match="took longer than 0 seconds"):
            sent.load(OPERATOR, SWEEP, (), None)
        sent._loaders[0]._seconds = 600.0
        assert sent.load(OPERATOR, SWEEP, (), None).name == "a", "the next file has a process of its own"
    finally:
        sent.close()


def test_a_file_that_takes_too_much_memory_ends_with_its_process(tmp_path: Path, data: Path) -> None:
    with (data / "large.json").open("wb") as file:
        file.truncate(8 << 30)  # nothing of it is on the disk
    sent = Submissions(tmp_path / "runs", [data], processes=1, most_bytes=4 << 30)
    try:
        with pytest.raises(SubmissionRefused, match="memory"):
            sent.plan(OPERATOR, SWEEP.replace("rows.jsonl", "large.json"), (), None)
        assert sent.load(OPERATOR, SWEEP, (), None).name == "a"
    finally:
        sent.close()


def test_a_person_uses_one_process_at_a_time(sent: Submissions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TURN_SECONDS", 0.0)
    entered, ends = threading.Event(), threading.Event()

    def wait(*_: object) -> dict[str, object]:
        entered.set()
        ends.wait()
        return {"name": "a", "spec": "", "gpus": 0, "notices": ()}

    monkeypatch.setattr(module._Loader, "call", wait)
    first = threading.Thread(target=sent.load, args=(OPERATOR, SWEEP, (), None))
    first.start()
    entered.wait()
    with pytest.raises(HTTPException) as caught:
        sent.load(OPERATOR, SWEEP, (), None)
    assert caught.value.status_code == 429
    monkeypatch.setattr(module, "_FREE_SECONDS", 0.01)
    with pytest.raises(HTTPException) as caught:
        sent.load(ADMIN, SWEEP, (), None)
    assert caught.value.status_code == 503
    ends.set()
    first.join()
    assert sent.load(OPERATOR, SWEEP, (), None).name == "a"


def test_the_process_ends_with_the_service(sent: Submissions) -> None:
    sent.load(OPERATOR, SWEEP, (), None)
    process = sent._loaders[0]._process
    assert process is not None
    pid = process.pid
    assert pid is not None
    sent.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
