"""What a checker and a reward model make of pairs of answers."""

from __future__ import annotations

import math

import pytest

from orchestrator.judge.answer_pairs import Match, by_checker, by_reward, conclude, scored, to_ask


def match(prompt: str, ours: str, theirs: str, expected: str | None = "eight", sample: int | None = None) -> Match:
    return Match(3, prompt, f"ask {prompt}", None, expected, sample, ours, theirs)


PAIRS = [
    match("a", "The result is eight.", "The result is nine."),
    match("b", "seven", "eight"),
    match("c", "8", "It is eight."),
    match("d", "five", "six"),
    match("e", "eight", "nine", None),
]


def test_a_checker_sees_right_and_wrong() -> None:
    found = by_checker(PAIRS)
    assert found is not None
    assert found.preferences == (1.0, 0.0, 0.5, 0.5, None)
    assert (found.score, found.start_score) == (0.5, 0.5)
    assert by_checker(PAIRS[4:]) is None, "no row carries an answer"


def test_a_reward_model_goes_by_the_score() -> None:
    rewards = {scored(m, answer): float(len(answer)) for m in PAIRS for answer in (m.ours, m.theirs)}
    found = by_reward(PAIRS, rewards)
    assert found.preferences == (1.0, 0.5, 0.0, 1.0, 1.0)
    rewards[scored(PAIRS[0], PAIRS[0].ours)] = math.nan
    assert by_reward(PAIRS, rewards).preferences[0] is None
    assert by_reward(PAIRS[:1], rewards).score is None
    assert by_reward(PAIRS[1:2], {}).preferences == (None,)


def test_equal_answers_are_asked_of_nobody() -> None:
    same = match("a", "eight", "eight")
    assert to_ask([same]) == []
    assert len(to_ask([PAIRS[0], PAIRS[0], same])) == 2


def test_a_verdict_counts_prompts_and_averages_their_samples() -> None:
    pairs = [
        match("a", "eight", "nine", sample=0),
        match("a", "nine", "nine!", sample=1),
        match("b", "five", "eight", sample=0),
        match("b", "x" * 3000, "y", None, sample=1),
    ]
    opinion = by_checker(pairs)
    assert opinion is not None
    (verdict,) = conclude("checker", "rows", "sampled", {3: (pairs, opinion)})
    assert (verdict.wins, verdict.ties, verdict.losses, verdict.left_out, verdict.prompts) == (1, 0, 1, 1, 2)
    assert verdict.win_rate is not None
    assert verdict.win_rate.value == pytest.approx((0.75 + 0.0) / 2)
    assert verdict.lc_win_rate is None, "two prompts are too few"
    assert [(e.ours, e.preference) for e in verdict.examples] == [("eight", 1.0), ("five", 0.0)]
    assert [o.preference for o in verdict.outcomes] == [1.0, 0.5, 0.0, None]
    assert set(verdict.metrics()) == {"judge/checker_sampled_win_rate"}


def test_a_prompt_with_many_samples_weighs_as_one_with_few() -> None:
    """Prompt a is lost once, b won four times: scores, lengths, counts and rates say the same of both."""
    pairs = [match("a", "nine", "eight", sample=0)]
    pairs += [match("b", "It is eight.", "six", sample=k) for k in range(4)]
    opinion = by_checker(pairs)
    assert opinion is not None
    assert (opinion.score, opinion.start_score) == (0.5, 0.5)
    (verdict,) = conclude("checker", "rows", "sampled", {3: (pairs, opinion)})
    assert (verdict.wins, verdict.ties, verdict.losses, verdict.prompts) == (1, 0, 1, 2)
    assert (verdict.length, verdict.start_length) == (8.0, 4.0)
    assert verdict.win_rate is not None
    assert verdict.win_rate.value == 0.5
    rewards = {scored(m, answer): float(len(answer)) for m in pairs for answer in (m.ours, m.theirs)}
    assert (by_reward(pairs, rewards).score, by_reward(pairs, rewards).start_score) == (8.0, 4.0)
