"""Public data sets in their published columns: trained on rightly, or answered with a program that makes pairs."""

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

import sweeps
from tests.support.data_cases import CHATML, good_rows, saved, tokenizer, write_rows
from tests.support.public_sets import PUBLIC_SETS, TEMPLATE, PublicSet
from trainer.config.trial import DataConfig, ModelConfig
from trainer.data import BadData, UnreadableData
from trainer.data.row_preview import Preview, PreviewRow, preview

DOC = Path(__file__).parents[3] / "docs" / "data.md"
Make = Callable[..., Preview]


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return saved(tokenizer(CHATML), tmp_path / "tokenizer")


@pytest.fixture
def make(tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Preview rows as training data; `settings` are those of data, `columns` those of the source."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    held_trial = write_rows(tmp_path / "held.jsonl", good_rows(3, "held"))

    def made(path: str, columns: Any = (), **settings: Any) -> Preview:
        given = {
            "train": [{"path": path, "columns": dict(columns)}],
            "eval": held_trial,
            "max_length": 512,
            "max_bad_share": 1,
        }
        return preview(DataConfig.model_validate(given | settings), model, tmp_path / "cache")

    return made


def as_pairs(made: Make, one: PublicSet, place: Path, result: str = "jsonl") -> Preview:
    """What becomes of a set: as it is, or after the program in the refusal has run."""
    path = written(one.rows, place / f"rows.{result}")
    if one.converted is None:
        return made(path, one.columns, **one.settings)
    with pytest.raises(UnreadableData) as refused:
        made(path, one.columns, **one.settings)
    run_program(str(refused.value), place)
    return made(str(place / "pairs.jsonl"), **one.settings)


def written(rows: list[dict[str, Any]], path: Path) -> str:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        return str(path)
    return write_rows(path, rows)


def run_program(message: str, path: Path) -> None:
    with contextlib.chdir(path):
        exec(message.split("\n\n", 1)[1], {})


def trained(made: Preview) -> list[PreviewRow]:
    return [row for row in made.rows if row.split == "train"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("one", PUBLIC_SETS, ids=lambda one: one.name)
def test_what_becomes_of_a_public_set(one: PublicSet, ending: str, make: Make, tmp_path: Path) -> None:
    assert len(one.rows) == 4
    rows = trained(as_pairs(make, one, tmp_path, ending))
    count = 4 if one.converted is None else one.converted
    assert [row.row for row in rows] == list(range(1, count + 1))
    assert {row.row for row in rows if not row.kept} == one.left_out
    assert {row.row: {notice.kind for notice in row.notices} for row in rows if row.notices} == one.kinds
    for row in rows:
        if row.kept:
            assert row.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
            assert row.chosen.endswith("<|im_end|>\n")
            assert row.rejected.endswith("<|im_end|>\n")
            assert "Human:" not in row.prompt + row.chosen + row.rejected
            assert "extra_id" not in row.prompt


def test_turns_of_the_longer_ones_are_messages(make: Make, tmp_path: Path) -> None:
    by_name = {one.name: one for one in PUBLIC_SETS}
    second = {
        "Anthropic/hh-rlhf": (["user", "assistant", "user"], "The Danube.", "The Alps."),
        "argilla/distilabel-capybara-dpo-7k-binarized": (["user", "assistant", "user"], "Lake Victoria.", "A pond."),
        "berkeley-nest/Nectar": (["user", "assistant", "user"], "Tango.", "A chair."),
        "nvidia/HelpSteer2 (preference)": (["user", "assistant", "user"], "Drops.", "Stones."),
        "nvidia/HelpSteer3 (preference)": (["user", "assistant", "user"], "x = 1", "x == = 1"),
        "PKU-Alignment/PKU-SafeRLHF": (["user"], "With soap and a sponge.", "Lick it."),
        "stanfordnlp/SHP": (["user"], "Yes, it may split.", "Never."),
        "Intel/orca_dpo_pairs": (["user"], "5", "23"),
    }
    for name, (roles, chosen, rejected) in second.items():
        path = tmp_path / re.sub(r"\W", "", name)
        path.mkdir()
        row = trained(as_pairs(make, by_name[name], path))[1]
        assert row.prompt is not None
        assert re.findall(r"<\|im_start\|>(\w+)", row.prompt) == [*roles, "assistant"], name
        assert (row.chosen, row.rejected) == (f"{chosen}<|im_end|>\n", f"{rejected}<|im_end|>\n"), name


@pytest.mark.parametrize("one", [one for one in PUBLIC_SETS if one.converted], ids=lambda one: one.name)
def test_rows_without_a_preference_are_counted_by_the_program(
    one: PublicSet, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnreadableData) as refused:
        make(written(one.rows, tmp_path / "rows.jsonl"))
    messages = str(refused.value)
    assert one.name.partition("/")[2].split("-")[0].split(" ")[0] in messages
    run_program(messages, tmp_path)
    assert f"{one.converted} pairs, {4 - (one.converted or 0)} rows without" in capsys.readouterr().out


def test_plain_text_asks_whether_the_template_is_meant(make: Make, tmp_path: Path) -> None:
    for one in PUBLIC_SETS:
        if one.settings == TEMPLATE and one.converted is None:
            made = make(written(one.rows, tmp_path / "rows.jsonl"), one.columns)
            assert isinstance(made.refused, BadData), one.name
            assert "data.apply_template: true" in str(made.refused), one.name


def test_every_set_named_in_a_sweep_has_its_rows_here() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in Path(sweeps.__file__).parent.glob("*.yaml"))
    named = set(re.findall(r"dataset: ([\w./-]+)", text))
    assert named
    assert named <= {one.name for one in PUBLIC_SETS}


def test_a_few_unusual_rows_do_not_refuse_a_large_set(make: Make, tmp_path: Path) -> None:
    """Four hundred rows, of which two are bad: 0.5 %."""
    one = PUBLIC_SETS[0]
    rows = json.loads(json.dumps(one.rows))
    for number in range(396):
        ask, sides = f"Name colour number {number}.", {"chosen": "Violet.", "rejected": "Brown."}
        inputs = {k: [{"role": "user", "content": ask}, {"role": "assistant", "content": v}] for k, v in sides.items()}
        rows.append({**one.rows[0], "prompt": ask, **inputs, "messages": inputs["chosen"]})
    made = make(write_rows(tmp_path / "rows.jsonl", rows), max_bad_share=0.01)
    assert made.refused is None
    assert (made.report.train_rows, made.report.bad_rows) == (398, 2)


HEAD = ("data set", "settings", "what is made of it", "its first row, rendered with ChatML")


def example(row: PreviewRow) -> str:
    return " ".join(f"{name} {code(json.dumps(getattr(row, name)))}" for name in ("prompt", "chosen", "rejected"))


def code(text: str) -> str:
    """Code in a cell of a Markdown table."""
    return "`" + text.replace("|", "\\|") + "`"


def settings_of(one: PublicSet) -> str:
    listed = [f"{key}: {json.dumps(value)}" for key, value in one.settings.items()]
    if one.columns:
        listed.append(f"columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in one.columns.items())}}}")
    return ", ".join(code(text) for text in listed)


def test_the_table_in_the_docs_is_what_happens(make: Make, tmp_path: Path) -> None:
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|---|---|"]
    for i, one in enumerate(PUBLIC_SETS):
        path = tmp_path / str(i)
        path.mkdir()
        row = trained(as_pairs(make, one, path))[0]
        lines.append(f"| {one.name} | {settings_of(one)} | {one.said} | {example(row)} |")
    text = DOC.read_text(encoding="utf-8")
    begin, end = "<!-- public sets: begin -->\n", "<!-- public sets: end -->"
    head, _, rest = text.partition(begin)
    table, _, tail = rest.partition(end)
    made = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        DOC.write_text(head + begin + made + end + tail, encoding="utf-8")
        return
    assert table == made, "docs/data.md differs; if that is meant, UPDATE_GOLDEN=1"


def test_the_settings_in_the_docs_are_valid() -> None:
    cells = re.findall(r"^\| [\w./() -]+ \| (`.*?)\| ", DOC.read_text(encoding="utf-8"), flags=re.M)
    assert cells
    for cell in cells:
        for text in re.findall(r"`(.*?)`", cell):
            (key, value), *_ = yaml.safe_load(text).items()
            if key == "columns":
                DataConfig.model_validate({"train": [{"path": "a.jsonl", "columns": value}]})
            else:
                DataConfig.model_validate({"train": ["a.jsonl"], key: value})


def test_the_program_in_the_docs_is_the_one_in_the_refusal(make: Make, tmp_path: Path) -> None:
    helpsteer = next(one for one in PUBLIC_SETS if one.name.startswith("nvidia/HelpSteer2"))
    with contextlib.chdir(tmp_path), pytest.raises(UnreadableData) as refused:
        make(written(helpsteer.rows, Path("helpsteer2.jsonl")))
    program = str(refused.value).split("\n\n", 1)[1]
    assert f"```python\n{program}```\n" in DOC.read_text(encoding="utf-8")
