"""Win rates: what must hold of any votes, and Wilson's interval against a count of coins."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from orchestrator.judge.win_rates import Vote, VotePair, first_position, wilson, win_rate

VOTES: st.SearchStrategy[Vote] = st.sampled_from(["first", "second", "tie"])
BOTH = st.builds(VotePair, VOTES | st.none(), VOTES | st.none())
PREFERENCES = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), max_size=40)
SWAPPED: dict[Vote | None, Vote | None] = {"first": "second", "second": "first", "tie": "tie", None: None}


@given(BOTH)
def test_the_answers_exchanged_exchange_the_preference(both: VotePair) -> None:
    # The same judge with both models exchanged saw ours second where it saw it first: the same two votes, exchanged.
    exchanged = VotePair(both.trial_second, both.trial_first)
    if both.preference is None:
        assert exchanged.preference is None
        assert None in (both.trial_first, both.trial_second)
    else:
        assert exchanged.preference == pytest.approx(1 - both.preference)
        assert both.is_consistent == exchanged.is_consistent


@given(VOTES)
def test_a_judge_that_only_sees_places_prefers_nobody(vote: Vote) -> None:
    both = VotePair(vote, vote)
    assert both.preference == 0.5
    assert both.is_consistent is (vote == "tie")


@given(PREFERENCES)
def test_a_win_rate_is_a_share_inside_its_interval_and_mirrors(preferences: list[tuple[str, float]]) -> None:
    rate = win_rate(preferences)
    if not preferences:
        assert rate is None
        return
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    mirrored = win_rate([(prompt, 1 - preference) for prompt, preference in preferences])
    assert (mirrored.value, mirrored.low) == (pytest.approx(1 - rate.value), pytest.approx(1 - rate.high))
    assert win_rate(preferences[::-1]) == rate


@given(PREFERENCES.filter(bool), st.integers(2, 4))
def test_more_samples_of_the_same_prompts_are_no_more_prompts(given_: list[tuple[str, float]], times: int) -> None:
    once, often = win_rate(given_), win_rate(given_ * times)
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counted: tuple[int, int]) -> None:
    wins, count = counted
    known = binomtest(wins, count).proportion_ci(method="wilson")
    found = wilson(wins / count, count)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-6)


def test_no_share_is_refused() -> None:
    for share, count in ((0.5, 0), (1.2, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match="is not a share"):
            wilson(share, count)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), BOTH), max_size=30))
def test_the_first_position_of_the_answers_exchanged_mirrors(votes: list[tuple[str, VotePair]]) -> None:
    first, agree = first_position(votes)
    assert (first is None) == (
        not any(v in ("first", "second") for _, b in votes for v in (b.trial_first, b.trial_second))
    )
    swapped = [(prompt, VotePair(SWAPPED[b.trial_first], SWAPPED[b.trial_second])) for prompt, b in votes]
    other, same = first_position(swapped)
    assert same == agree
    if first is not None and other is not None:
        assert other.value == pytest.approx(1 - first.value)


def test_both_orders_of_a_pair_are_one_observation_of_the_position() -> None:
    """Forty votes on twenty pairs are no surer than twenty coins, and samples of a prompt are no more of them."""
    votes = [(str(n), VotePair("first", "first") if n < 15 else VotePair("second", "second")) for n in range(20)]
    first, agree = first_position(votes)
    assert first == wilson(0.75, 20)
    assert agree == 0.0
    assert first_position(votes * 3) == (first, agree)
    one_sided = [("a", VotePair("first", "tie")), ("a", VotePair("second", None)), ("b", VotePair("first", None))]
    assert first_position(one_sided)[0] == wilson(0.75, 2), "a: one half, b: one"
