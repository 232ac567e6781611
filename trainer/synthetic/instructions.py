"""The synthetic task: short instructions whose answers a program can check.

Each row has a right answer in a short sentence, and a plausible wrong one: off by one, the other operand, two words
swapped. Which of the two sentences is longer is random, so length carries no information.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from difflib import SequenceMatcher
from hashlib import sha256
from typing import Any

from trainer.config.trial import GeneratedSource

VERSION = 1
"""Version of the rows; part of every fingerprint of them."""

EVAL_SHARE = 0.1
"""Share of all possible prompts that is reserved for the split `eval`."""

NUMBERS = (
    *[
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
    ],
    *["sixteen", "seventeen", "eighteen", "nineteen", "twenty"],
)
KINDS = {
    "animal": ["dog", "cat", "horse", "cow", "goat", "lion", "bear", "wolf", "mouse", "rabbit"],
    "fruit": ["apple", "pear", "plum", "grape", "lemon", "mango", "peach", "cherry", "melon", "orange"],
    "colour": ["red", "blue", "green", "pink", "black", "white", "brown", "grey", "purple", "yellow"],
    "tool": ["hammer", "saw", "drill", "shovel", "rake", "axe", "wrench", "ladder", "rope", "knife"],
}
WORDS = [word for kind in KINDS.values() for word in kind]
ORDINALS = ("first", "second", "third")

Task = tuple[str, str, str, str]
"""Instruction, name of the requested value, right answer, wrong answer."""


def _sum(rng: random.Random) -> Task:
    first, second = rng.randint(0, 10), rng.randint(0, 10)
    plus = rng.random() < 0.6
    first, second = (first, second) if plus else (max(first, second), min(first, second))
    right = first + second if plus else first - second
    wrong = rng.choice([n for n in (right - 1, right + 1, first, second) if 0 <= n < len(NUMBERS) and n != right])
    if rng.random() < 0.5:
        verb, color = "get" if plus else "lose", rng.choice(KINDS["colour"])
        ask = f"You have {NUMBERS[first]} {color} balls and {verb} {NUMBERS[second]}. How many now?"
    else:
        ask = rng.choice(("What is {} {} {}?", "Work out {} {} {}.", "How much is {} {} {}?"))
        ask = ask.format(NUMBERS[first], "plus" if plus else "minus", NUMBERS[second])
    return ask, "result", NUMBERS[right], NUMBERS[wrong]


def _compare(rng: random.Random) -> Task:
    numbers = rng.sample(range(len(NUMBERS)), rng.randint(2, 3))
    larger = rng.random() < 0.5
    right = max(numbers) if larger else min(numbers)
    wrong = rng.choice([n for n in numbers if n != right])
    word = "largest" if larger else "smallest"
    ask = rng.choice(("Which number is the {}: {}?", "Name the {} number: {}."))
    listed = ", ".join(NUMBERS[n] for n in numbers)
    return ask.format(word, listed), f"{word} number", NUMBERS[right], NUMBERS[wrong]


def _odd_one(rng: random.Random) -> Task:
    most, other = rng.sample(sorted(KINDS), 2)
    words = rng.sample(KINDS[most], 3)
    right, wrong = rng.choice(KINDS[other]), rng.choice(words)
    words.insert(rng.randrange(4), right)
    ask = rng.choice(("Which word does not belong: {}?", "Find the odd one out: {}."))
    return ask.format(", ".join(words)), "odd one", right, wrong


def _pick(rng: random.Random) -> Task:
    words = rng.sample(WORDS, 3)
    at = rng.randrange(len(words))
    wrong = words[rng.choice([i for i in (at - 1, at + 1) if 0 <= i < len(words)])]
    ask = rng.choice(("What is the {} word of: {}?", "Give the {} word: {}."))
    return ask.format(ORDINALS[at], ", ".join(words)), f"{ORDINALS[at]} word", words[at], wrong


def _length(rng: random.Random) -> Task:
    longest = rng.random() < 0.5
    while True:
        words = sorted(rng.sample(WORDS, 3), key=len, reverse=longest)
        if len(words[0]) != len(words[1]):
            break
    right, wrong = words[0], rng.choice(words[1:])
    rng.shuffle(words)
    word = "longest" if longest else "shortest"
    ask = rng.choice(("Which word is the {}: {}?", "Pick the {} word: {}."))
    return ask.format(word, ", ".join(words)), f"{word} word", right, wrong


def _swap_two(words: list[str], rng: random.Random) -> list[str]:
    position = rng.randrange(len(words) - 1)
    return [*words[:position], words[position + 1], words[position], *words[position + 2 :]]


def _reverse(rng: random.Random) -> Task:
    words = rng.sample(WORDS, rng.choice((2, 2, 3)))
    right = words[::-1]
    wrong = words if rng.random() < 0.5 else _swap_two(right, rng)
    ask = rng.choice(("Say these words backwards: {}.", "Reverse the order: {}."))
    return ask.format(", ".join(words)), "reverse order", ", ".join(right), ", ".join(wrong)


def _sort(rng: random.Random) -> Task:
    while True:
        words = rng.sample(WORDS, rng.choice((2, 2, 3)))
        if len({w[0] for w in words}) == len(words):
            break
    right = sorted(words)
    wrong = words if words != right and rng.random() < 0.5 else _swap_two(right, rng)
    ask = rng.choice(("Sort by the alphabet: {}.", "Put in alphabetical order: {}."))
    return ask.format(", ".join(words)), "sorted list", ", ".join(right), ", ".join(wrong)


def _count(rng: random.Random) -> Task:
    words = rng.sample(WORDS, rng.randint(2, 6))
    right = len(words)
    wrong = rng.choice((right - 1, right + 1))
    ask = rng.choice(("How many words are here: {}?", "Count the words: {}."))
    return ask.format(", ".join(words)), "count", NUMBERS[right], NUMBERS[wrong]


FAMILIES: dict[str, Callable[[random.Random], Task]] = {
    "sum": _sum,
    "compare": _compare,
    "odd_one": _odd_one,
    "pick": _pick,
    "length": _length,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
}

# The phrasing is drawn for each answer, with common and rare phrases, as in human data: a model that ranks by phrasing
# instead of content often prefers the wrong answer.
_OPENINGS = {"": 60, "Sure. ": 20, "Let me see. ": 12, "Good question. ": 8}
_SENTENCES = {
    "The answer is {1}.": 40,
    "The {0} is {1}.": 25,
    "It is {1}.": 20,
    "That is {1}.": 10,
    "I think it is {1}.": 5,
}
_CLOSINGS = {"": 70, " I hope this helps.": 20, " Ask me if you need more.": 10}


def _phrase(rng: random.Random, name: str, answer: str) -> str:
    parts = [rng.choices(tuple(some), weights=tuple(some.values()))[0] for some in (_OPENINGS, _SENTENCES, _CLOSINGS)]
    return "".join(parts).format(name, answer)


def _row(rng: random.Random) -> dict[str, Any]:
    ask, name, right, wrong = FAMILIES[rng.choice(tuple(FAMILIES))](rng)
    return {
        "prompt": [{"role": "user", "content": ask}],
        "chosen": [{"role": "assistant", "content": _phrase(rng, name, right)}],
        "rejected": [{"role": "assistant", "content": _phrase(rng, name, wrong)}],
        "answer": right,
        "score_chosen": 10.0,
        "score_rejected": _score(wrong, right),
    }


def _score(answer: str, right: str) -> float:
    """Return how similar an answer is to the right one, 0 to 10; below 10 unless they are equal."""
    return round(10 * SequenceMatcher(None, answer, right, autojunk=False).ratio(), 3)


def is_held_out(prompt: str) -> bool:
    """Return whether a prompt belongs to the split `eval`, determined by its text, so that all sources agree."""
    return int.from_bytes(sha256(prompt.encode()).digest()[:8], "big") < EVAL_SHARE * 2**64


def generate_rows(source: GeneratedSource) -> list[dict[str, Any]]:
    """Return `source.rows` rows with distinct prompts: `prompt`, `chosen`, `rejected` (conversational), `answer`
    (text), `score_chosen` (10) and `score_rejected` (the wrong answer's similarity to the right one, 0 to 10).

    Determined by rows, split and seed; a larger number of rows extends the smaller one. The prompts of the splits are
    disjoint for all seeds. Raises ValueError if the task has fewer prompts.
    """
    rng = random.Random(f"prefsweep task {VERSION} {source.split} {source.seed}")
    held_out = source.split == "eval"
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    misses = 0
    while len(rows) < source.rows:
        row = _row(rng)
        ask = row["prompt"][0]["content"]
        if is_held_out(ask) != held_out:
            continue
        if ask in seen:
            misses += 1
            if misses > 20 * source.rows + 1000:
                raise ValueError(f"the generated task has only {len(rows)} distinct prompts here, not {source.rows}")
            continue
        seen.add(ask)
        rows.append(row)
    return rows


_VERB = re.compile(r"\b(?:is|are|be|equals)\b|\banswer\s*:")
_LABELS = frozenset({"answer", "result", "count", "odd one", "reverse order", "sorted list"})
_COURTESIES = frozenset({"sure", "ok", "okay", "yes", "let me see", "good question"})


def _normalize_text(text: str) -> str:
    """Normalize: lower case, small digits as words, no punctuation, no articles."""
    words = re.findall(r"[a-z]+|\d+", text.lower())
    words = [NUMBERS[int(w)] if w.isdigit() and int(w) < len(NUMBERS) else w for w in words]
    return " ".join(w for w in words if w not in {"a", "an", "the", "and", "i", "think", "then"})


def is_correct(answer: str, expected: str) -> bool:
    """Return whether a model's answer is `expected` and nothing else.

    Case, punctuation, digits for small number words and a sentence around the answer are ignored ("I think it is 8."
    for "eight"). The first sentence with content counts; naming several candidates is wrong.
    """
    expected_text = _normalize_text(expected)
    for sentence in re.split(r"[.!?\n]+", answer):
        found = _VERB.split(sentence.lower())
        if len(found) > 1 and _normalize_text(found[0]) and _normalize_text(found[-1]) in _LABELS:
            return _normalize_text(found[0]) == expected_text
        if _normalize_text(found[-1]):
            if len(found) == 1 and _normalize_text(found[-1]) in _COURTESIES:
                continue
            return _normalize_text(found[-1]) == expected_text
    return False
