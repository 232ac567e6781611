"""What a checker and a reward model make of pairs of answers."""

import math

import pytest

from orchestrator.judge.answer_pairs import (
    AnswerPair,
    checker_preferences,
    endpoint_questions,
    make_judgements,
    reward_key,
    reward_preferences,
)


def match(prompt: str, ours: str, theirs: str, expected: str | None = "eight", sample: int | None = None) -> AnswerPair:
    return AnswerPair(3, prompt, f"ask {prompt}", None, expected, sample, ours, theirs)


PAIRS = [
    match("a", "The result is eight.", "The result is nine."),
    match("b", "seven", "eight"),
    match("c", "8", "It is eight."),
    match("d", "five", "six"),
    match("e", "eight", "nine", None),
]


def test_a_checker_sees_right_and_wrong() -> None:
    found = checker_preferences(PAIRS)
    assert found.preferences == (1.0, 0.0, 0.5, 0.5, None)
    assert (found.score, found.initial_score) == (0.5, 0.5)
    assert checker_preferences(PAIRS[4:]) is None, "no row carries an answer"


def test_a_reward_model_goes_by_the_score() -> None:
    rewards = {
        reward_key(m, answer): float(len(answer)) for m in PAIRS for answer in (m.trial_answer, m.initial_answer)
    }
    assert reward_preferences(PAIRS, rewards).preferences == (1.0, 0.5, 0.0, 1.0, 1.0)
    rewards[reward_key(PAIRS[0], PAIRS[0].trial_answer)] = math.nan
    assert reward_preferences(PAIRS, rewards).preferences[0] is None
    assert reward_preferences(PAIRS[:1], rewards).score is None
    assert reward_preferences(PAIRS[1:2], {}).preferences == (None,)


def test_equal_answers_are_asked_of_nobody() -> None:
    same = match("a", "eight", "eight")
    assert endpoint_questions([same]) == []
    assert len(endpoint_questions([PAIRS[0], PAIRS[0], same])) == 2


def test_a_verdict_counts_prompts_and_averages_their_samples() -> None:
    pairs = [
        match("a", "eight", "nine", sample=0),
        match("a", "nine", "nine!", sample=1),
        match("b", "five", "eight", sample=0),
        match("b", "x" * 3000, "y", None, sample=1),
    ]
    preferences = checker_preferences(pairs)
    assert preferences is not None
    (judgement,) = make_judgements("checker", "rows", "sampled", {3: (pairs, preferences)})
    assert (judgement.wins, judgement.ties, judgement.losses, judgement.left_out, judgement.prompts) == (1, 0, 1, 1, 2)
    assert judgement.win_rate.value == pytest.approx((0.75 + 0.0) / 2)
    assert judgement.lc_win_rate is None, "two prompts are too few"
    assert [(e.trial_answer, e.preference) for e in judgement.examples] == [("eight", 1.0), ("five", 0.0)]
    assert [o.preference for o in judgement.outcomes] == [1.0, 0.5, 0.0, None]
    assert set(judgement.metrics()) == {"judge/checker_sampled_win_rate"}


def test_a_prompt_with_many_samples_weighs_as_one_with_few() -> None:
    """Prompt a is lost once, b won four times: scores, lengths, counts and rates say the same of both."""
    pairs = [match("a", "nine", "eight", sample=0)]
    pairs += [match("b", "It is eight.", "six", sample=k) for k in range(4)]
    preferences = checker_preferences(pairs)
    assert (preferences.score, preferences.initial_score) == (0.5, 0.5)
    (judgement,) = make_judgements("checker", "rows", "sampled", {3: (pairs, preferences)})
    assert (judgement.wins, judgement.ties, judgement.losses, judgement.prompts) == (1, 0, 1, 2)
    assert (judgement.length, judgement.initial_length) == (8.0, 4.0)
    assert judgement.win_rate.value == 0.5
    rewards = {
        reward_key(m, answer): float(len(answer)) for m in pairs for answer in (m.trial_answer, m.initial_answer)
    }
    assert (reward_preferences(pairs, rewards).score, reward_preferences(pairs, rewards).initial_score) == (8.0, 4.0)
