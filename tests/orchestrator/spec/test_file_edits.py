"""Values set in the text of a sweep file: the value alone changes, whatever form the file has."""

import pytest
import yaml

from orchestrator.spec.loading.file_edits import CannotEdit, ValueEdit, edit_yaml

BETA = ("search", "loss.beta")
RATE = ("base", "training", "learning_rate")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("search:\n  loss.beta: [1, 2]   # mine\n  b: 1\n", "search:\n  loss.beta: [9]   # mine\n  b: 1\n"),
        ("search: {a: 1, loss.beta: [1,\n  2], b: 3}\n", "search: {a: 1, loss.beta: [9], b: 3}\n"),
        (
            "search:\n  loss.beta:\n    - 1\n    - 2\n\n  # next\n  b: 1\n",
            "search:\n  loss.beta: [9]\n\n  # next\n  b: 1\n",
        ),
        ("search:\n  loss.beta:\n  - 1\n  - 2\n", "search:\n  loss.beta: [9]\n"),
        ("search:\n  loss.beta: {log_uniform: [1, 2]}\n", "search:\n  loss.beta: {log_uniform: [9]}\n"),
        (
            "search:\n  loss.beta:\n    choice:\n      - 1\n    when: {c: d}\n",
            "search:\n  loss.beta:\n    choice: [9]\n    when: {c: d}\n",
        ),
        ("x-b: &b [1]\nsearch:\n  loss.beta: *b\n", "x-b: &b [1]\nsearch:\n  loss.beta: [9]\n"),
        ("search:\r\n  loss.beta: [1] # é\r\n", "search:\r\n  loss.beta: [9] # é\r\n"),
        ("search:\n  'loss.beta': [1]", "search:\n  'loss.beta': [9]"),
        ("search:\n  loss.beta:\n  b: 1\n", "search:\n  loss.beta: [9]\n  b: 1\n"),
    ],
)
def test_the_value_alone_changes(before: str, after: str) -> None:
    assert edit_yaml(before, ValueEdit(BETA, "[9]")) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "base:\n  training:\n    seed: 1  # x\n  lora: {}\n",
            "base:\n  training:\n    seed: 1  # x\n    learning_rate: 9\n  lora: {}\n",
        ),
        ("base:\n  training: {seed: 1}\n", "base:\n  training: {seed: 1, learning_rate: 9}\n"),
        ("base:\n  training: {}\n", "base:\n  training: {learning_rate: 9}\n"),
        ("base:\n  lora: {}", "base:\n  lora: {}\n  training: {learning_rate: 9}\n"),
        (
            "t: &t {learning_rate: 1}\nbase:\n  training:\n    <<: *t\n",
            "t: &t {learning_rate: 1}\nbase:\n  training:\n    <<: *t\n    learning_rate: 9\n",
        ),
    ],
)
def test_a_missing_key_is_added_at_the_end_of_its_section(before: str, after: str) -> None:
    assert edit_yaml(before, ValueEdit(RATE, "9")) == after
    assert yaml.safe_load(after)["base"]["training"]["learning_rate"] == 9


def test_the_reason_stands_above_and_replaces_that_of_an_earlier_edit() -> None:
    text = "search:\n  # mine\n  loss.beta: [1]\n"
    once = edit_yaml(text, ValueEdit(BETA, "[2]", "long " * 30))
    assert once.count("  # advise: long") == 2
    again = edit_yaml(once, ValueEdit(BETA, "[3]", "short"))
    assert again == "search:\n  # mine\n  # advise: short\n  loss.beta: [3]\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("search:\n  loss.beta: &b [1]\n  loss.gamma: *b\n", "has an anchor"),
        ("base: {}\nx: &x {loss.beta: [1]}\nsearch: *x\n", "is an alias"),
        ("search: &s\n  loss.beta: [1]\n", "has an anchor"),
        ("search:\n  loss.beta:\n    - 1  # the first\n    - 2\n", "comments between"),
        ("search:\n  loss.beta: # of two\n    - 1\n", "comment between the key"),
        ("search: [1]\n", "is no mapping"),
        ("search:\n  loss.beta: {other: 1}\n", "has a mapping"),
    ],
)
def test_what_would_change_more_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CannotEdit, match=reason):
        edit_yaml(text, ValueEdit(BETA, "[9]"))
