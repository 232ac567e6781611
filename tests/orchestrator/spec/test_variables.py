"""`${NAME}` in paths, URLs and names: expanded and recorded, never a secret, and an error elsewhere."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.spec.loading.loader import load_spec, load_spec_text, load_with_notices
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import FileSource

Load = Callable[..., SweepSpec]
Refused = Callable[..., list[str]]


def test_variables_of_paths_urls_and_names_are_expanded_and_the_text_is_recorded(
    load_text: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "judge").mkdir()
    for name, value in {"DATA": str(folder), "ORG": "org", "BUCKET": "s3://bucket", "USER_NAME": "ann"}.items():
        monkeypatch.setenv(name, value)
    spec = load_text("""
name: ${USER_NAME}-sweep
base:
  model: ${ORG}/model
  data: {train: ["${DATA}/rows.jsonl", {dataset: "${ORG}/pairs", split: "${SPLIT:-train}"}]}
search: {model.name_or_path: ["${ORG}/one", "${ORG:-x}/two"]}
mirror: ${BUCKET}/sweeps
tracking: {uri: "http://${HOST:-localhost}:5000", experiment: "${EXPERIMENT:-of ann}"}
judge: {reward_model: "${DATA}/judge"}
""")
    assert (spec.name, spec.base.model.name_or_path, spec.mirror) == ("ann-sweep", "org/model", "s3://bucket/sweeps")
    assert spec.base.data.train[0] == FileSource(path=str(folder / "rows.jsonl"))
    assert spec.base.data.train[1].model_dump()["split"] == "train"
    assert spec.search.choices("model.name_or_path") == ("org/one", "org/two")
    assert (spec.tracking.uri, spec.tracking.experiment) == ("http://localhost:5000", "of ann")
    assert spec.judge is not None
    assert spec.judge.reward_model is not None
    assert spec.judge.reward_model.name_or_path == str(folder / "judge")
    written = dump_spec(spec)
    assert "${" not in written
    assert load_spec_text(written, folder) == spec


def test_each_variable_is_named_with_its_value(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(folder))
    (folder / "s.yaml").write_text(
        'name: a\nbase: {model: m/m, data: {train: "${DATA}/rows.jsonl", eval: "${HELD:-rows}.jsonl"}}\n'
    )
    notices = load_with_notices(folder / "s.yaml").notices
    assert f"base.data.train: DATA is {folder}" in notices
    assert "base.data.eval: HELD is not set, its default is rows" in notices


def test_what_is_said_of_several_settings_is_said_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(folder))
    (folder / "s.yaml").write_text(
        'name: a\nbase: {model: m/m, data: {train: "${DATA}/rows.jsonl", eval: "${DATA}/rows.jsonl"}}\n'
    )
    paths = "base.data.train, base.data.eval"
    assert load_with_notices(folder / "s.yaml").notices == (f"{paths}: DATA is {folder}",)


def test_an_escaped_variable_is_text_in_the_file_and_in_what_is_recorded(load_text: Load, folder: Path) -> None:
    (folder / "${ROWS}.jsonl").write_text((folder / "rows.jsonl").read_text())
    spec = load_text('base: {model: m/m, data: {train: "$${ROWS}.jsonl"}}')
    assert spec.base.data.train == (FileSource(path=str(folder / "${ROWS}.jsonl")),)
    (folder / "spec.yaml").write_text(dump_spec(spec))
    assert load_spec(folder / "spec.yaml") == load_spec(folder / "spec.yaml", is_new=False) == spec


def test_a_stored_sweep_of_before_there_were_variables_keeps_its_names(folder: Path) -> None:
    (folder / "${ROWS}.jsonl").write_text((folder / "rows.jsonl").read_text())
    (folder / "spec.yaml").write_text(f'name: a\nbase: {{model: m/m, data: {{train: "{folder}/${{ROWS}}.jsonl"}}}}\n')
    spec = load_spec(folder / "spec.yaml", is_new=False)
    assert spec.base.data.train == (FileSource(path=str(folder / "${ROWS}.jsonl")),)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mirror: s3://${NOT_SET}/x", "the environment variable NOT_SET is not set (set it, or write ${NOT_SET:-"),
        ("mirror: s3://${EMPTY}/x", "the environment variable EMPTY is empty"),
        ("mirror: s3://${1X}/x", "is no variable (write ${NAME}, or ${NAME:-default}"),
        ("mirror: s3://${NAME", "is no variable"),
        ("mirror: s3://${AWS_SECRET_ACCESS_KEY}/x", "${AWS_SECRET_ACCESS_KEY} looks like a secret by its name"),
        ("storage: postgresql://me:${DB_PWD}@db/x", "a variable stands where a URL has its password or key"),
        ("tracking: {uri: 'https://${HOST}/?token=${PART}'}", "where a URL has its password or key"),
        ("tracking: {uri: '${TRACKING}'}", "the value of ${TRACKING} contains a password or a token"),
        ("tracking: {experiment: '${PLAIN}'}", "the value of ${PLAIN} contains a password or a token"),
        ("tracking: {experiment: '${COPY}'}", "the value of ${COPY} contains a password or a token"),
    ],
)
def test_unset_malformed_and_secret_variables_are_refused_without_their_values(
    findings: Refused, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    secrets = {
        "TRACKING": "https://me:hunter2hunter2@host",
        "PLAIN": "hf_abcdefghijklmnopqrst",
        "COPY": "correct-horse",
    }
    other = {"EMPTY": "", "AWS_SECRET_ACCESS_KEY": "correct-horse", "HOST": "h", "PART": "p", "DB_PWD": "p"}
    for name, value in (secrets | other).items():
        monkeypatch.setenv(name, value)
    (found,) = findings(f"description: x\n{line}\n")
    assert found.startswith("sweep.yaml:2: ")
    assert said in found
    assert not any(value in found for value in secrets.values())


def test_a_variable_elsewhere_is_an_error_with_the_option_that_works(findings: Refused, load_text: Load) -> None:
    (found,) = findings('base:\n  model: m/m\n  data: {train: rows.jsonl}\n  training: {learning_rate: "${RATE}"}\n')
    assert found.startswith("sweep.yaml:4: base.training.learning_rate: ${RATE} is text here")
    assert "--set training.learning_rate=$RATE" in found
    spec = load_text('description: "costs ${5}"\nnotify: {command: [sh, -c, "curl ${WEBHOOK}"]}\n')
    assert spec.notify is not None
    assert (spec.description, spec.notify.command) == ("costs ${5}", ("sh", "-c", "curl ${WEBHOOK}"))


def test_a_chat_template_is_not_searched_for_variables(load_text: Load) -> None:
    template = "{% for m in messages %}${price} {{ m.content }}{% endfor %}"
    spec = load_text("", f"data.chat_template='{template}'")
    assert spec.base.data.chat_template == template
    assert load_text(dump_spec(spec)).base.data.chat_template == template


def test_set_expands_variables_too(load_text: Load, findings: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORG", "other")
    assert load_text("", "model=${ORG}/model").base.model.name_or_path == "other/model"
    (found,) = findings("", "model=${NOT_SET}/model")
    assert found.startswith("--set model=${NOT_SET}/model: base.model: the environment variable NOT_SET")
