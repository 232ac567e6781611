"""The generated task: right answers are right, wrong ones wrong, splits apart, length no hint."""

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from trainer.config.trial import GeneratedSource
from trainer.synthetic import generate_rows, is_correct
from trainer.synthetic.instructions import KINDS, NUMBERS, WORDS, is_held_out


def _rows(**given: Any) -> list[dict[str, Any]]:
    return generate_rows(GeneratedSource.model_validate({"generated": "instructions"} | given))


def _ask(row: dict[str, Any]) -> str:
    return row["prompt"][0]["content"]


def _solve(ask: str) -> str:
    """The right answer, worked out anew from the words of the instruction."""
    number = {word: i for i, word in enumerate(NUMBERS)}
    words = ask.lower().replace(":", " :").replace(",", "").rstrip(".?").split()
    listed = words[words.index(":") + 1 :] if ":" in words else []
    if ask.startswith("You have"):
        a, b = (number[w.rstrip(".")] for w in words if w.rstrip(".") in number)
        return NUMBERS[a + b if "get" in words else a - b]
    for sign, factor in (("plus", 1), ("minus", -1)):
        if sign in words:
            at = words.index(sign)
            return NUMBERS[number[words[at - 1]] + factor * number[words[at + 1].rstrip(".")]]
    if "number" in words:
        return (max if "largest" in words else min)(listed, key=number.__getitem__)
    if "belong" in words or "odd" in words:
        kinds = {w: kind for kind, some in KINDS.items() for w in some}
        counts = Counter(kinds[w] for w in listed)
        return next(w for w in listed if counts[kinds[w]] == 1)
    if "longest" in words or "shortest" in words:
        return (max if "longest" in words else min)(listed, key=len)
    for i, ordinal in enumerate(("first", "second", "third")):
        if ordinal in words:
            return listed[i]
    if "backwards" in words or "reverse" in words:
        return ", ".join(listed[::-1])
    if "alphabet" in words or "alphabetical" in words:
        return ", ".join(sorted(listed))
    assert "count" in words or "many" in words, ask
    return NUMBERS[len(listed)]


def test_answers_are_right_by_another_program() -> None:
    for row in _rows(rows=2000):
        assert row["answer"] == _solve(_ask(row)), _ask(row)


def test_chosen_is_right_and_rejected_is_wrong() -> None:
    for row in _rows(rows=2000, seed=1):
        assert is_correct(row["chosen"][0]["content"], row["answer"]), row
        assert not is_correct(row["rejected"][0]["content"], row["answer"]), row


def test_the_longer_answer_is_not_the_better_one() -> None:
    lengths = [(len(r["chosen"][0]["content"]), len(r["rejected"][0]["content"])) for r in _rows(rows=4000)]
    longer, shorter = (sum(f(a, b) for a, b in lengths) for f in (int.__gt__, int.__lt__))
    assert 0.46 < longer / (longer + shorter) < 0.54
    assert 0.97 < sum(a for a, _ in lengths) / sum(b for _, b in lengths) < 1.03


def test_no_prompt_is_in_both_splits_whatever_the_seeds() -> None:
    train = {_ask(row) for seed in (0, 1) for row in _rows(rows=2000, seed=seed)}
    evaluation = {_ask(row) for seed in (0, 2) for row in _rows(rows=400, seed=seed, split="eval")}
    assert not train & evaluation
    assert all(map(is_held_out, evaluation))


def test_rows_are_a_function_of_split_and_seed_and_grow_at_the_end() -> None:
    rows = _rows(rows=300)
    assert _rows(rows=100) == rows[:100]
    assert len({_ask(row) for row in rows}) == 300
    assert _rows(rows=300, seed=1) != rows
    code = (
        "from trainer.synthetic import *; from trainer.config.trial import *;"
        "print(generate_rows(GeneratedSource(generated='instructions', rows=300)))"
    )
    for salt in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": salt}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert out.stdout.strip() == str(rows)


def test_every_family_is_there_and_has_rows_enough() -> None:
    assert len(Counter(" ".join(_ask(row).split()[:2]) for row in _rows(rows=4000))) >= 15
    assert len(set(WORDS)) == 40


def test_asking_for_more_prompts_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.synthetic.instructions.FAMILIES", {"one": lambda rng: ("Same?", "answer", "a", "b")})
    held_out = is_held_out("Same?")
    with pytest.raises(ValueError, match="has only 1 distinct prompts here, not 2"):
        _rows(rows=2, split="eval" if held_out else "train")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("eight", "eight"),
        ("Eight.", "eight"),
        ("8", "eight"),
        ("The answer is 8!", "eight"),
        ("I think it is eight. I hope this helps.", "eight"),
        ("Sure. Let me see. The result is EIGHT.", "eight"),
        ("Eight is the answer.", "eight"),
        ("answer: eight", "eight"),
        ("it is a dog", "dog"),
        ("\n the odd one is the dog \n", "dog"),
        ("dog,cat , mouse", "dog, cat, mouse"),
        ("That is dog, cat and mouse.", "dog, cat, mouse"),
        ("It is one.", "one"),
    ],
)
def test_right_however_it_is_said(answer: str, expected: str) -> None:
    assert is_correct(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "eight"),
        ("Sure.", "eight"),
        ("The answer is", "eight"),
        ("eighteen", "eight"),
        ("8 8", "eight"),
        ("It is seven or eight.", "eight"),
        ("It is not eight.", "eight"),
        ("It is seven. It is eight.", "eight"),
        ("dog, mouse, cat", "dog, cat, mouse"),
        ("dog, cat", "dog, cat, mouse"),
        ("It is one two.", "one"),
        ("It is eight is eight nine", "eight"),
    ],
)
def test_wrong_however_it_is_said(answer: str, expected: str) -> None:
    assert not is_correct(answer, expected)
