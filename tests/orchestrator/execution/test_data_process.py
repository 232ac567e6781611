"""The data's own process: it answers, it fails in words, and it never outlives its driver."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from orchestrator.errors import DataError
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted
from orchestrator.execution.workers import data_preparation, data_process
from orchestrator.execution.workers.data_process import DataProcess
from orchestrator.execution.workers.stage_worker import StageFailed
from orchestrator.spec.judge_config import JudgeConfig
from tests.support.processes import wait_until
from tests.support.real_trials import is_alive
from trainer.config.trial import GeneratedModel, ModelConfig, TrialConfig
from trainer.data.data_report import DataReport
from trainer.models.model_files import resolve_model_path
from trainer.synthetic import generate_model

MODEL = {"generated": {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}}


def config(train: object, max_length: int = 96) -> TrialConfig:
    return TrialConfig.model_validate({"model": MODEL, "data": {"train": train, "max_length": max_length}})


GOOD = {"generated": "instructions", "rows": 24}


def begun(cache: Path, first: TrialConfig, signals: SignalHandler) -> DataProcess:
    return DataProcess(cache, first, {}, signals, lambda: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataProcess]:
    """One process for tests that only ask it: it takes seconds to start."""
    with SignalHandler(lambda: "") as signals, begun(tmp_path_factory.mktemp("data"), config(GOOD), signals) as data:
        yield data


def test_answers_in_any_order_each_prepared_once(tmp_path: Path) -> None:
    first, second = config(GOOD), config(GOOD, max_length=80)
    with SignalHandler(lambda: "") as signals, begun(tmp_path, first, signals) as data:
        found = [DataReport.model_validate_json(data.prepare(each)) for each in (second, first)]
        assert [report.train_rows for report in found] == [22, 22]  # two of them are held out
        data.shut_down()
        assert DataReport.model_validate_json(data.prepare(first)) == found[1]  # heard before, asked of nobody


def has_torch(data: DataProcess) -> bool:
    return "libtorch" in Path(f"/proc/{data._process.pid}/maps").read_text()  # pyright: ignore[reportPrivateUsage]


def test_data_are_prepared_without_torch_as_with_it(tmp_path: Path) -> None:
    model = generate_model(GeneratedModel(**MODEL["generated"]), tmp_path / "made")
    plain = TrialConfig.model_validate({"model": str(model), "data": {"train": GOOD, "max_length": 96}})
    adapted = TrialConfig.model_validate(plain.model_dump() | {"lora": {"target_modules": ["q_proj"]}})
    request = data_process._request(plain)  # pyright: ignore[reportPrivateUsage]
    expected = data_preparation.prepare_data(tmp_path / "here", request, False)
    with SignalHandler(lambda: "") as signals, begun(tmp_path / "there", plain, signals) as data:
        assert data.prepare(plain) == expected["report"]
        assert not has_torch(data)
        assert data.prepare(adapted) == expected["report"]
        assert has_torch(data)
        assert data.notices(adapted) == ["lora adapts 2 layers (2 q_proj)"]


def test_a_tokenizer_that_cannot_be_loaded_without_torch_is_tried_with_it(tmp_path: Path) -> None:
    broken = generate_model(GeneratedModel(**MODEL["generated"]), tmp_path / "made")
    (broken / "tokenizer.json").write_text("{")
    first = TrialConfig.model_validate({"model": str(broken), "data": {"train": GOOD, "max_length": 96}})
    with SignalHandler(lambda: "") as signals, begun(tmp_path, first, signals) as data:
        assert not has_torch(data)
        with pytest.raises(DataError, match=r"the tokenizer of '.*' cannot be loaded"):
            data.prepare(first)
        assert has_torch(data)


def test_data_that_cannot_be_used_are_refused_in_words_and_the_next_are_read(data: DataProcess, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "chosen": "b"}) + "\n" for _ in range(3)))
    with pytest.raises(DataError, match="rejected"):
        data.prepare(config(str(rows)))
    assert DataReport.model_validate_json(data.prepare(config(GOOD, max_length=88))).train_rows == 22


def test_rows_without_scores_are_refused_only_where_the_loss_reads_scores(data: DataProcess, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no", "score_chosen": 2, "score_rejected": n % 3}
            for n in range(30)]  # fmt: skip
    del rows[6]["score_chosen"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": MODEL, "data": {"train": str(path), "max_length": 96, "apply_template": False}}
    plain = TrialConfig.model_validate(given | {"loss": {"kind": "dpo"}})
    scored = TrialConfig.model_validate(given | {"loss": {"kind": "dpo", "odpo_alpha": 1.0}})
    assert DataReport.model_validate_json(data.prepare(plain)).train_rows == 27
    with pytest.raises(DataError, match=r"1 row has no finite number as score_chosen .*rows\.jsonl: 7\)"):
        data.prepare(scored)
    made = TrialConfig.model_validate({"model": MODEL, "data": {"train": GOOD}, "loss": scored.loss})
    assert DataReport.model_validate_json(data.prepare(made)).train_rows == 22
    assert data.score_notice(made) == data.score_notice(plain) == ""


def test_prompts_without_positions_for_their_answers_are_refused_before_a_trial(
    data: DataProcess, tmp_path: Path
) -> None:
    """What fits is decided by the held-out rows: the limits of the configuration alone do not say it."""
    tokenizer = AutoTokenizer.from_pretrained(generate_model(GeneratedModel(**MODEL["generated"]), tmp_path / "made"))
    model = tmp_path / "gpt2"
    tokenizer.save_pretrained(model)
    shape = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}
    AutoConfig.for_model("gpt2", **shape).save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"{i} " + "a " * 9, "chosen": "b", "rejected": "c"} for i in range(20)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def trial(new: int) -> TrialConfig:
        data = {"train": str(rows), "max_length": 48, "apply_template": False}
        evaluation = {"prompts": 2, "max_new_tokens": new}
        return TrialConfig.model_validate({"model": str(model), "data": data, "evaluation": evaluation})

    assert DataReport.model_validate_json(data.prepare(trial(16))).eval_rows == 2
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens with 46 new ones exceeds the 48 positions"):
        data.prepare(trial(46))
    data.check_judge(trial(16), JudgeConfig(max_new_tokens=16))
    with pytest.raises(DataError, match=r"with 46 new ones exceeds the 48 .*: lower judge\.max_new_tokens or"):
        data.check_judge(trial(16), JudgeConfig(max_new_tokens=46))
    elsewhere = tmp_path / "asked.jsonl"
    elsewhere.write_text(json.dumps({"prompt": "a " * 40}) + "\n")
    judge = JudgeConfig.model_validate({"max_new_tokens": 16, "prompts_from": str(elsewhere)})
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens with 16 new ones exceeds the 48 positions"):
        data.check_judge(trial(16), judge)
    with pytest.raises(DataError, match=r"none of the 2 prompts has an `answer` .* set judge.reward_model or"):
        data.check_judge(trial(16), JudgeConfig(max_new_tokens=16), checked=True)


def test_a_death_is_told_with_its_last_words(tmp_path: Path) -> None:
    with SignalHandler(lambda: "") as signals, begun(tmp_path, config(GOOD), signals) as data:
        data._process.send_signal(signal.SIGKILL)  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(StageFailed, match="died:\nexit code -9 without output"):
            data.prepare(config(GOOD))


def test_an_interruption_ends_the_wait_and_the_process(tmp_path: Path) -> None:
    with SignalHandler(lambda: "") as signals:
        with begun(tmp_path, config(GOOD), signals) as data:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(StageInterrupted):
                data.prepare(config(GOOD))
        assert data._process.returncode == -signal.SIGKILL  # pyright: ignore[reportPrivateUsage]


DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.execution.workers.data_process import DataProcess
from trainer.config.trial import TrialConfig
with SignalHandler(lambda: "") as signals:
    first = TrialConfig.model_validate_json(sys.argv[2])
    data = DataProcess(Path(sys.argv[1]), first, {}, signals, lambda: None)
    print(data._process.pid, flush=True)
    time.sleep(600)
"""


