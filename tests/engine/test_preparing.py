"""The data's own process: it answers, it fails in words, and it never outlives its driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.errors import DataError
from orchestrator.execution.stop_reasons import Interrupt, Interrupted
from orchestrator.execution.workers.data_process import Preparing
from orchestrator.execution.workers.stage_worker import StageFailed
from trainer.config.trial import ModelConfig, TrialConfig
from trainer.data.data_report import DataReport
from trainer.models.model_files import locate

MODEL = {"generated": {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}}


def config(train: object, max_length: int = 96) -> TrialConfig:
    return TrialConfig.model_validate({"model": MODEL, "data": {"train": train, "max_length": max_length}})


GOOD = {"generated": "instructions", "rows": 24}


def begun(cache: Path, first: TrialConfig, interrupt: Interrupt) -> Preparing:
    return Preparing(cache, first, {}, interrupt, lambda: None)


def test_answers_in_any_order_each_prepared_once(tmp_path: Path) -> None:
    first, second = config(GOOD), config(GOOD, max_length=80)
    with Interrupt(lambda: "") as interrupt, begun(tmp_path, first, interrupt) as data:
        found = [DataReport.model_validate_json(data.prepare(each)) for each in (second, first)]
        assert [report.train_rows for report in found] == [22, 22]  # two of them are held out
        data.end()
        assert DataReport.model_validate_json(data.prepare(first)) == found[1]  # heard before, asked of nobody


def test_data_that_cannot_be_used_are_refused_in_words_and_the_next_are_read(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "chosen": "b"}) + "\n" for _ in range(3)))
    with Interrupt(lambda: "") as interrupt, begun(tmp_path, config(str(rows)), interrupt) as data:
        with pytest.raises(DataError, match="rejected"):
            data.prepare(config(str(rows)))
        assert DataReport.model_validate_json(data.prepare(config(GOOD))).train_rows == 22


def test_a_death_is_told_with_its_last_words(tmp_path: Path) -> None:
    with Interrupt(lambda: "") as interrupt, begun(tmp_path, config(GOOD), interrupt) as data:
        data._process.send_signal(signal.SIGKILL)  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(StageFailed, match="died:\nit ended with -9 and said nothing"):
            data.prepare(config(GOOD))


def test_an_interruption_ends_the_wait_and_the_process(tmp_path: Path) -> None:
    with Interrupt(lambda: "") as interrupt:
        with begun(tmp_path, config(GOOD), interrupt) as data:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted):
                data.prepare(config(GOOD))
        assert data._process.returncode == -signal.SIGKILL  # pyright: ignore[reportPrivateUsage]


def test_it_ends_with_a_driver_that_was_killed(tmp_path: Path) -> None:
    driver = f"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_preparing import GOOD, begun, config
from orchestrator.execution.stop_reasons import Interrupt
with Interrupt(lambda: "") as interrupt:
    data = begun(Path({str(tmp_path)!r}), config(GOOD), interrupt)
    print(data._process.pid, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.05)  # the test's time limit is the bound


def test_a_tokenizers_own_code_is_run_only_with_the_flag(tmp_path: Path) -> None:
    own = Path(locate(ModelConfig.model_validate(MODEL), tmp_path))
    (own / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    first = TrialConfig.model_validate({"model": str(own), "data": {"train": GOOD, "max_length": 96}})
    with Interrupt(lambda: "") as interrupt:
        with begun(tmp_path, first, interrupt) as data, pytest.raises(DataError, match="only with --trust-remote-code"):
            data.prepare(first)
        with Preparing(tmp_path, first, {}, interrupt, lambda: None, trust_remote_code=True) as data:
            assert DataReport.model_validate_json(data.prepare(first)).train_rows == 22


def test_what_adapters_change_is_told_and_names_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    plain = config(GOOD)
    adapted = TrialConfig.model_validate(plain.model_dump() | {"lora": {"target_modules": ["q_proj"]}})
    wrong = TrialConfig.model_validate(plain.model_dump() | {"lora": {"target_modules": ["q_prj", "v_proj"]}})
    with Interrupt(lambda: "") as interrupt, begun(tmp_path, plain, interrupt) as data:
        for each in (plain, adapted):
            data.prepare(each)
        assert data.notices(plain) == []
        assert data.notices(adapted) == ["lora adapts 2 layers (2 q_proj)"]
        with pytest.raises(DataError, match=r"lora\.target_modules: q_prj is not in .*; did you mean q_proj\?"):
            data.prepare(wrong)
