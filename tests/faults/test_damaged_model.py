"""Damaged files of a model: a sentence that names the file, in every command that reads the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import cli
from tests.support.small_trials import MODEL
from trainer.config.model_folder import check_model_files, count_elements
from trainer.config.trial import ModelConfig
from trainer.data import load_tokenizer
from trainer.models.policy_model import load_model
from trainer.results import ModelError
from trainer.synthetic import generate_model

WEIGHTS = "model.safetensors"
SHARD = "model-00001-of-00002.safetensors"


def cut_to(size: int) -> Callable[[Path], str]:
    def damage(model: Path) -> str:
        (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:size])
        return WEIGHTS

    return damage


def cut_data(model: Path) -> str:
    return cut_to((model / WEIGHTS).stat().st_size - 1)(model)


def damaged_header(model: Path) -> str:
    content = bytearray((model / WEIGHTS).read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    (model / WEIGHTS).write_bytes(content)
    return WEIGHTS


def unfinished(model: Path) -> str:
    (model / WEIGHTS).rename(model / f"{WEIGHTS}.incomplete")
    return f"{WEIGHTS}.incomplete"


def sharded(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": SHARD}}))


def absent_shard(model: Path) -> str:
    sharded(model)
    return SHARD


def cut_index(model: Path) -> str:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {')
    return "model.safetensors.index.json"


def cut_config(model: Path) -> str:
    (model / "config.json").write_text('{"model_type": "lla')
    return "config.json"


def list_config(model: Path) -> str:
    (model / "config.json").write_text("[]")
    return "config.json"


DAMAGES = {
    "empty": cut_to(0), "cut in its length": cut_to(5), "cut in its header": cut_to(60), "cut in its data": cut_data,
    "header": damaged_header, "unfinished": unfinished, "absent shard": absent_shard, "index": cut_index,
    "config": cut_config, "config is a list": list_config,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(generate_model(ModelConfig.model_validate(MODEL).generated, tmp_path_factory.mktemp("cache")))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_sentence_names_the_damaged_file_in_every_command(
    damage: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    check_model_files(str(model))
    name = DAMAGES[damage](model)
    check_commands(name, tmp_path, monkeypatch, capsys)
    for read in (
        lambda: load_model(ModelConfig(name_or_path=str(model)), str(model), None),
        lambda: load_tokenizer(ModelConfig(name_or_path=str(model)), None, tmp_path / "cache"),
    ):
        with pytest.raises(ModelError, match=name):
            read()


@pytest.mark.parametrize(
    ("files", "name"),
    [("config.json", "model is no model: it has no config.json"), ("*.safetensors", "model has no .safetensors"),
     ("token*", "model has no tokenizer")],
)  # fmt: skip
def test_a_folder_that_lacks_a_part_of_the_model_is_refused_before_the_name_is_taken(
    files: str, name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    for file in model.glob(files):
        file.unlink()
    check_commands(name, tmp_path, monkeypatch, capsys)


def check_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that every command that reads `./model` says `name`, refuses, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    Path("pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(20))
    )
    Path("sweep.yaml").write_text(
        "name: s\nbase:\n  model: ./model\n  data: {train: ./pairs.jsonl, max_length: 64, apply_template: false}\n"
        "  loss: {kind: simpo}\n"
        "  training: {learning_rate: 1e-3}\nsearch: {loss.beta: [2.0, 2.5]}\nmaximize: eval_accuracies/logp\n"
    )
    commands = [["plan", "sweep.yaml"], ["sweep", "sweep.yaml"], ["doctor", "sweep.yaml", "--json"]]
    commands += [["init", "new.yaml", "--model", "./model", "--data", "./pairs.jsonl"]]
    for command in commands:
        code = cli.main(command)
        said = "".join(capsys.readouterr())
        assert name in said.replace("\n", ""), command
        assert "internal error" not in said
        assert code == (2 if command[0] != "doctor" else code)
        assert code != 0
    assert not (tmp_path / "runs").exists()
    assert not Path("new.yaml").exists()


def test_a_complete_model_passes_with_what_an_ended_download_leaves(whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    (model / f"{WEIGHTS}.incomplete").touch()
    check_model_files(str(model))
    sharded(model)
    shutil.copy(model / WEIGHTS, model / SHARD)
    check_model_files(str(model))
    assert count_elements(model / SHARD) > 0
