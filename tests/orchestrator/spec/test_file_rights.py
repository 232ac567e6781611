"""What a file of a person without an account here may name: nothing outside of the folders, there or not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.loading.file_rights import FileRights, check_settings
from orchestrator.spec.loading.loader import LoadedSpec, load_text_with_notices
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import FileSource

ROWS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3
BASE = "base: {model: org/model, data: {train: rows.jsonl}}\n"
PLACES = {
    "model": "base: {model: 'NAME', data: {train: rows.jsonl}}",
    "tokenizer": "base: {model: {name_or_path: org/m, tokenizer: 'NAME'}, data: {train: rows.jsonl}}",
    "train": "base: {model: org/m, data: {train: ['NAME', rows.jsonl]}}",
    "eval": "base: {model: org/m, data: {train: rows.jsonl, eval: {path: 'NAME'}}}",
    "template": "base: {model: org/m, data: {train: rows.jsonl, chat_template: 'NAME'}}",
    "data set": "base: {model: org/m, data: {train: {dataset: 'NAME', split: train}}}",
    "sft": f"{BASE}sft: {{training: {{}}, data: {{train: 'NAME'}}}}",
    "sft template": f"{BASE}sft: {{training: {{}}, data: {{train: rows.jsonl, chat_template: 'NAME'}}}}",
    "reward model": f"{BASE}judge: {{reward_model: 'NAME'}}",
    "prompts": f"{BASE}judge: {{prompts_from: 'NAME', reward_model: org/judge}}",
    "searched": f"{BASE}search: {{model.name_or_path: ['NAME', org/other]}}",
    "searched tokenizer": f"{BASE}search: {{model.tokenizer: {{choice: ['NAME', org/other]}}}}",
    "searched template": f"{BASE}search: {{data.chat_template: ['NAME', '{{{{ messages }}}}']}}",
    "zipped": f"{BASE}search: {{zip: {{model.name_or_path: ['NAME', org/x], loss.beta: [1.0, 2.0]}}}}",
    "enqueued": f"{BASE}search: {{loss.beta: [1.0, 2.0]}}\nenqueue: [{{loss.beta: 1.0, model.name_or_path: 'NAME'}}]",
}
"""Where a file names files, models and data sets."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder that is open, beside one that is not; `link` leads from the one into the other."""
    opened, closed = tmp_path / "data", tmp_path / "secret"
    for folder in (opened, closed):
        folder.mkdir()
        (folder / "rows.jsonl").write_text(ROWS)
    (closed / "passwd").write_text("root")
    (opened / "model").mkdir()
    (opened / "link").symlink_to(closed)
    return opened


def load(data: Path, text: str, *overrides: str) -> LoadedSpec:
    rights = FileRights(
        (data,), None, is_closed=True, advice="ask", forbidden={"storage": "why", "judge.endpoint": "no"}
    )
    return load_text_with_notices(f"name: a\n{text}\n", rights, overrides)