def test_it_ends_with_a_driver_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path), config(GOOD).model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    assert is_alive(child)
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(child))
    assert not is_alive(child)


def test_a_tokenizers_own_code_is_run_only_with_the_flag(data: DataProcess, tmp_path: Path) -> None:
    own = Path(resolve_model_path(ModelConfig.model_validate(MODEL), tmp_path))
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
    with pytest.raises(DataError, match="only with --trust-remote-code"):
        data.prepare(first)
    with (
        SignalHandler(lambda: "") as signals,
        DataProcess(tmp_path, first, {}, signals, lambda: None, trust_remote_code=True) as trusting,
    ):
        assert DataReport.model_validate_json(trusting.prepare(first)).train_rows == 22


def test_what_adapters_change_is_told_and_names_that_mean_nothing_are_refused(data: DataProcess) -> None:
    plain = config(GOOD)
    adapted = TrialConfig.model_validate(plain.model_dump() | {"lora": {"target_modules": ["q_proj"]}})
    wrong = TrialConfig.model_validate(plain.model_dump() | {"lora": {"target_modules": ["q_prj", "v_proj"]}})
    for each in (plain, adapted):
        data.prepare(each)
    assert data.notices(plain) == []
    assert data.notices(adapted) == ["lora adapts 2 layers (2 q_proj)"]
    with pytest.raises(DataError, match=r"lora\.target_modules: q_prj is not in .*; did you mean q_proj\?"):
        data.prepare(wrong)
