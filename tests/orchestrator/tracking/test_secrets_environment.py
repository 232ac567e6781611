import json
import subprocess
from pathlib import Path

import pytest

from orchestrator.redaction import redact, secret_values, without_credentials
from orchestrator.tracking.mlflow_client import tracking_uri
from orchestrator.tracking.mlflow_receiver import CUT, MAX_PARAM_LENGTH, param_text
from orchestrator.tracking.run_metadata import environment, environment_tags, git_commit


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "WANDB_API_KEY", "db_password"])
def test_values_of_secret_variables_are_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "canary-1234")
    assert redact("failed with canary-1234.") == "failed with ***."


def test_short_values_and_paths_are_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "id_ed25519").touch()
    there = {"SSH_KEY": str(tmp_path / "id_ed25519"), "A_KEY": "~/id_ed25519", "B_KEY": "./id_ed25519"}
    assert secret_values({"TOKENIZERS_PARALLELISM": "true", "API_TOKEN": "x" * 20} | there) == ["x" * 20]


@pytest.mark.parametrize(
    "secret", ["/Zr8+k1q/9aa", ".hidden-canary", "~canary~1234", "/" * 3 + "x" * 5000, "./a\0b-canary", "~nobody42/key"]
)
def test_a_secret_that_begins_like_a_path_is_masked_where_no_such_path_is(secret: str) -> None:
    assert redact(f"refused {secret}!", secret_values({"DB_PASSWORD": secret})) == "refused ***!"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql+psycopg://me:pa55@db:5432/x", "postgresql+psycopg://***@db:5432/x"),
        ("https://token@host/path and more", "https://***@host/path and more"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("http://me:pa@55@host/x", "http://***@host/x"),
        ('{"uri":"http://host","to":"me@example.org"}', '{"uri":"http://host","to":"me@example.org"}'),
        ("me@example.org", "me@example.org"),
    ],
)
def test_credentials_in_uris_are_masked(uri: str, shown: str) -> None:
    assert redact(uri, []) == shown
    assert without_credentials(uri) == shown.replace("***@", "")


def test_the_environment_is_json_and_says_what_matters() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert {"torch", "transformers", "optuna"} <= set(found["packages"])
    assert found["cpus"] >= 1
    tags = environment_tags(found)
    assert all(isinstance(v, str) for v in tags.values())
    assert tags["env.torch"] == found["packages"]["torch"]


def test_the_commit_of_a_folder(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m x"):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    found = git_commit(tmp_path)
    assert (len(found["commit"]), found["dirty"]) == (40, False)
    (tmp_path / "new").touch()
    assert git_commit(tmp_path) == {**found, "dirty": True}


def test_where_mlflow_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path, None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert tracking_uri(tmp_path, None) == "http://env:5000"
    assert tracking_uri(tmp_path, "http://spec:5000") == "http://spec:5000"


@pytest.mark.parametrize(
    ("value", "text"), [(3.14159, "3.14159"), (6e-7, "6e-07"), (None, "null"), (True, "true"), ("a", "a"), ([1], "[1]")]
)
def test_params_look_as_in_the_sweeps_file(value: object, text: str) -> None:
    assert param_text(value) == text


def test_a_long_param_is_cut_with_a_mark() -> None:
    text = param_text("x" * 10_000)
    assert len(text) == MAX_PARAM_LENGTH
    assert text.endswith(CUT)