def problems(data: Path, text: str, *overrides: str) -> tuple[SpecProblem, ...]:
    with pytest.raises(SpecError) as caught:
        load(data, text, *overrides)
    return caught.value.problems


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every path that is looked at or listed."""
    seen: list[str] = []
    for name in ("stat", "lstat", "listdir", "scandir", "readlink", "access"):
        before = getattr(os, name)

        def wrapped(path: Any = ".", *more: Any, _before: Any = before, **options: Any) -> Any:
            seen.append(os.fspath(path) if not isinstance(path, int) else "")
            return _before(path, *more, **options)

        monkeypatch.setattr(os, name, wrapped)
    return seen


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_exists_and_one_that_does_not_get_the_same_answer(
    place: str, data: Path, looked_at: list[str]
) -> None:
    secret = data.parent / "secret"
    names = [f"{secret}/passwd", "../secret/passwd", "~root/.ssh", "model/../../secret/passwd", "~/x", "./link/passwd"]
    for name in names:
        if "link" in name:  # the link itself is followed, and its answer is the same
            assert [path for path in looked_at if str(path).startswith(str(secret))] == []
        answers: list[str] = []
        for given in (name, name.replace("passwd", "absent")):
            found = problems(data, PLACES[place].replace("NAME", given))
            answers.append("\n".join(map(str, found)).replace(given, "X"))
            if place not in ("searched tokenizer", "searched template", "enqueued"):  # refused for another reason too
                assert any(word in found[0].problem for word in ("outside of the folders", "no name of a data set"))
            assert str(data.parent) not in answers[-1].replace(f"{data}/link", ""), "no other name is shown"
        assert answers[0] == answers[1], name
        assert answers[0].startswith("sweep.yaml:")


def test_files_in_the_folders_and_names_of_the_hub_are_taken(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "template.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(data.parent)
    spec = load(
        data,
        "base: {model: model, data: {train: rows.jsonl, eval: {dataset: org/pairs, split: test}, "
        "chat_template: template.jinja}}\n"
        f"judge: {{prompts_from: {data}/rows.jsonl, reward_model: org/judge}}\n"
        "search: {model.name_or_path: [model, org/other-1.5_b]}\n",
    ).spec
    assert spec.base.model.name_or_path == str(data / "model")
    assert spec.base.data.train == (FileSource(path=str(data / "rows.jsonl")),)
    assert spec.base.data.chat_template == str(data / "template.jinja")
    assert spec.judge is not None
    assert spec.judge.prompts_from == FileSource(path=str(data / "rows.jsonl"))
    assert spec.search.choices("model.name_or_path") == (str(data / "model"), "org/other-1.5_b")
    near = problems(data, BASE.replace("rows.jsonl", "row.jsonl"))
    assert [found.hint for found in near] == ["did you mean rows.jsonl?"]
    near = problems(data, BASE.replace("org/model", "./modle"))
    assert near[0].hint == "did you mean ./model?"


def test_what_a_file_must_not_have_is_reported_with_its_other_mistakes(data: Path) -> None:
    text = (
        f"{BASE}storage: 'postgresql://db/x'\nbudget: {{trials: 0}}\njudge: {{endpoint: {{url: 'http://x', model: m}}}}"
    )
    found = problems(data, text)
    assert [(each.where, each.path) for each in found] == [
        ("sweep.yaml:3", "storage"), ("sweep.yaml:4", "budget.trials"), ("sweep.yaml:5", "judge.endpoint")
    ]  # fmt: skip
    assert (found[0].problem, found[0].hint) == ("is not allowed in this file", "why")
    assert [each.where for each in problems(data, BASE, "storage=sqlite:///x.db")] == ["--set storage=sqlite:///x.db"]


def test_no_variable_of_the_environment_is_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_HOST", "db.internal")
    found = problems(data, BASE.replace("org/model", "'${DATABASE_HOST}/m'"))
    assert "DATABASE_HOST" in found[0].problem
    assert "db.internal" not in str(found[0])
    spec = load(data, BASE.replace("org/model", "'${DATABASE_HOST:-org}/m'")).spec
    assert spec.base.model.name_or_path == "org/m", "the default, though the variable is set"


def test_what_is_generated_has_a_size(data: Path) -> None:
    rows = "base: {model: org/m, data: {train: {generated: instructions, rows: 1000000000}}}"
    model = "base: {model: {generated: {hidden_size: 100000, num_attention_heads: 4}}, data: {train: rows.jsonl}}"
    for text, word in ((rows, "rows are generated"), (model, "parameters is generated")):
        (found,) = problems(data, text)
        assert word in found.problem


def test_settings_of_one_trial_are_checked_as_those_of_a_file(data: Path) -> None:
    rights = FileRights((data,), None, is_closed=True)
    check_settings(rights, {"loss.beta": 2.0, "model.name_or_path": str(data / "model"), "model.tokenizer": "org/t"})
    with pytest.raises(SpecError) as caught:
        check_settings(rights, {"base.model.tokenizer": "/etc", "data.chat_template": "/etc/{x}"})
    assert [found.path for found in caught.value.problems] == ["base.model.tokenizer", "data.chat_template"]


CHECKED = {
    *("base.model.name_or_path", "base.model.tokenizer", "base.data.chat_template", "base.data.train.path"),
    *("base.data.eval.path", "base.data.train.dataset", "base.data.eval.dataset", "judge.prompts_from.path"),
    *("judge.prompts_from.dataset", "judge.reward_model.name_or_path", "sft.data.chat_template"),
    *(f"sft.data.{split}.{key}" for split in ("train", "eval") for key in ("path", "dataset")),
    *("storage", "mirror", "tracking.uri", "tracking.artifacts", "notify.webhook_env", "notify.command"),
    *("judge.endpoint.url", "judge.endpoint.model", "judge.endpoint.api_key_env"),
}
HARMLESS = {
    *("name", "description", "auto", "tracking.experiment", "warm_start"),  # names within the runs folder and MLflow
    *("base.model.revision", "judge.reward_model.revision"),  # of the hub
    *(f"{at}.{key}" for at in ("base.data.train", "base.data.eval") for key in ("split", "subset", "revision")),
    *(f"sft.data.{split}.{key}" for split in ("train", "eval") for key in ("split", "subset", "revision")),
    *(f"judge.prompts_from.{key}" for key in ("split", "subset", "revision")),
    *(f"{at}.columns" for at in ("base.data.train", "base.data.eval", "sft.data.train", "sft.data.eval")),
    *("judge.prompts_from.columns", "base.lora.target_modules"),
}


def test_every_setting_with_free_text_is_checked_or_known_to_name_nothing_here() -> None:
    """A new one has to be added to one of the two."""
    skipped = {"search", "goal", "also", "require", "pruner", "sampler", "enqueue"}  # metrics and numbers; PLACES
    found = {path for path in _texts(SweepSpec, "") if path.split(".")[0] not in skipped}
    assert found == CHECKED | HARMLESS


def _texts(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        for kind in _kinds(field.annotation):
            if kind is str:
                yield f"{prefix}{name}"
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _texts(kind, f"{prefix}{name}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types within a union, a tuple or an annotated type; values of a Literal are none."""
    if get_origin(annotation) is Literal:
        return
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for each in inner:
        yield from _kinds(each)
