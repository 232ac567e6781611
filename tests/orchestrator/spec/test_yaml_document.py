"""YAML 1.2 scalars, and everything a file may try."""

from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.loading.validation_errors import parse_document, read_document
from trainer.config.yaml_files import MAX_BYTES


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-7", 6e-7),
        ("1e-6", 1e-6),
        ("1E3", 1000.0),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("012", 12),
        ("0o17", 15),
        ("0xff", 255),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"),
        ("12:30:45", "12:30:45"),
        ("'6e-7'", "6e-7"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("9" * 65, "9" * 65),
        ("[1, 2.5]", (1, 2.5)),
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_document(f"a: {text}", "f").value["a"]
    assert read == value
    assert type(read) is type(value)


CORPUS = {
    "a tab": ("a:\n\tb: 1\n", "f:2: a tab"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", "f:3: a: given twice (first at f:1)"),
    "a key twice, deep": ("a:\n  b: 1\n  b: 2\n", "f:3: a.b: given twice"),
    "not a number": ("a:\n  b: .nan\n", "f:2: a.b: .nan is not a finite number"),
    "infinity": ("a: -.inf\n", "f:1: a: -.inf is not a finite number"),
    "overflow": ("a: 1e999\n", "f:1: a: 1e999 is beyond"),
    "empty": ("", "f:1: the file is empty"),
    "only a comment": ("# nothing\n", "f:1: the file is empty"),
    "two documents": ("a: 1\n---\nb: 2\n", "f:2: expected a single document"),
    "python object": ("a: !!python/object/apply:os.system [touch x]\n", "has no meaning here"),
    "python name": ("a: !!python/name:os.system\n", "has no meaning here"),
    "own tag": ("a: !secret x\n", "f:1: a: the tag !secret has no meaning here"),
    "tagged mapping": ("a: !thing {b: 1}\n", "f:1: a: the tag !thing has no meaning here"),
    "merge key": ("a: &x {b: 1}\nc:\n  <<: *x\n", "f:3: c: the merge key"),
    "loop": ("a: &x [*x]\n", "aliases expand without end"),
    "bomb": (
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "too many values",
    ),
    "unknown alias": ("a: *x\n", "undefined alias"),
    "deep": ("[" * 5000, "nested deeper"),
    "long": (f"a: [{'1,' * 30_000}]", "more than 20000 values"),
    "list as key": ("? [a]\n: 1\n", "f:1: a key must be a word"),
    "unclosed": ("a: [1, 2\n", "f:2: "),
    "control character": ("a: 1\nb: \x01\n", "f:2: a control character"),
    "reserved": ("a: @x\n", "f:1: "),
}


@pytest.mark.parametrize("name", CORPUS)
def test_what_cannot_be_meant_is_refused_with_its_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, messages = CORPUS[name]
    with pytest.raises(SpecError) as caught:
        parse_document(text, "f")
    assert messages in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_all_findings_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_document("a: .nan\nb: 1\nb: 2\nc: !x 1\n", "f")
    assert [finding.where for finding in caught.value.problems] == ["f:1", "f:3", "f:4"]


def test_an_alias_is_its_value() -> None:
    assert parse_document("a: &x {b: [1, 2]}\nc: *x\n", "f").value["c"] == {"b": (1, 2)}


def test_files(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    cases = {
        "quikstart.yaml": "there is no such file (did you mean",
        ".": "is not a file",
        "large.yaml": "larger than",
        "latin.yaml": "latin.yaml:2: not UTF-8",
    }
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    for name, messages in cases.items():
        with pytest.raises(SpecError) as caught:
            read_document(tmp_path / name)
        assert messages in str(caught.value)
    (tmp_path / "mark.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_document(tmp_path / "mark.yaml").value == {"a": 1}


def test_places() -> None:
    document = parse_document("a:\n  b:\n    - 1\n    - 2\nc: {d: 1}\n", "f")
    paths = {("a",): "f:1", ("a", "b"): "f:2", ("a", "b", 1): "f:4", ("c", "d"): "f:5", ("a", "b", 1, "x"): "f:4"}
    assert {loc: document.location(loc) for loc in paths} == paths
