"""Case 21: a malformed or hostile file is refused with line and key, code 2, no traceback, and nothing is written."""

from pathlib import Path

import pytest

from orchestrator import cli

GOOD = """name: s
base:
  model: {generated: {}}
  data: {train: {generated: instructions, rows: 64}}
  loss: {kind: simpo}
  training: {max_steps: 2, pairs_per_update: 8, learning_rate: 1e-6}
search: {loss.beta: [2.0, 3.0]}
maximize: eval_accuracies/logp
"""
BAD = {
    "empty": ("", "s.yaml"),
    "tabs": (GOOD.replace("  loss", "\tloss"), ":5"),
    "a key twice": (GOOD + "name: t\n", ":9"),
    "an unknown key": (GOOD.replace("kind: simpo", "kind: simpo, betta: 1"), "betta"),
    "a number of no kind": (GOOD.replace("max_steps: 2", "max_steps: .nan"), "max_steps"),
    "a word for a number": (GOOD.replace("max_steps: 2", "max_steps: no"), "max_steps"),
    "a python object": (GOOD.replace("name: s", "name: !!python/object/apply:os.system ['touch canary']"), ":1"),
    "not text": ("\x00\x01\x02", "s.yaml"),
    "not a mapping": ("- a\n- b\n", "s.yaml"),
    "cut": (GOOD[: len(GOOD) // 2] + "{", ":"),
    "a bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{k}: &{k} [{','.join([f'*{j}'] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True))
        + GOOD,
        "s.yaml",
    ),
    "deep": ("[" * 5000, "s.yaml"),
    "trust": (
        GOOD.replace("model: {generated: {}}", "model: {generated: {}, trust_remote_code: true}"),
        "trust_remote",
    ),
}


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", BAD)
def test_it_is_a_sentence_with_its_place(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, messages = BAD[name]
    file = tmp_path / "s.yaml"
    file.write_text(text)
    for command in ("plan", "sweep"):
        assert cli.main([command, str(file)]) == 2
        err = capsys.readouterr().err
        assert messages in err
        assert "Traceback" not in err
        assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"], "nothing is written"


def test_fifty_megabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(GOOD + "description: " + "x" * 50_000_000)
    assert cli.main(["plan", str(file)]) == 2
    assert "s.yaml" in capsys.readouterr().err


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(GOOD)
    assert cli.main(["plan", str(file), "--json"]) == 0
    from orchestrator.spec.loading.loader import load_spec

    assert load_spec(file).base.training.learning_rate == 1e-6
