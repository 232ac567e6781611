"""Case 20: no pickle from a sweep's folder or a model's is ever opened, and no code that comes with a model is run."""

import ast
import pickle
from pathlib import Path

import torch

from tests.support.local_driver import KILLED, drive, forked, killed_at
from tests.trainer.storage.test_checkpoints import state
from trainer.storage import checkpoints

ROOT = Path(__file__).parents[2]
UNSAFE = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("joblib", "load"), ("dill", "load")}


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", checkpoints.save_checkpoint(tmp_path, state(10))

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (canary,)  # pyright: ignore[reportReturnType]

    for name in ("rng_state.pth", "optimizer.pt", "weights.safetensors"):
        torch.save(Bomb(), path / name)
    assert checkpoints.load_newest([tmp_path]) is None
    assert not canary.exists()


def test_bombs_in_a_sweeps_folder_do_not_go_off(fast_tmp_path: Path) -> None:
    canary = fast_tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (canary,)  # pyright: ignore[reportReturnType]

    assert killed_at(lambda: drive(fast_tmp_path), "checkpoint.discarded:2") == KILLED
    names = ("rng_state.pth", "optimizer.pt", "pytorch_model.bin", "tuner.pkl", "searcher-state.pkl", "trainable.pkl")
    folders = [p for p in (fast_tmp_path / "s").rglob("*") if p.is_dir()]
    for folder in folders:
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert len(folders) > 4
    assert forked(lambda: drive(fast_tmp_path)) == 0
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert canary.exists(), "the bombs are live ones"


def test_nothing_here_unpickles() -> None:
    for file in [
        f for available in ("trainer", "orchestrator", "dashboards") for f in (ROOT / available).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = (getattr(node.func.value, "id", ""), node.func.attr)
                assert called not in UNSAFE, f"{file}:{node.lineno}"
                pickles = [k for k in node.keywords if k.arg in ("allow_pickle", "weights_only")]
                assert not pickles, f"{file}:{node.lineno}: {[k.arg for k in pickles]}"
    assert torch.__version__ >= "2.10", "older ones can be made to run code even with weights_only"


def test_trust_is_never_in_a_file() -> None:
    from orchestrator.spec.loading.serialization import schema

    assert "trust_remote_code" not in str(schema())
