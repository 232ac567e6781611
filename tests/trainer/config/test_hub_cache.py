"""What is in the Hugging Face cache is found by its revision, and nothing else is."""

import json
import sys
from pathlib import Path

import pytest

from orchestrator.spec.estimates.input_sizes import model_shape
from tests.support.http_server import SilentHandler, refusing, serving
from tests.support.processes import LIMIT_SECONDS
from trainer.config.hub_cache import cached_file, hub_reachable, model_file
from trainer.config.position_limits import known_positions
from trainer.config.trial import ModelConfig

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 512,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of org/model, as the hub's client stores them: main is the older one, v2 the newer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--org--model"
    for ref, commit, positions in (("main", "a" * 40, 128), ("v2", "b" * 40, 256)):
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
        (root / "snapshots" / commit).mkdir(parents=True)
        config = LLAMA | {"max_position_embeddings": positions}
        (root / "snapshots" / commit / "config.json").write_text(json.dumps(config))
    return root


def test_a_revision_is_a_branch_a_tag_or_a_commit(cache: Path) -> None:
    for revision, commit in ((None, "a"), ("main", "a"), ("v2", "b"), ("b" * 40, "b")):
        assert cached_file("org/model", "config.json", revision) == cache / "snapshots" / (commit * 40) / "config.json"
    for name, file, revision in (
        ("org/model", "config.json", "v3"),
        ("org/model", "other.json", None),
        ("org/another", "config.json", None),
        ("no/name/of/the/hub", "config.json", None),
    ):
        assert cached_file(name, file, revision) is None


def test_a_folder_comes_before_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert model_file("org/model", "config.json") is None
    (tmp_path / "org" / "model" / "config.json").write_text("{}")
    assert model_file("org/model", "config.json") == Path("org/model/config.json")


@pytest.mark.usefixtures("cache")
def test_shape_and_positions_are_those_of_the_revision() -> None:
    for revision, expected in ((None, 128), ("v2", 256)):
        positions = known_positions(ModelConfig(name_or_path="org/model", revision=revision))
        assert positions is not None
        assert positions.trained == expected
    shape = model_shape(ModelConfig(name_or_path="org/model", revision="v2"))
    assert shape is not None
    assert (shape.hidden, shape.layers) == (64, 2)
    assert model_shape(ModelConfig(name_or_path="org/model", revision="v3")) is None


class _Refusing(SilentHandler):
    def do_HEAD(self) -> None:
        self.send_response(503)
        self.end_headers()


def test_a_hub_that_answers_anything_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.config.hub_cache._TIMEOUT", LIMIT_SECONDS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving(_Refusing) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        assert hub_reachable()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert not hub_reachable()


def test_a_hub_that_is_silent_or_no_address_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with refusing() as port:
        for endpoint in (f"http://127.0.0.1:{port}", "http://[", "no address"):
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
            assert not hub_reachable()


def test_no_hub_is_reachable_by_a_proxy_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    assert not hub_reachable()
