"""Prepared data are made once per content, by whoever comes first, and never half."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.data_cases import CHATML, LLAMA, REAL, chat, data, good_rows, saved, tokenizer, write_rows
from tests.support.processes import LIMIT_SECONDS
from trainer.config.trial import DataConfig, ModelConfig
from trainer.data import prepare
from trainer.data.pair_dataset import MANIFEST, DamagedCache, get_or_create
from trainer.data.preparation import data_fingerprint
from trainer.data.tokenization import load_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return saved(tokenizer(LLAMA), tmp_path / "tokenizer")


def test_the_second_call_loads(tmp_path: Path, model: ModelConfig) -> None:
    config = data(write_rows(tmp_path / "a.jsonl", good_rows(20)))
    first = prepare(config, model, tmp_path / "cache")
    second = prepare(config, model, tmp_path / "cache")
    assert (first.was_computed, second.was_computed) == (True, False)
    assert (first.fingerprint, first.report) == (second.fingerprint, second.report)
    assert isinstance(second.train.pair(3).prompt.base, np.memmap)
    assert np.array_equal(first.train.pair(3).chosen, second.train.pair(3).chosen)


def test_the_fingerprint_follows_content_and_not_the_place(tmp_path: Path, model: ModelConfig) -> None:
    rows = good_rows(20)
    path, made = write_rows(tmp_path / "a.jsonl", rows), load_tokenizer(model, None, tmp_path)
    base = data_fingerprint(data(path), made)
    (tmp_path / "elsewhere").mkdir()
    assert data_fingerprint(data(write_rows(tmp_path / "elsewhere" / "b.jsonl", rows)), made) == base
    assert data_fingerprint(data(path), load_tokenizer(model, None, tmp_path)) == base
    made(["x", "yy"], padding=True, truncation=True, max_length=5)
    assert data_fingerprint(data(path), made) == base, "an earlier call's padding is not the tokenizer's own"
    others = [
        data_fingerprint(
            data(write_rows(tmp_path / "a2.jsonl", [*rows[:-1], chat("ask 19", "yes 19", "no 18")])), made
        ),
        data_fingerprint(data(path, max_length=128), made),
        data_fingerprint(data(path, max_prompt_length=7), made),
        data_fingerprint(data(path, eval_share=0.5), made),
        data_fingerprint(data(path, max_train_rows=5), made),
        data_fingerprint(data(path, eval=path), made),
        data_fingerprint(data({"path": path, "columns": {"prompt": "chosen"}}), made),
        data_fingerprint(data(path), tokenizer(CHATML)),
        data_fingerprint(data(path), tokenizer(LLAMA, merges=["a s"])),
        data_fingerprint(data(path), tokenizer(LLAMA, eos="</s>")),
    ]
    assert len({base, *others}) == len(others) + 1


def test_a_report_from_the_cache_names_the_sources_of_today(tmp_path: Path, model: ModelConfig) -> None:
    rows = [*good_rows(9), good_rows(1)[0]]
    old, new = (write_rows(tmp_path / name, rows) for name in ("old.jsonl", "new.jsonl"))
    first, second = (prepare(data(path), model, tmp_path / "cache").report for path in (old, new))
    assert ({s.name for s in first.sources}, {s.name for s in second.sources}) == ({old}, {new})
    assert [f.rows for f in second.findings] == [((new, 10),)]


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "no manifest", "half a manifest"])
def test_a_damaged_entry_is_made_again_with_a_warning(tmp_path: Path, model: ModelConfig, harm: str) -> None:
    config = data(write_rows(tmp_path / "a.jsonl", good_rows(20)))
    folder = tmp_path / "cache" / "data" / prepare(config, model, tmp_path / "cache").fingerprint
    tokens, manifest = folder / "train.tokens.npy", folder / MANIFEST
    full = tokens.read_bytes()
    match harm:
        case "cut":
            tokens.write_bytes(full[:-4])
        case "flip":
            tokens.write_bytes(full[:-1] + bytes([full[-1] ^ 1]))
        case "gone":
            tokens.unlink()
        case "no manifest":
            manifest.unlink()
        case _:
            manifest.write_bytes(manifest.read_bytes()[:20])
    with pytest.warns(DamagedCache):
        again = prepare(config, model, tmp_path / "cache")
    assert again.was_computed
    assert tokens.read_bytes() == full
    assert not prepare(config, model, tmp_path / "cache").was_computed


def test_nothing_is_left_of_a_failure_nor_of_a_process_that_died(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "abc"
    (tmp_path / "data" / ".abc.0123abcd.tmp").mkdir(parents=True)

    def fails(temporary: Path) -> None:
        (temporary / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        get_or_create(folder, fails)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".abc.lock"]


PROCESS = """
import sys
from pathlib import Path
from trainer.data.pair_dataset import get_or_create
cache = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
def fill(folder):
    (folder / "x").write_text("content")
print(get_or_create(cache / "data" / "abc", fill), (cache / "data" / "abc" / "x").read_text())
"""


def test_simultaneous_processes_make_it_once(tmp_path: Path) -> None:
    pipe, command = subprocess.PIPE, [sys.executable, "-c", PROCESS, str(tmp_path)]
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    messages = sorted(p.communicate(timeout=LIMIT_SECONDS)[0].strip() for p in started)
    assert messages == ["False content"] * 3 + ["True content"]


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = "torch transformers trl datasets ray optuna mlflow pyarrow"
    code = f"import sys, trainer.data, trainer.synthetic; print([m for m in '{heavy}'.split() if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_trls_utilities_do_not_bring_its_trainers() -> None:
    code = "import sys, trl.data_utils; print([m for m in sys.modules if m.startswith('trl.') and 'trainer' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared preference data are not beside this checkout")
def test_the_real_preference_data(tmp_path: Path) -> None:
    config = DataConfig.model_validate({"train": str(REAL / "preference-train.jsonl"), "max_length": 512})
    model = ModelConfig(name_or_path="unused", tokenizer=str(REAL / "tokenizer-bpe4096"))
    found = prepare(config, model, tmp_path)
    assert (found.report.bad_rows, len(found.train) + len(found.eval)) == (0, 4580)
    assert 0.07 < len(found.eval) / 4580 < 0.13
    prompts = [{part.pair(i).prompt.tobytes() for i in range(len(part))} for part in (found.train, found.eval)]
    assert not prompts[0] & prompts[1]
    kinds = {f.kind: f.count for f in found.report.findings}
    assert set(kinds) == {"prompt_cut", "system_cut", "turns_cut", "response_cut"}
    uncut = prepare(config.model_copy(update={"max_length": 8192}), model, tmp_path)
    assert uncut.report.findings == ()
    made = load_tokenizer(model, config, tmp_path)
    assert uncut.train.pair(0).chosen.tolist().count(made.eos_token_id) == 1
    # DATA.md: median 148 and p90 294 tokens of prompt and longer answer, without the template's own
    assert 140 < uncut.report.lengths["row"]["p50"] < 170
    assert 280 < uncut.report.lengths["row"]["p90"] < 320
