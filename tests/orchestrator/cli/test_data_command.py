"""`orchestrate data`: what the model will see, row by row, with everything that was noticed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from tests.support.data_cases import CHATML, chat, good_rows, saved, tokenizer, write_rows

SWEEP = """
name: s
base:
  model: {{generated: {{}}, tokenizer: {tokenizer}}}
  data: {{train: {train}, eval: {eval}, max_length: 128, max_bad_share: 0.2}}
  loss: {{kind: simpo}}
  training: {{max_steps: 2, pairs_per_update: 4}}
search: {search}
maximize: eval_accuracies/logp
"""
pytestmark = pytest.mark.usefixtures("home")


def rows_with_everything() -> list[Any]:
    rows: list[Any] = [*good_rows(20)]
    rows[2] = chat("ask 2", "", "no")
    rows[4] = chat("ask 4", None, "no")
    rows[6] = chat("ask 6", "y" * 300, "no")
    rows[8] = rows[9]
    rows[11] = chat("held 1", "yes", "no")
    return rows


def sweep_file(path: Path, rows: list[Any] | None = None, search: str = "{loss.beta: [2.0, 3.0]}") -> str:
    folder = path / "tokenizer"
    saved(tokenizer(CHATML), folder)
    train = write_rows(path / "train.jsonl", rows_with_everything() if rows is None else rows)
    held_trial = write_rows(path / "held.jsonl", good_rows(4, "held"))
    file = path / "sweep.yaml"
    file.write_text(SWEEP.format(tokenizer=folder, train=train, eval=held_trial, search=search))
    return str(file)


def run(*arguments: str) -> int:
    return cli.main(["data", *arguments])


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_one_object_a_row_and_a_last_one_of_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sweep_file(tmp_path), "--json") == 0
    *rows, complete = objects(capsys.readouterr().out)
    assert [(row["split"], row["row"]) for row in rows] == [
        *(("train", n) for n in range(1, 21)),
        *(("eval", n) for n in range(1, 5)),
    ]
    first = rows[0]
    assert first["prompt"] == "<|im_start|>user\nask 0<|im_end|>\n<|im_start|>assistant\n"
    assert (first["chosen"], first["rejected"]) == ("yes 0<|im_end|>\n", "no 0<|im_end|>\n")
    made = tokenizer(CHATML)
    assert first["lengths"] == {name: len(made(first[name])["input_ids"]) for name in ("prompt", "chosen", "rejected")}
    assert first["notices"] == []
    assert first["kept"]

    found = {row["row"]: row for row in rows if row["split"] == "train" and row["notices"]}
    kinds = {number: [notice["kind"] for notice in row["notices"]] for number, row in found.items()}
    assert kinds == {
        3: ["empty_response"],
        5: ["not_text"],
        7: ["response_cut"],
        10: ["duplicate_row"],
        12: ["shared_prompt"],
    }
    left_out = found[3]
    assert not left_out["kept"]
    assert (left_out["prompt"], left_out["chosen"], left_out["lengths"]) == (None, None, None)
    assert left_out["notices"][0]["text"] == "has an empty response"
    assert not found[12]["kept"]
    assert found[7]["kept"]
    assert found[7]["lengths"]["chosen"] + found[7]["lengths"]["prompt"] == 128

    counts = {notice["kind"]: notice["count"] for notice in complete["notices"]}
    assert counts == {"empty_response": 1, "not_text": 1, "response_cut": 1, "duplicate_row": 1, "shared_prompt": 1}
    assert (complete["train_rows"], complete["eval_rows"], complete["bad_rows"], complete["dropped_rows"]) == (
        17,
        4,
        2,
        1,
    )
    assert complete["refused"] is None


def test_it_is_what_a_trial_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.spec.loading.loader import load_spec
    from trainer.data import load_tokenizer, prepare

    file = sweep_file(tmp_path)
    assert run(file, "--json") == 0
    *rows, complete = objects(capsys.readouterr().out)
    base = load_spec(Path(file)).base
    prepared, decode = prepare(base.data, base.model, tmp_path / "c"), load_tokenizer(base.model, base.data, tmp_path)
    assert prepared.report.fingerprint == complete["fingerprint"]
    for split, pairs in (("train", prepared.train), ("eval", prepared.eval)):
        shown = {row["row"]: row for row in rows if row["split"] == split and row["kept"]}
        assert sorted(shown) == sorted(map(int, pairs.rows))
        for i, number in enumerate(pairs.rows):
            pair, row = pairs.pair(i), shown[int(number)]
            assert [row[name] for name in ("prompt", "chosen", "rejected")] == [
                decode.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)
            ]


def test_rows_with_notices_come_first_and_scored_is_told_without_colour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sweep_file(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out
    heads = [line for line in shown.out.splitlines() if line.startswith("train row")]
    assert len(heads) == 3
    assert heads[0].startswith("train row 3 of ")
    assert heads[0].endswith("train.jsonl: left out")
    assert "  bad row: has an empty response [empty_response]" in shown.out
    assert "2 more kinds of notices; show more rows with --rows N" in shown.err
    assert "17 pairs to train on, 4 to evaluate on" in shown.out
    assert "2 of 24 rows are bad and left out (8.33%)" in shown.out
    assert run(sweep_file(tmp_path), "--rows", "6") == 0
    shown = capsys.readouterr()
    assert "train row 1 of" in shown.out, "then those without"
    assert "  prompt, not scored, 24 tokens:\n  │ <|im_start|>user\n  │ ask 0<|im_end|>\n" in shown.out
    assert "  chosen, scored, 7 tokens:\n  │ yes 0<|im_end|>\n" in shown.out
    assert "  rejected, scored, 6 tokens:\n  │ no 0<|im_end|>\n" in shown.out
    assert "more kind" not in shown.err


def test_scored_and_unscored_have_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(sweep_file(tmp_path), "--row", "1", "--split", "train") == 0
    out = capsys.readouterr().out
    assert "\x1b[90mask 0\x1b[0m" in out
    assert "\x1b[32myes 0\x1b[0m" in out
    assert "\x1b[31mno 0\x1b[0m" in out
    assert "\x1b[7;32m<|im_end|>\x1b[0m" in out


def test_text_of_the_data_does_not_act_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*good_rows(9), chat("bell \x07 and \x1b[31mred \u202e[bold]x[/bold]", "yes", "no")]
    assert run(sweep_file(tmp_path, rows), "--row", "10") == 0
    assert "bell \\x07 and \\x1b[31mred \\u202e[bold]x[/bold]" in capsys.readouterr().out


def test_a_split_and_a_row_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sweep_file(tmp_path), "--split", "eval", "--json") == 0
    *rows, _ = objects(capsys.readouterr().out)
    assert {row["split"] for row in rows} == {"eval"}
    assert run(sweep_file(tmp_path), "--row", "2", "--json") == 0
    *rows, _ = objects(capsys.readouterr().out)
    assert [(row["split"], row["row"]) for row in rows] == [("train", 2), ("eval", 2)]
    assert run(sweep_file(tmp_path), "--row", "9", "--split", "eval") == 2
    logged = capsys.readouterr().err
    assert "--row 9: there is no such row of eval" in logged
    assert "held.jsonl: 4 rows read" in logged


def test_rows_that_refuse_a_sweep_are_shown_and_then_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sweep_file(tmp_path), "--set", "data.max_bad_share=0.01", "--json") == 2
    shown = capsys.readouterr()
    *rows, complete = objects(shown.out)
    assert len(rows) == 24
    assert "2 of 24 rows are bad (8.33%), more than data.max_bad_share 0.01" in complete["refused"]
    assert complete["refused"] in shown.err


def test_a_trials_file_as_for_the_trainer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tokenizer(CHATML), tmp_path / "tokenizer")
    train, file = write_rows(tmp_path / "a.jsonl", good_rows(20)), tmp_path / "trial.yaml"
    file.write_text(f"model: {{generated: {{}}, tokenizer: {model.tokenizer}}}\ndata: {{train: {train}}}\n")
    file.write_text(file.read_text() + "loss: {kind: simpo}\ntraining: {max_steps: 1, pairs_per_update: 4}\n")
    assert run(str(file), "--set", "data.max_length=24", "--json", "--rows", "1") == 0
    row, complete = objects(capsys.readouterr().out)
    assert sum(row["lengths"][name] for name in ("prompt", "chosen")) <= 24
    assert complete["lengths"]["row"]["p100"] <= 24
    assert run(str(file), "--set", "data.maks_length=24") == 2
    assert "data.maks_length: there is no such key" in capsys.readouterr().err
    assert run(str(file), "--set", "data.max_length") == 2
    assert "must be PATH=VALUE" in capsys.readouterr().err


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "none.yaml")) == 2
    assert "none.yaml: there is no such file" in capsys.readouterr().err
    assert run(sweep_file(tmp_path), "--set", "data.max_lenght=3") == 2
    assert "did you mean" in capsys.readouterr().err
    assert run(sweep_file(tmp_path, [{"question": "a", "good": "b"}])) == 2
    assert "has no column" in capsys.readouterr().err


def test_what_the_search_varies_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sweep_file(tmp_path, search="{data.max_train_rows: [8, 12]}")) == 0
    assert "the search varies data.max_train_rows; base is shown" in capsys.readouterr().err


def test_no_model_is_loaded_and_a_folder_without_weights_will_do(tmp_path: Path) -> None:
    """The tokenizer's folder is the model: there is nothing in it that could be loaded as one."""
    saved(tokenizer(CHATML), tmp_path / "model")
    train, file = write_rows(tmp_path / "a.jsonl", good_rows(20)), tmp_path / "trial.yaml"
    file.write_text(f"model: {{name_or_path: {tmp_path / 'model'}}}\ndata: {{train: {train}}}\n")
    file.write_text(file.read_text() + "loss: {kind: simpo}\ntraining: {max_steps: 1, pairs_per_update: 4}\n")
    code = (
        "import sys; from orchestrator import cli; code = cli.main(['data', sys.argv[1], '--json', '--rows', '1']); "
        "assert 'trainer.models' not in sys.modules and 'ray' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
