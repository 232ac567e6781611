"""`clean`: what a sweep may need again stays, and the rest is removed by age and size, on demand only."""

import json
import os
import time
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.commands.runs_folder.queue_records import queue_url
from orchestrator.driver.sft_stage import sft_config
from orchestrator.folders import DATA_FILE
from orchestrator.service.sweep_queue import SweepQueue
from orchestrator.spec.sweep_spec import SweepSpec
from tests.support.local_driver import KILLED, killed_at
from tests.support.processes import call, called
from tests.support.scripted_sweep import Script, make_spec, run_sweep

RATES = {"training.learning_rate": {"choice": [3e-7, 1e-6]}}
DAY = 86400


def entry(home: Path, name: str, days: float, size: int = 100_000) -> Path:
    path = home / "cache" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"c" * size)
    used = time.time() - days * DAY
    os.utime(path, (used, used))
    for folder in path.relative_to(home / "cache").parents[:-2]:
        os.utime(home / "cache" / folder, (used, used))
    return path


def sft_run(home: Path, key: str, spec: SweepSpec) -> Path:
    config = sft_config(spec)
    assert config is not None
    path = entry(home, f"sft/{key}/run/trial.json", 90)
    path.write_text(config.model_dump_json(), encoding="utf-8")
    for each in (path, path.parent, path.parent.parent):
        os.utime(each, (1e9, 1e9))
    return path


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, list[str]]:
    assert main(["clean", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    return {
        group: sorted("/".join(Path(e["path"]).parts[-2:]) for e in found[group])
        for group in ("unneeded", "recent", "needed")
    }


def test_only_old_entries_that_no_sweep_needs_are_removed_and_only_with_yes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sweep(home, make_spec("ended", RATES), lambda _: Script(files=False))
    old, new = entry(home, "reference/old.safetensors", 90), entry(home, "reference/new.safetensors", 3)
    older = entry(home, "answers/older.jsonl", 120)
    unknown = entry(home, "unknown/file", 900)
    assert planned(capsys) == {
        "unneeded": ["answers/older.jsonl", "reference/old.safetensors"],
        "recent": ["reference/new.safetensors"],
        "needed": [],
    }
    assert main(["clean"]) == 0
    said = capsys.readouterr().out
    assert "2 entries, " in said
    assert "would be freed; `orchestrate clean --yes` removes them" in said
    assert "\n cache/answers/older.jsonl" in said
    assert main(["clean", "--older-than", "1", "--max-size", "0.0001"]) == 0
    assert "`orchestrate clean --older-than 1 --max-size 0.0001 --yes` removes them" in capsys.readouterr().out
    assert main(["clean", "--older-than", "1000"]) == 0
    said = capsys.readouterr().out
    assert "nothing to remove" in said
    assert "--yes" not in said
    assert planned(capsys, "--max-size", "0.00025")["unneeded"] == ["answers/older.jsonl"]
    assert planned(capsys, "--older-than", "1")["recent"] == []
    assert all(path.exists() for path in (old, new, older))
    assert main(["clean", "--yes"]) == 0
    assert [path.exists() for path in (old, new, older, unknown)] == [False, True, False, True]
    assert main(["clean", "--older-than", "-1"]) == 2


def test_what_a_sweep_that_can_be_resumed_needs_stays(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_sweep(home, make_spec("begun", RATES), lambda _: Script(files=False), trials=1)
    for name in ("data/used/x", "data/other/x", "reference/a.json", "models/tiny/x", "answers/a.jsonl"):
        entry(home, name, 90)
    assert planned(capsys)["needed"] == ["data/other", "data/used", "models/tiny", "reference/a.json"]  # no report yet
    report = json.loads((Path(__file__).parents[2] / "golden/old_sweep/finished/data.json").read_text(encoding="utf-8"))
    (folder.path / DATA_FILE).write_text(json.dumps(report | {"fingerprint": "used"}), encoding="utf-8")
    assert planned(capsys) == {
        "unneeded": ["answers/a.jsonl", "data/other"],
        "recent": [],
        "needed": ["data/used", "models/tiny", "reference/a.json"],
    }
    assert main(["clean"]) == 0
    assert "stay as begun (interrupted) may need them: 3 of data, models, reference" in capsys.readouterr().out
    (folder.spec).write_text("{", encoding="utf-8")
    assert planned(capsys)["unneeded"] == []
    assert main(["delete", "begun", "--yes"]) == 0
    capsys.readouterr()
    assert len(planned(capsys)["unneeded"]) == 5


def test_an_sft_model_stays_as_long_as_its_sweep_is_there_or_archived(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec("a", RATES, sft={"training": {"max_steps": 3, "pairs_per_update": 4}})
    other = make_spec("b", RATES, sft={"training": {"max_steps": 7, "pairs_per_update": 4}})
    run_sweep(home, spec, lambda _: Script(files=False))
    sft_run(home, "own", spec)
    sft_run(home, "others", other)
    assert planned(capsys) == {"unneeded": ["sft/others"], "recent": [], "needed": ["sft/own"]}
    assert main(["archive", "a", "--to", f"file://{tmp_path}/far"]) == 0
    capsys.readouterr()
    assert planned(capsys)["needed"] == ["sft/own"]
    assert main(["unarchive", "a"]) == 0
    assert main(["delete", "a", "--yes"]) == 0
    capsys.readouterr()
    assert planned(capsys)["unneeded"] == ["sft/others", "sft/own"]


def upload(home: Path, digest: str, days: float) -> Path:
    """A file that ann has sent, last used so long ago."""
    path = home / "service" / "files" / "ann" / (digest * 64) / "rows.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    return aged(path, days)


def aged(path: Path, days: float) -> Path:
    used = time.time() - days * DAY
    for each in (path, path.parent, path.parent.parent):
        os.utime(each, (used, used))
    return path


def test_uploads_stay_as_long_as_a_sweeps_file_names_them(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, queued, archived, old, new = (
        upload(home, digest, days) for digest, days in zip("abcde", (90,) * 4 + (3,), strict=True)
    )
    (half := old.parent.parent / ("f" * 64)).mkdir()
    (half / ".rows.jsonl.part").write_text("{")
    aged(half / ".rows.jsonl.part", 90)
    for name, file in (("here", here), ("archived", archived)):
        folder = run_sweep(home, make_spec(name, RATES), lambda _: Script(files=False))
        folder.spec.write_text(folder.spec.read_text() + f"# data: {file}\n")
    assert main(["archive", "archived", "--to", f"file://{tmp_path}/far"]) == 0
    queue = SweepQueue(queue_url(home))
    queue.submit("waits", f"data: {queued}", home / "waits", owner="ann")
    capsys.readouterr()
    assert planned(capsys) == {
        "unneeded": [f"ann/{'d' * 64}", f"ann/{'f' * 64}"],
        "recent": [f"ann/{'e' * 64}"],
        "needed": [f"ann/{digest * 64}" for digest in "abc"],
    }
    assert main(["clean"]) == 0
    assert "stay as waits (in the queue) may need them: 1 of upload" in capsys.readouterr().out
    assert planned(capsys, "--max-size", "1")["unneeded"] == []
    assert main(["clean", "--yes"]) == 0
    assert [path.exists() for path in (here, queued, archived, old, half, new)] == [True] * 3 + [False] * 2 + [True]
    queue.withdraw("waits", "not now")
    capsys.readouterr()
    assert f"ann/{'b' * 64}" in planned(capsys)["needed"], "it can be resumed"
    queue.forget("waits")
    queue.close()
    assert planned(capsys)["unneeded"] == [f"ann/{'b' * 64}"]
    (home / "service" / "queue.db").write_text("damaged")
    assert planned(capsys)["unneeded"] == [], "nothing is removed while a sweep may be unknown"


def test_a_models_files_are_removed_with_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, model = upload(home, "a", 90), home / "service" / "files" / "ann" / ("b" * 64) / "mine"
    model.mkdir(parents=True)
    os.link(weights, model / "model.safetensors")
    aged(model, 3)
    folder = run_sweep(home, make_spec("here", RATES), lambda _: Script(files=False))
    text = folder.spec.read_text()
    folder.spec.write_text(f"{text}# model: {model}\n")
    both = [f"ann/{'a' * 64}", f"ann/{'b' * 64}"]
    assert planned(capsys)["needed"] == both
    folder.spec.write_text(text)
    assert planned(capsys)["recent"] == both, "the model was used lately"
    assert planned(capsys, "--older-than", "2")["unneeded"] == both


def test_a_cleaning_that_was_killed_leaves_no_half_entry_and_the_next_one_ends_it(home: Path) -> None:
    for name in ("data/a/x", "data/b/x"):
        entry(home, name, 90)
    assert killed_at(lambda: call(home, "clean", "--yes"), "clean.renamed") == KILLED
    assert len([path for path in (home / "cache" / "data").iterdir() if path.name.startswith(".removed-")]) == 1
    called(home, "clean", "--yes", "--older-than", "1000")
    assert len(list((home / "cache" / "data").iterdir())) == 1
