"""Every file that `init` can write: loaded and planned, run whole in small, and sized for its model and data."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoTokenizer

from orchestrator import cli
from orchestrator.commands.init_file import DEFAULT_DATA, DEFAULT_MODEL, LOSSES
from orchestrator.commands.local_plan import plan_locally
from orchestrator.commands.request_commands import enqueue_trial
from orchestrator.commands.status import status
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.search.manual_trials import out_of_space, resolve_params
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState
from tests.support.without_ray import without_ray
from trainer.config.trial import GeneratedModel, GeneratedSource
from trainer.results import StepMetrics
from trainer.synthetic import generate_model, generate_rows

TINY = GeneratedModel(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
)
ROWS = 60
MATRIX = [
    *itertools.product(
        [name for name in LOSSES if name not in ("simper", "kto")], (False, True), (0, 2), (False, True)
    ),
    ("simper", False, 0, True),  # its file is that of the others without the settings that SimPER lacks
    ("kto", False, 0, True),  # its file is that of DPO with other values
]
"""Objective, adapters or not, GPUs, model and data local or on the hub."""


def named(case: tuple[str, bool, int, bool]) -> str:
    objective, lora, gpus, local = case
    return f"{objective}-{'lora' if lora else 'all'}-{gpus}gpus-{'local' if local else 'hub'}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder and a file of pairs."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(generate_model(TINY, root / "cache"), root / "model")
    rows = generate_rows(GeneratedSource(generated="instructions", rows=ROWS))
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)


def init(case: tuple[str, bool, int, bool], made: Path) -> SweepSpec:
    objective, lora, gpus, local = case
    where = (str(made / "model"), str(made / "pairs.jsonl")) if local else (DEFAULT_MODEL, DEFAULT_DATA)
    words = ["init", "first.yaml", "--objective", objective, "--gpus", str(gpus)]
    words += ["--model", where[0], "--data", where[1], *(["--lora"] if lora else [])]
    assert cli.main(words) == 0
    return load_spec(Path("first.yaml"))


@pytest.mark.parametrize("case", MATRIX, ids=named)
def test_it_loads_and_can_be_planned(case: tuple[str, bool, int, bool], made: Path, tmp_path: Path) -> None:
    spec = init(case, made)
    objective, lora, gpus, _ = case
    assert (spec.base.loss.kind, spec.base.lora is not None) == (objective, lora)
    training = spec.base.training
    assert training.bf16 is (gpus > 0)
    assert "base.training.gradient_checkpointing" in spec.auto
    assert not training.gradient_checkpointing
    plan = plan_locally(spec, tmp_path / "runs", ())
    assert plan.trials is not None
    assert plan.trials > 0


def check_run(name: str) -> None:
    found = status(name, Path("runs").resolve())
    assert (found["state"], {t["state"] for t in found["trials"]}) == ("finished", {"COMPLETE"})
    assert found["best"] is not None
    for words in (["report", name], ["best", name, "--json"]):
        assert cli.main(words) == 0
    assert cli.main(["suggest", name]) == (3 if name.endswith("-rehearsal") else 0)


LOCAL = [case for case in MATRIX if case[3] and case[2] == 0]
ELSEWHERE = [case for case in MATRIX if case not in LOCAL]
SMALL = ["--set=training.max_steps=2", "--set=evaluation.prompts=1"]
SOON = [("simpo", False, 0, True), ("dpo", True, 0, True), ("simpo", True, 2, False)]


def slow_but(cases: list[Any]) -> list[Any]:
    return [c if c in SOON else pytest.param(c, marks=pytest.mark.slow) for c in cases]


@pytest.mark.parametrize("case", slow_but(LOCAL), ids=named)
def test_it_runs_whole(case: tuple[str, bool, int, bool], made: Path) -> None:
    init(case, made)
    with without_ray():
        assert cli.main(["sweep", "first.yaml", *SMALL]) == 0
    check_run("first")


@pytest.mark.parametrize("case", slow_but(ELSEWHERE), ids=named)
def test_in_small_where_it_wants_a_gpu_or_the_hub(case: tuple[str, bool, int, bool], made: Path) -> None:
    init(case, made)
    with without_ray():
        assert cli.main(["sweep", "first.yaml", "--rehearse", "--set=evaluation.prompts=1"]) == 0
    check_run("first-rehearsal")


@pytest.mark.slow
def test_the_first_file_of_most_people_runs_as_they_run_it(made: Path) -> None:
    """With Ray and two workers."""
    init(("simpo", False, 0, True), made)
    assert cli.main(["sweep", "first.yaml"]) == 0
    check_run("first")


def write_pairs(path: Path, rows: int) -> Path:
    made = generate_rows(GeneratedSource(generated="instructions", rows=rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_a_tiny_model_gets_its_own_rates_lengths_and_steps(made: Path, tmp_path: Path) -> None:
    spec = init(("simpo", False, 0, True), made)
    assert "thousand parameters" in Path("first.yaml").read_text()
    assert spec.search.listed_values("training.learning_rate") == (1e-4, 3e-4, 1e-3)
    assert spec.base.data.max_length < 200, "as long as its rows"
    assert (spec.base.data.eval_share, spec.base.training.pairs_per_update) == (0.3, 8)
    assert spec.base.training.num_train_epochs == 3
    assert spec.base.evaluation.max_new_tokens < 64
    many = write_pairs(tmp_path / "many.jsonl", 8000)
    assert cli.main(["init", "many.yaml", "--model", str(made / "model"), "--data", str(many), "--gpus", "0"]) == 0
    spec = load_spec(Path("many.yaml"))
    assert (spec.base.training.pairs_per_update, spec.base.training.max_steps) == (32, 200)
    assert spec.base.data.eval_share == 0.1
    assert cli.main(["init", "gpu.yaml", "--model", str(made / "model"), "--data", str(many), "--gpus", "1"]) == 0
    spec = load_spec(Path("gpu.yaml"))
    assert (spec.base.training.max_steps, spec.base.training.num_train_epochs) == (None, 1)


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("org/any-70B", 5e-8, 2e-7),
        ("org/Thing_13b_chat", 1e-7, 5e-7),
        (DEFAULT_MODEL, 3e-7, 1e-6),
        ("org/nothing-said", 3e-7, 1e-6),
        ("org/Small-1.7B-Instruct", 5e-7, 1e-6),
        ("org/Smaller-135M", 1e-6, 1e-4),
    ],
)
def test_a_hub_model_by_its_name(name: str, lowest: float, highest: float) -> None:
    assert cli.main(["init", "--model", name, "--gpus", "8"]) == 0
    rates = load_spec(Path("sweep.yaml")).search.listed_values("training.learning_rate")
    assert (rates[0], rates[-1]) == (lowest, highest)


def test_adapters_take_ten_times_the_rates(made: Path) -> None:
    alone = init(("dpo", False, 2, False), made).search.listed_values("training.learning_rate")
    Path("first.yaml").unlink()
    adapters = init(("dpo", True, 2, False), made).search.listed_values("training.learning_rate")
    assert adapters == pytest.approx([10 * rate for rate in alone if isinstance(rate, float)])


def test_rows_longer_than_the_models_positions_are_said_to_be_cut(made: Path, tmp_path: Path) -> None:
    model = shutil.copytree(made / "model", tmp_path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    assert cli.main(["init", "--model", str(model), "--data", str(made / "pairs.jsonl"), "--gpus", "0"]) == 0
    assert load_spec(Path("sweep.yaml")).base.data.max_length == 40
    assert "the model's maximum" in Path("sweep.yaml").read_text()


def without_template(made: Path, tmp_path: Path) -> Path:
    model = shutil.copytree(made / "model", tmp_path / "bare")
    (model / "chat_template.jinja").unlink()
    return model


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "columns": ([{"question": "what", "answer": "that"}] * 9, "chosen"),
    "empty": ([], "no row is left"),
    "one prompt": ([{"prompt": "a", "chosen": f"{i}", "rejected": "c"} for i in range(9)], "The eval split is empty"),
    "bad rows": (
        [{"prompt": f"{i}", "chosen": "b" if i % 5 else "", "rejected": "c"} for i in range(60)],
        "12 rows have an empty response",
    ),
}


@pytest.mark.parametrize("where", ["a folder", "the hub"])
@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_a_sweep_refuses_are_refused_and_nothing_is_written(
    case: str, where: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, reason = REFUSED[case]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(made / "model") if where == "a folder" else "org/any-1B"
    assert cli.main(["init", "--model", model, "--data", str(bad), "--gpus", "0"]) == 2
    said = capsys.readouterr().err
    assert "no file is written, as a sweep would refuse it" in said
    assert reason in said
    assert not Path("sweep.yaml").exists()


def test_messages_for_a_tokenizer_without_a_template_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = without_template(made, tmp_path)
    assert cli.main(["init", "--model", str(model), "--data", str(made / "pairs.jsonl"), "--gpus", "0"]) == 2
    assert "has no chat template; set data.chat_template" in capsys.readouterr().err
    assert not Path("sweep.yaml").exists()


def test_a_tokenizer_of_its_own_code_is_not_run_and_its_rows_are_not_measured(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(made / "model", tmp_path / "own")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "own.py").write_text("raise SystemExit\n")
    assert cli.main(["init", "--model", str(model), "--data", str(made / "pairs.jsonl"), "--gpus", "0"]) == 0
    assert "max_length is not fitted to the rows" in capsys.readouterr().err
    assert load_spec(Path("sweep.yaml")).base.data.max_length == 512, "the model's last position"


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("lora", [False, True])
def test_a_trial_given_by_hand_has_a_value_of_the_search_for_all_that_it_leaves_out(
    objective: str, lora: bool, made: Path
) -> None:
    spec = init((objective, lora, 0, True), made)
    given = {"training.learning_rate": 0.5} if objective == "simper" else {"loss.beta": 3.0}
    assert out_of_space(spec.search, resolve_params(spec.base, spec.search, given)) == list(given)
    assert out_of_space(spec.search, resolve_params(spec.base, spec.search, {})) == []


def test_enqueue_says_which_value_of_the_base_it_takes(made: Path, tmp_path: Path) -> None:
    """Of a file that leaves a searched setting to its default."""
    init(("dpo", False, 0, True), made)
    lines = [line for line in Path("first.yaml").read_text().splitlines() if "    learning_rate:" not in line]
    folder = SweepFolder(tmp_path / "runs", "first")
    folder.path.mkdir(parents=True)
    folder.spec.write_text("\n".join(lines))
    Study.create(folder, load_spec(folder.spec)).dispose()
    (notice,) = (each for each in enqueue_trial("first", tmp_path / "runs", ["loss.beta=3"]) if "outside" in each)
    assert "loss.beta (0.01, 0.05, 0.1), training.learning_rate = 1e-06 of the base (0.0001, 0.0003, 0.001)" in notice


def test_few_rows_make_an_update(made: Path, tmp_path: Path) -> None:
    """As many pairs as an update takes are left to train on, however few rows there are."""
    for rows in (2, 3, 5):
        few = write_pairs(tmp_path / f"{rows}.jsonl", rows)
        assert cli.main(["init", f"of{rows}.yaml", "--model", str(made / "model"), "--data", str(few), "--gpus=0"]) == 0
        assert load_spec(Path(f"of{rows}.yaml")).base.training.pairs_per_update <= rows - 1


def text_rows() -> list[dict[str, str]]:
    """The rows of `made` as plain text."""
    rows = generate_rows(GeneratedSource(generated="instructions", rows=ROWS))
    return [{key: row[key][-1]["content"] for key in ("prompt", "chosen", "rejected")} for row in rows]


TEXT_FORMS: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "columns": lambda row: row,
    "system": lambda row: {"system": "Be brief.", **row},
    "hh": lambda row: {
        side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")
    },
}


def write_text_rows(path: Path, form: str) -> Path:
    path.write_text("".join(json.dumps(TEXT_FORMS[form](row)) + "\n" for row in text_rows()))
    return path


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_plain_text_rows_are_put_into_the_template_that_the_tokenizer_has(
    form: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_text_rows(tmp_path / "rows.jsonl", form)
    assert cli.main(["init", "--model", str(made / "model"), "--data", str(rows), "--gpus", "0"]) == 0
    said = capsys.readouterr().err
    assert "the template is applied (data.apply_template: true)" in said
    assert "refused" not in said
    data = load_spec(Path("sweep.yaml")).base.data
    assert data.apply_template is True
    assert data.max_length < 200, "as long as its rows"
    assert cli.main(["data", "sweep.yaml", "--rows", "1"]) == 0, "a sweep is not refused"


def test_on_a_terminal_it_asks_whether_text_is_put_into_the_template(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    rows = write_text_rows(tmp_path / "rows.jsonl", "columns")
    words = ["--model", str(made / "model"), "--data", str(rows), "--gpus", "0", "--objective", "dpo"]
    with patch("click.confirm", return_value=False) as asked:
        assert cli.main(["init", *words]) == 0
    asked.assert_called_once()
    assert load_spec(Path("sweep.yaml")).base.data.apply_template is False
    assert cli.main(["data", "sweep.yaml", "--rows", "1"]) == 0, "a sweep is not refused"


def test_text_for_a_tokenizer_without_a_template_asks_nothing(made: Path, tmp_path: Path) -> None:
    rows = write_text_rows(tmp_path / "rows.jsonl", "columns")
    model = without_template(made, tmp_path)
    assert cli.main(["init", "--model", str(model), "--data", str(rows), "--gpus", "0"]) == 0
    assert "apply_template" not in Path("sweep.yaml").read_text()
    assert cli.main(["data", "sweep.yaml", "--rows", "1"]) == 0, "a sweep is not refused"


@pytest.mark.parametrize(
    ("form", "apply"),
    [
        ("<s>[INST] {} [/INST]", False),
        ("A chat. USER: {} ASSISTANT:", False),
        ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", False),
        ("its own", None),
    ],
)
def test_text_that_a_template_has_rendered_is_not_put_into_one(
    form: str, apply: bool | None, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another template's text is taken as it stands; of this tokenizer's own there is nothing to decide."""
    rows = tmp_path / "rows.jsonl"
    if form == "its own":
        asked = [{"role": "user", "content": "{}"}]
        tokenizer = AutoTokenizer.from_pretrained(made / "model")
        form = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    rendered = [{**row, "prompt": form.format(row["prompt"])} for row in text_rows()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in rendered))
    assert cli.main(["init", "--model", str(made / "model"), "--data", str(rows), "--gpus", "0"]) == 0
    assert load_spec(Path("sweep.yaml")).base.data.apply_template is apply
    said = capsys.readouterr().err
    assert ("they are used as they are (data.apply_template: false)" in said) is (apply is False)
    assert cli.main(["data", "sweep.yaml", "--rows", "1"]) == 0, "a sweep is not refused"


