"""Files of data are sent with a sweep: in parts, continued, once for each content, and checked by their SHA-256."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import save_file

from orchestrator import api
from orchestrator.api.service_client import ServiceClient, ServiceRefused
from orchestrator.api.uploads import ModelNotSent, local_files, upload_file, upload_model
from orchestrator.errors import SpecError, StorageRefused
from orchestrator.service.access_tokens import Role
from orchestrator.service.http_app import Service
from orchestrator.service.uploaded_files import Announced, UploadedFiles, UploadRefused
from orchestrator.spec.loading.loader import load_spec_text
from tests.support.processes import called
from tests.support.service_http import listening

SWEEP = """
name: mine
base:
  model: {generated: {}}
  data:
    train: pairs.jsonl
    eval: {path: held-out.jsonl}
    apply_template: true
  loss: {kind: simpo}
search:
  loss.beta: [2.0, 5.0]
maximize: eval_accuracies/logp
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[api.Server]:
    root = tmp_path / "runs"
    root.mkdir()
    service = Service(root)
    with listening(service) as url:
        yield api.connect(url, service.tokens.create("ada", Role.OPERATOR))


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"prompt": f"Add {n} and 1.", "chosen": f"{n + 1}", "rejected": f"{n + 2}"} for n in range(64)]
    for name in ("pairs.jsonl", "held-out.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows.reverse()
    (folder / "mine.yaml").write_text(SWEEP)
    return folder / "mine.yaml"


def stored(server: api.Server, tmp_path: Path) -> dict[str, Path]:
    return {path.name: path for path in (tmp_path / "runs" / "service" / "files" / "ada").glob("*/[!.]*")}


def test_a_sweeps_files_are_sent_once_and_the_sweep_reads_them_there(
    server: api.Server, sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, post = list[int](), ServiceClient.post_bytes

    def counted(client: ServiceClient, path: str, content: bytes, **query: Any) -> Any:
        sent.append(len(content))
        return post(client, path, content, **query)

    monkeypatch.setattr(ServiceClient, "post_bytes", counted)
    with pytest.raises(SpecError, match=r"pairs\.jsonl is outside of the folders"):  # of the service
        server.submit(sweep_file)
    offered: dict[str, Path] = {}
    server.submit(sweep_file, upload=lambda found: bool(offered.update(found)) or True)
    assert offered == {name: sweep_file.parent / name for name in ("pairs.jsonl", "held-out.jsonl")}
    there = stored(server, tmp_path)
    assert {name: path.read_bytes() for name, path in there.items()} == {
        name: path.read_bytes() for name, path in offered.items()
    }
    assert sum(sent) == sum(path.stat().st_size for path in offered.values())
    server.submit(sweep_file, name="again", upload=True)
    assert len(sent) == 2, "what is there is not sent again"
    queued = {sweep["name"] for sweep in server.queue()}
    assert queued == {"mine", "again"}
    spec = load_spec_text((queue_text(tmp_path)), tmp_path)
    assert [source.model_dump()["path"] for source in spec.base.data.train] == [str(there["pairs.jsonl"])]


def queue_text(tmp_path: Path) -> str:
    """The resolved file of the sweep `mine` as the service has it."""
    from orchestrator.service.hosting.queue_location import queue_url
    from orchestrator.service.sweep_queue import SweepQueue

    queue = SweepQueue(queue_url(tmp_path / "runs"))
    try:
        return queue.find("mine").spec
    finally:
        queue.close()


def test_an_upload_continues_after_lost_answers_and_with_a_new_client(
    server: api.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.api.uploads._PART_BYTES", 1000)
    file, calls, send = tmp_path / "rows.jsonl", list[str](), httpx2.Client.send
    file.write_bytes(bytes(range(256)) * 40)

    def lose_answers(client: httpx2.Client, request: httpx2.Request, **more: Any) -> httpx2.Response:
        answer = send(client, request, **more)
        if request.method == "POST":
            calls.append(request.url.params["offset"])
            if len(calls) == 3:
                raise httpx2.ReadError("the connection was reset")
            if len(calls) == 5:
                raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(httpx2.Client, "send", lose_answers)
    with pytest.raises(KeyboardInterrupt):
        upload_file(server.client, file)
    assert calls == ["0", "1000", "2000", "3000", "4000"]
    assert stored(server, tmp_path) == {}, "it has no name before it is complete"
    steps: list[int] = []
    found = upload_file(server.client, file, lambda sent, size: steps.append(sent))
    assert steps[0] == 5000
    assert steps[-1] == file.stat().st_size
    assert found == f"{hashlib.sha256(file.read_bytes()).hexdigest()}/rows.jsonl"
    assert stored(server, tmp_path)["rows.jsonl"].read_bytes() == file.read_bytes()


def test_a_file_that_changes_while_it_is_sent_is_not_kept(
    server: api.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.api.uploads._PART_BYTES", 10)
    for changed, error, message in ((b"b" * 30, ServiceRefused, "another content"), (b"", StorageRefused, "shorter")):
        file = tmp_path / "rows.jsonl"
        file.write_bytes(b"a" * 30)

        def change(sent: int, size: int, file: Path = file, changed: bytes = changed) -> None:
            if sent == 20:
                with file.open("r+b") as out:
                    out.truncate(len(changed))
                    out.write(changed)

        with pytest.raises(error, match=message):
            upload_file(server.client, file, change)
        assert stored(server, tmp_path) == {}


def test_a_file_that_arrives_damaged_is_dropped_and_sent_again(
    server: api.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.api.uploads._PART_BYTES", 10)
    file, content = tmp_path / "rows.jsonl", b"a" * 25
    file.write_bytes(content)
    digest, post = hashlib.sha256(content).hexdigest(), ServiceClient.post_bytes
    sent: list[tuple[int, bytes]] = []

    def damaging(damages: int) -> None:
        """Change the last byte of the first so many files on their way."""

        def change(client: ServiceClient, path: str, part: bytes, **query: Any) -> Any:
            last = query["offset"] + len(part) == query["size"]
            is_damaged = last and sum(offset == query["offset"] for offset, _ in sent) < damages
            sent.append((query["offset"], part))
            return post(client, path, part[:-1] + b"x" if is_damaged else part, **query)

        monkeypatch.setattr(ServiceClient, "post_bytes", change)

    damaging(2)
    with pytest.raises(ServiceRefused, match="another content") as refused:
        upload_file(server.client, file)
    assert (refused.value.status, refused.value.code) == (422, api.ExitCode.USER)
    assert [offset for offset, _ in sent] == [0, 10, 20, 0, 10, 20], "it was sent once more by itself"
    sent.clear()
    damaging(1)
    assert upload_file(server.client, file) == f"{digest}/rows.jsonl"
    assert stored(server, tmp_path)["rows.jsonl"].read_bytes() == content


def test_the_answer_to_a_damaged_file_is_a_problem_that_says_what_to_do(server: api.Server, tmp_path: Path) -> None:
    content = b"rows\n" * 6
    url = f"{server.url}/api/v1/files/{hashlib.sha256(content).hexdigest()}"
    where = {"size": len(content), "name": "rows.jsonl"}
    headers = {"authorization": f"Bearer {server.client._token}"}  # pyright: ignore[reportPrivateUsage]

    def send(part: bytes, offset: int, **more: int) -> httpx2.Response:
        return httpx2.post(url, content=part, params={**where, **more, "offset": offset}, headers=headers)

    assert send(content[:-1] + b"x", 0).status_code == 422
    assert send(content[:10], 0).json() == {"offset": 10, "complete": False}
    cut = send(content[10:-1], 10)  # a part that lost its end is no mistake yet
    assert cut.json() == {"offset": len(content) - 1, "complete": False}
    refused = send(b"x", len(content) - 1)
    assert refused.headers["content-type"] == "application/problem+json"
    found = refused.json()
    assert (refused.status_code, found["error"], found["exit_code"]) == (422, "DigestDiffers", 2)
    assert "send the file again from its beginning" in found["detail"]
    assert httpx2.get(url, params=where, headers=headers).json() == {"offset": 0, "complete": False}
    # More bytes than the file has, as of an announcement with another size, are dropped too.
    assert send(content + b"x", 0, size=50).json()["offset"] == len(content) + 1
    assert httpx2.get(url, params=where, headers=headers).json()["offset"] == 0
    assert send(content, 0).json() == {"offset": len(content), "complete": True}
    assert stored(server, tmp_path)["rows.jsonl"].read_bytes() == content


def test_what_may_be_stored_is_bounded_and_stays_in_the_persons_folder(tmp_path: Path) -> None:
    files = UploadedFiles(tmp_path, most_bytes=100)
    content = b"x" * 60
    file = Announced(hashlib.sha256(content).hexdigest(), 60, "a.jsonl")
    assert files.append("ada", file, 0, content[:20]) == 20
    with pytest.raises(UploadRefused, match="the part begins at 30"):
        files.append("ada", file, 30, content[30:])
    with pytest.raises(UploadRefused, match="has 60 bytes, and this part ends at 61"):
        files.append("ada", file, 20, content[20:] + b"x")
    assert files.append("ada", file, 20, content[20:]) == 60
    with pytest.raises(UploadRefused, match="of at most"):
        files.offset("ada", Announced("0" * 64, 41, "b.jsonl"))
    assert files.offset("bob", Announced("0" * 64, 41, "b.jsonl")) == 0
    assert files.path("bob", file) is None, "another person's"
    with pytest.raises(SpecError, match=r"a\.jsonl was not uploaded"):
        files.aliases("bob", {"a.jsonl": f"{file.digest}/a.jsonl"})
    for wrong in (Announced("../x", 1, "a"), Announced("0" * 64, 1, "../a"), Announced("0" * 64, 1, ".a")):
        with pytest.raises(UploadRefused):
            files.append("ada", wrong, 0, b"x")
    assert {path.name for path in tmp_path.iterdir()} == {"ada"}


def test_only_data_and_models_that_are_here_are_offered(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl", "model.bin"):
        (tmp_path / name).write_text("x")
    for name in ("mine", "searched", "reward", "no-model"):
        (tmp_path / name).mkdir()
        if name != "no-model":
            (tmp_path / name / "config.json").write_text("{}")
    models = {
        "base": {"model": "mine"},
        "search": {"model.name_or_path": ["./searched", "no-model", "gone/model"]},
        "judge": {"reward_model": {"name_or_path": "reward"}},
    }
    found = local_files(models, [("model.tokenizer", "./no-model")], [tmp_path])
    assert found == {n: (tmp_path / n).resolve() for n in ("mine", "./searched", "reward", "./no-model")}
    tree = {
        "base": {"model": {"name_or_path": "model.bin"}, "data": {"train": ["a.jsonl", {"path": "gone.jsonl"}]}},
        "judge": {"prompts_from": {"path": "b.jsonl"}},
    }
    changed = [("data.eval", "c.jsonl"), ("model.tokenizer", "model.bin")]
    assert local_files(tree, changed, [tmp_path]) == {n: tmp_path / n for n in ("a.jsonl", "b.jsonl", "c.jsonl")}


def test_the_command_offers_and_sends(server: api.Server, sweep_file: Path, tmp_path: Path) -> None:
    variables = {"ORCHESTRATE_SERVER": server.url, "ORCHESTRATE_TOKEN": server.client._token}  # pyright: ignore[reportPrivateUsage]
    err = called(tmp_path / "nothing", "sweep", str(sweep_file), "--detach", code=2, **variables)[1]
    assert f"pairs.jsonl is a file here: {sweep_file.parent / 'pairs.jsonl'}" in err
    assert "--upload sends them" in err
    err = called(tmp_path / "nothing", "sweep", str(sweep_file), "--detach", "--upload", **variables)[1]
    assert "mine waits in the queue" in err
    assert set(stored(server, tmp_path)) == {"pairs.jsonl", "held-out.jsonl"}


def test_a_plan_is_of_the_files_that_would_be_sent(server: api.Server, sweep_file: Path, tmp_path: Path) -> None:
    variables = {"ORCHESTRATE_SERVER": server.url, "ORCHESTRATE_TOKEN": server.client._token}  # pyright: ignore[reportPrivateUsage]
    with sweep_file.open("a") as file:
        file.write("budgt: {}\n")
    for option in ((), ("--no-upload",)):
        err = called(tmp_path / "nothing", "plan", str(sweep_file), *option, code=2, **variables)[1]
        words = " ".join(err.split())
        assert "2 of the 3 findings below need files of this machine that the service does not have" in words, words
        assert ": pairs.jsonl, held-out.jsonl; --upload sends them" in words
        assert ("is a file here" in words) is (option == ())
    assert stored(server, tmp_path) == {}
    sweep_file.write_text(SWEEP.replace("  loss:", "  training: {pairs_per_update: 8}\n  loss:"))
    held_out = sweep_file.with_name("held-out.jsonl")
    held_out.write_text(held_out.read_text().replace("Add ", "Sum "))  # pairs with held-out prompts are not trained on
    out, err = called(tmp_path / "nothing", "plan", str(sweep_file), "--json", "--upload", **variables)
    assert f"pairs.jsonl is a file here: {sweep_file.parent / 'pairs.jsonl'}" in err
    assert json.loads(out)["train_pairs"] == 64
    assert set(stored(server, tmp_path)) == {"pairs.jsonl", "held-out.jsonl"}
    assert server.plan(sweep_file, upload=True)["train_pairs"] == 64
    assert "needs --server" in called(tmp_path / "nothing", "plan", str(sweep_file), "--upload", code=2)[1]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as a training leaves it, with weights in two files."""
    folder = tmp_path / "mine" / "my model"
    folder.mkdir(parents=True)
    weights = {f"model-0000{n}-of-00002.safetensors": {f"w{n}": torch.full((64, 64), float(n))} for n in (1, 2)}
    for name, tensors in weights.items():
        save_file(tensors, folder / name)
    index = {"metadata": {}, "weight_map": {weight: name for name, tensors in weights.items() for weight in tensors}}
    texts = {
        "config.json": json.dumps(CONFIG),
        "model.safetensors.index.json": json.dumps(index),
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "README.md": "mine",
        "training_args.bin": "pickle",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "checkpoint-3").mkdir()
    return folder


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
    "torch_dtype": "float32",
}  # fmt: skip
WITH_MODEL = SWEEP.replace("{generated: {}}", "./my model")


def test_a_model_folder_is_sent_once_and_the_sweep_starts_from_it(
    server: api.Server, sweep_file: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_file.write_text(WITH_MODEL)
    with pytest.raises(SpecError, match=r"\./my model is outside of the folders"):
        server.submit(sweep_file)
    server.submit(sweep_file, upload=True)
    spec = load_spec_text(queue_text(tmp_path), tmp_path)
    there = Path(spec.base.model.name_or_path or "")
    assert there.is_relative_to(tmp_path / "runs" / "service" / "files" / "ada")
    sent = {path.name for path in model.iterdir()} - {"README.md", "training_args.bin", "checkpoint-3"}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        name: (model / name).read_bytes() for name in sent
    }
    calls: list[str] = []
    (model / "tokenizer.json").write_text('{"changed": true}')
    post = ServiceClient.post_bytes

    def counted(client: ServiceClient, path: str, content: bytes, **query: Any) -> Any:
        calls.append(query["name"])
        return post(client, path, content, **query)

    monkeypatch.setattr(ServiceClient, "post_bytes", counted)
    other = upload_model(server.client, model)
    assert calls == ["tokenizer.json"], "what is there is not sent again"
    assert other.partition("/")[0] != there.parent.name
    assert other.endswith("/my_model")


def test_code_and_pickles_are_refused_before_anything_is_sent(
    server: api.Server, sweep_file: Path, model: Path, tmp_path: Path
) -> None:
    sweep_file.write_text(WITH_MODEL)
    for name in ("modeling_mine.py", "pytorch_model.bin", "adapter_config.json"):
        (model / name).write_text("x")
    (model / "config.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ModelNotSent) as refused:
        server.submit(sweep_file, upload=True)
    for reason in (
        "modeling_mine.py is code", "pytorch_model.bin is a pickle", "adapter_config.json names another model",
        "neither config.json nor tokenizer_config.json",
    ):  # fmt: skip
        assert reason in str(refused.value)
    assert stored(server, tmp_path) == {}
    variables = {"ORCHESTRATE_SERVER": server.url, "ORCHESTRATE_TOKEN": server.client._token}  # pyright: ignore[reportPrivateUsage]
    err = called(tmp_path / "nothing", "sweep", str(sweep_file), "--detach", "--upload", code=2, **variables)[1]
    assert "modeling_mine.py is code" in " ".join(err.split())


def test_the_command_says_what_of_a_model_it_sends(
    server: api.Server, sweep_file: Path, model: Path, tmp_path: Path
) -> None:
    sweep_file.write_text(WITH_MODEL)
    variables = {"ORCHESTRATE_SERVER": server.url, "ORCHESTRATE_TOKEN": server.client._token}  # pyright: ignore[reportPrivateUsage]
    err = called(tmp_path / "nothing", "sweep", str(sweep_file), "--detach", "--upload", **variables)[1]
    found = " ".join(err.split())
    assert f"./my model is a model of 6 files here: {model}" in found
    assert "3 that loading it does not need are not sent: README.md, training_args.bin, checkpoint-3/" in found
    assert "mine waits in the queue" in found


def test_a_model_that_is_sent_past_the_client_is_checked_too(tmp_path: Path) -> None:
    files = UploadedFiles(tmp_path, most_bytes=10_000, largest_model=1e-6)
    contents = {
        "config.json": b"{}",
        "model.safetensors": b"w" * 100,
        "model.safetensors.index.json": b'{"weight_map": {"w": "../../bob/model.safetensors"}}',
    }
    described = {name: (hashlib.sha256(text).hexdigest(), len(text)) for name, text in contents.items()}
    assert files.model("ada", "m", described)[1] == list(contents)
    for name, text in contents.items():
        files.append("ada", Announced(*described[name], name), 0, text)
    with pytest.raises(UploadRefused, match=r"names \.\./\.\./bob/model\.safetensors, which the model does not have"):
        files.model("ada", "m", described)
    plain = {name: described[name] for name in ("config.json", "model.safetensors")}
    found, missing = files.model("ada", "m", plain)
    assert missing == []
    assert files.aliases("ada", {"./m": found})["./m"].endswith(f"/ada/{found}")
    with pytest.raises(SpecError, match="was not uploaded"):
        files.aliases("bob", {"./m": found})
    assert files._used("ada") == sum(len(text) for text in contents.values()), "files of a model count once"
    for name, reason in (
        ("x.py", "code"),
        ("x.bin", "pickle"),
        ("x.md", "no file of a model"),
        ("../x.json", "cannot be"),
    ):
        with pytest.raises(UploadRefused, match=reason):
            files.model("ada", "m", plain | {name: described["config.json"]})
    with pytest.raises(UploadRefused, match="at most 1e-06 GB"):
        files.model("ada", "m", plain | {"large.safetensors": ("0" * 64, 2000)})
    with pytest.raises(UploadRefused, match="this service accepts no models"):
        UploadedFiles(tmp_path, largest_model=0).model("ada", "m", plain)
    with pytest.raises(UploadRefused, match="has 2 bytes, and not 3"):
        files.model("ada", "other", plain | {"config.json": (described["config.json"][0], 3)})
