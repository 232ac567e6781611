"""Rows with one response and a label, before anything is trained: `plan`, `init` and `advise` by the command."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dashboards.terminal.advice_output import print_lines
from orchestrator import cli
from orchestrator.commands.rehearsal import rehearse
from orchestrator.driver.data_stage import check_data
from orchestrator.errors import DataError
from orchestrator.folders import SweepFolder
from orchestrator.spec.advice.advice_lines import AdviceLine
from orchestrator.spec.loading.loader import load_spec, load_spec_text
from tests.support.preparation import PreparedHere
from tests.support.recorders import SilentView
from trainer.config.trial import GeneratedModel
from trainer.synthetic import generate_model

pytestmark = pytest.mark.usefixtures("home")
SWEEP = """
name: s
base:
  model: {generated: {}}
  data: {train: rows.jsonl, max_length: 128, eval_share: 0.3, apply_template: true}
  loss: {kind: kto}
  training: {max_steps: 2, pairs_per_update: 4}
  evaluation: {prompts: 0}
search: {loss.beta: [0.1, 0.3]}
maximize: eval_margins/logp
"""


def rows(count: int = 40, every: int = 4, prompts: int = 20) -> list[dict[str, Any]]:
    """One of `every` rows is desirable."""
    return [
        {"prompt": f"question {n % prompts}", "completion": f"answer {n}", "label": n % every == 0}
        for n in range(count)
    ]


def written(folder: Path, given: list[dict[str, Any]], file: str = SWEEP) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    (folder / "sweep.yaml").write_text(file, encoding="utf-8")
    return folder / "sweep.yaml"


def refused(file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["plan", str(file)]) == 2
    return capsys.readouterr().err


def test_a_plan_of_labelled_rows_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(written(tmp_path, rows())), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 2


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(count)]


PAIRS = SWEEP.replace("kto", "dpo")


def test_plan_counts_the_pairs_of_a_small_file_as_the_sweep_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*pairs(31), pairs(1)[0]]  # two rows of one prompt stay together
    file = written(tmp_path, given, PAIRS)
    assert cli.main(["data", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert cli.main(["plan", str(file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["train_pairs"], plan["eval_pairs"]) == (report["train_rows"], report["eval_rows"])


@pytest.mark.parametrize("command", ["plan", "data", "advise"])
def test_rows_that_a_sweep_would_refuse_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "has no column 'chosen' for chosen": [{"prompt": row["prompt"], "good": "a", "bad": "b"} for row in pairs(20)],
        "4 of 20 rows are bad": [*pairs(16), *({**row, "chosen": ""} for row in pairs(4))],
        "fewer than one update of pairs_per_update 4": pairs(4),
        "no training pairs" if command != "data" else "no row is left": [],
    }
    for problem, given in cases.items():
        assert cli.main([command, str(written(tmp_path, given, PAIRS))]) == 2, problem
        assert problem in capsys.readouterr().err


def test_doctor_counts_the_pairs_or_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def checked(given: list[dict[str, Any]]) -> dict[str, str]:
        cli.main(["doctor", str(written(tmp_path, given, PAIRS)), "--json"])
        found = json.loads(capsys.readouterr().out)
        return next(check for check in found["checks"] if check["what"] == "data")

    good = checked(pairs(20))
    assert (good["level"], good["found"]) == ("ok", "14 training pairs and 6 held-out ones")
    bad = checked([*pairs(16), *({**row, "chosen": ""} for row in pairs(4))])
    assert bad["level"] == "fail"
    assert bad["found"].startswith("4 of 20 rows are bad (20.00%)")


def test_a_line_that_is_no_json_is_located_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, pairs(200), PAIRS)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, lines[0][:-1], ""]))
    assert cli.main(["data", str(file)]) == 0
    assert "line 201: Expecting ',' delimiter at character" in " ".join(capsys.readouterr().out.split())


def test_notices_and_advice_are_broken_between_words_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    given = [*pairs(200), {"prompt": "p", "chosen": None, "rejected": "n"}]
    assert cli.main(["data", str(written(tmp_path, given, PAIRS))]) == 0
    text = "a keeps the gap per token of the chosen response over the rejected one " * 3
    print_lines(Console(), [AdviceLine("margin", "keep", text, text)])
    said = capsys.readouterr().out
    assert "has a value that is not text" in " ".join(said.split())
    assert max(len(re.sub("\x1b\\[[0-9;]*m", "", line)) for line in said.splitlines()) <= 80


def test_all_settings_that_need_pairs_are_named_with_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = SWEEP.replace("maximize: eval_margins/logp", "maximize: eval_accuracies/logp").replace(
        "search: {", "search: {loss.kind: [kto, dpo], "
    )
    file += 'require: {eval_rewards/accuracies: ">= 0.5"}\npruner: wilcoxon\nsft: {training: {max_steps: 1}}\n'
    err = refused(written(tmp_path, rows(), file.replace("eval_rewards/accuracies", "eval_accuracies/logp")), capsys)
    for line, setting, message in (
        (9, "search.loss.kind", "dpo needs pairs"),
        (10, "maximize", "eval_accuracies/logp compares the two responses of a pair"),
        (11, "require.eval_accuracies/logp", "use eval_margins/logp"),
        (12, "pruner.kind", "use median, hyperband"),
        (13, "sft.data", "give the sft stage pairs"),
    ):
        (found,) = [each for each in err.splitlines() if f"sweep.yaml:{line}: {setting}: " in each]
        assert message in " ".join(err[err.index(found) :].split())


@pytest.mark.parametrize("case", ["one label", "one prompt", "one label held out to confirm"])
def test_rows_that_kto_cannot_be_trained_on_are_found_by_plan(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "one label":
        err = refused(written(tmp_path, rows(every=1)), capsys)
        assert "all 28 rows of one split have label true" in " ".join(err.split())
    elif case == "one prompt":
        pairs = [{"prompt": "same", "chosen": f"a {n}", "rejected": f"b {n}"} for n in range(20)]
        (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"}) + "\n")
        err = refused(written(tmp_path, pairs, SWEEP.replace("eval_share: 0.3", "eval: held.jsonl")), capsys)
        assert "20 rows of one split all have the same prompt" in " ".join(err.split())
    else:
        err = refused(written(tmp_path, rows(every=9), SWEEP + "finalists: {top: 1, seeds: 2}\n"), capsys)
        assert "rows of one split have label false" in " ".join(err.split())
    assert "sweep.yaml:5: base.data: " in err


def test_a_rehearsal_keeps_enough_rows_for_both_labels(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, rows()))
    data = rehearse(spec, tmp_path / "runs").spec.base.data
    assert (data.max_train_rows, data.max_eval_rows) == (512, 128)


def test_the_driver_refuses_metrics_of_pairs_too(tmp_path: Path) -> None:
    """As of hub data, which a plan does not read."""
    text = SWEEP.replace("eval_margins/logp", "eval_accuracies/logp")
    written(tmp_path, rows(), text)
    spec, folder = load_spec_text(text, tmp_path), SweepFolder(tmp_path / "runs", "s")
    folder.path.mkdir(parents=True)
    with pytest.raises(DataError, match="maximize: eval_accuracies/logp compares the two responses"):
        check_data(spec, folder, SilentView(), PreparedHere(folder.cache))  # pyright: ignore[reportArgumentType]


def test_init_writes_a_file_for_labelled_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    written(tmp_path, rows())
    words = ["init", "new.yaml", "--model", "some/model", "--data", "rows.jsonl", "--gpus", "0", "--objective"]
    assert cli.main([*words, "dpo"]) == 2
    assert "no file is written" in (err := " ".join(capsys.readouterr().err.split()))
    assert "use loss.kind kto" in err
    assert not Path("new.yaml").exists()
    assert cli.main([*words, "kto"]) == 0
    spec = load_spec(Path("new.yaml"))
    assert (spec.base.loss.kind, spec.goal.metric) == ("kto", "eval_margins/logp")
    weight = spec.base.loss.model_dump()["desirable_weight"]
    assert 2 < weight < 5
    assert "weigh alike in sum" in Path("new.yaml").read_text(encoding="utf-8")


LOADING = """
import sys
from orchestrator.api import load
from orchestrator.errors import SpecError
try:
    load(sys.argv[1])
except SpecError as error:
    print("apply_template: the rows are plain text" in str(error))
print("transformers" in sys.modules)
"""


@pytest.mark.parametrize("plain", [0, 1])
def test_rows_that_the_template_has_rendered_are_known_by_its_markers_without_a_tokenizer(
    plain: int, tmp_path: Path
) -> None:
    model = generate_model(GeneratedModel(), tmp_path / "cache")
    rendered = "<|user|>\nquestion {}\n<|assistant|>\n"
    prompts = [rendered.format(n) if n >= plain else f"question {n}" for n in range(8)]
    pairs = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in prompts]
    file = SWEEP.replace("{generated: {}}", str(model)).replace(", apply_template: true", "")
    file = written(tmp_path, pairs, file.replace("kto", "dpo").replace("eval_margins/logp", "eval_accuracies/logp"))
    found = subprocess.run([sys.executable, "-c", LOADING, str(file)], capture_output=True, text=True, check=True)
    assert found.stdout.split() == (["True", "True"] if plain else ["False"])