def test_text_for_a_tokenizer_on_the_hub_asks_its_question(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_text_rows(tmp_path / "rows.jsonl", "columns")
    assert cli.main(["init", "text.yaml", "--model", "org/any-1B", "--data", str(rows), "--gpus", "1"]) == 0
    assert "the rows are plain text: if the tokenizer has a chat template" in capsys.readouterr().err
    words = ["--model", "org/any-1B", "--data", str(made / "pairs.jsonl"), "--gpus", "1"]
    assert cli.main(["init", "messages.yaml", *words]) == 0
    assert "plain text" not in capsys.readouterr().err


OUTSIDE = """
name: first
base:
  model: {model}
  data: {{train: {rows}, max_length: 256}}
  training: {{pairs_per_update: 4, max_steps: 2}}
search:
  loss.beta: [2.0, 2.5]
  loss.gamma_beta_ratio: [0.3, 0.5]
  training.learning_rate: [3e-7, 5e-7]
enqueue:
  - {{loss.beta: 3.0, training.weight_decay: 0.1}}
sampler: staged
maximize: eval_accuracies/logp
require: off      # the scripted trials report the objective alone
"""


def test_pages_take_a_winner_outside_of_the_search(made: Path) -> None:
    """A staged search from the margin's default, 0.25, and a manual trial that is the best and that it returns to."""

    def valued(study: Study, *_: Any, **__: Any) -> StopReason:
        while isinstance(trial := study.ask(), Trial):
            value = 0.9 if trial.number == 0 else 0.5 + 0.01 * trial.number
            study.report(trial, [StepMetrics(1, {"eval_accuracies/logp": value})])
            study.tell(trial, Outcome(TrialState.COMPLETE))
        return StopReason(StopKind.FINISHED)

    Path("first.yaml").write_text(OUTSIDE.format(model=made / "model", rows=made / "pairs.jsonl"))
    with without_ray(run_trials=valued):
        assert cli.main(["sweep", "first.yaml"]) == 0
    check_run("first")
    found = status("first", Path("runs").resolve())
    assert found["best"] == 0
    assert {t["params"]["loss.gamma_beta_ratio"] for t in found["trials"]} == {0.25, 0.3, 0.5}
    assert [t["params"].get("training.weight_decay") for t in found["trials"]].count(0.1) > 2


@pytest.mark.parametrize("section", ["base", "sft"])
def test_plain_text_without_a_decision_is_refused_before_a_sweep_starts(
    section: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the first rows: what `sweep` would say after its start, each command that reads the file says at once."""
    plain = write_text_rows(tmp_path / "plain.jsonl", "columns")
    given = json.dumps({"train": str(plain), "max_length": 128})
    decided = json.dumps({"train": str(plain), "max_length": 128, "apply_template": True})
    sft = f"\nsft:\n  data: {given}\n  training: {{pairs_per_update: 8}}\n"
    base, stage = (given, "") if section == "base" else (decided, sft)
    file = Path("mine.yaml")
    file.write_text(
        f"name: mine\nbase:\n  model: {made / 'model'}\n  data: {base}\n  training: {{pairs_per_update: 8}}\n{stage}"
    )
    line, option = (4, "data") if section == "base" else (8, "sft.data")
    for command in ("plan", "sweep", "doctor"):
        assert cli.main([command, str(file)]) == 2
        said = capsys.readouterr().err
        assert f"mine.yaml:{line}: {section}.data.apply_template: the rows are plain text, and the tokenizer" in said
        assert "set data.apply_template: true" in said
    assert not Path("runs").exists()
    for decision in ("true", "false"):
        assert cli.main(["plan", str(file), "--set", f"{option}.apply_template={decision}"]) == 0
    write_text_rows(plain, "system")
    assert cli.main(["plan", str(file), "--set", f"{option}.apply_template=false"]) == 2, "only a template renders it"
    assert "are plain text with a system text or tools" in capsys.readouterr().err
    write_text_rows(plain, "columns")
    bare = ["--set", f"model={without_template(made, tmp_path)}", "--set", "data.apply_template=null"]
    assert cli.main(["plan", str(file), *bare]) == 0, "there is nothing to decide"
    rendered = [{**row, "prompt": f"<|im_start|>{row['prompt']}"} for row in text_rows()]
    plain.write_text("no JSON\n" + "".join(json.dumps(row) + "\n" for row in rendered))
    assert cli.main(["plan", str(file)]) == 2, "rendered by another template"
