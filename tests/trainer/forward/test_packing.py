"""Packed and separate layouts: every scored token is predicted by the right position, and micro-batches lose none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.trl_oracle import Pair, make_pairs, single_rows
from trainer.forward.packing import TOKEN_KINDS, Batch, micro_batches, pack_pairs, packed_lengths, pad_pairs

LAYOUTS = {"packed": pack_pairs, "separate": pad_pairs}


def by_kind(batch: Batch, pairs: list[Pair]) -> dict[tuple[int, str], list[int]]:
    found: dict[tuple[int, str], list[int]] = {}
    for pair_kind, target in zip(batch.pair_kinds.tolist(), batch.targets.tolist(), strict=True):
        found.setdefault((pair_kind // len(TOKEN_KINDS), TOKEN_KINDS[pair_kind % len(TOKEN_KINDS)]), []).append(target)
    return found


def context(batch: Batch, position: int) -> list[int]:
    """The tokens that a flat position has seen, by the layout's own rules."""
    ids = batch.input_ids.flatten().tolist()
    if batch.plan is None:
        start = position // batch.input_ids.shape[1] * batch.input_ids.shape[1]
        return ids[start : position + 1]
    for span in batch.plan.spans:
        middle = span.start + span.prompt + span.chosen
        if span.start <= position < middle:
            return ids[span.start : position + 1]
        if middle <= position < middle + span.rejected:
            return ids[span.start : span.start + span.prompt] + ids[middle : position + 1]
    raise AssertionError(position)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prompt", [False, True])
def test_every_scored_token_follows_its_own_context(layout: str, prompt: bool) -> None:
    pairs = make_pairs(5)
    batch, expected = LAYOUTS[layout](pairs, prompt=prompt), []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            full = [*pair.prompt.tolist(), *response.tolist()]
            expected += [(full[:n], full[n]) for n in range(len(pair.prompt), len(full))]
        if prompt:
            full = pair.prompt.tolist()
            expected += [(full[:n], full[n]) for n in range(1, len(full))]
    found = [
        (context(batch, row), target) for row, target in zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)
    ]
    assert found == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_responses_are_divided_at_the_length_of_the_shorter_one(layout: str) -> None:
    pairs = make_pairs(5)
    found = by_kind(LAYOUTS[layout](pairs, prompt=True), pairs)
    for number, pair in enumerate(pairs):
        shared = min(len(pair.chosen), len(pair.rejected))
        for name in ("chosen", "rejected"):
            tokens = getattr(pair, name).tolist()
            assert found[number, f"{name}_shared"] == tokens[:shared]
            assert found.get((number, f"{name}_tail"), []) == tokens[shared:]
        assert found[number, "prompt"] == pair.prompt[1:].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rejected_can_be_left_out(layout: str) -> None:
    pairs = make_pairs(4)
    batch = LAYOUTS[layout](pairs, rejected=False)
    assert batch.targets.tolist() == np.concatenate([pair.chosen for pair in pairs]).tolist()
    assert batch.rejected_tokens == (0,) * 4
    assert batch.chosen_tokens == tuple(len(pair.chosen) for pair in pairs)


def test_a_row_with_one_response_takes_no_more_than_that() -> None:
    pairs = single_rows(make_pairs(5))
    lengths = [[len(getattr(p, name)) for p in pairs] for name in ("prompt", "chosen", "rejected")]
    responses = [np.concatenate([p.chosen, p.rejected]) for p in pairs]
    whole = [len(p.prompt) + len(r) - 1 for p, r in zip(pairs, responses, strict=True)]
    packed, padded = pack_pairs(pairs), pad_pairs(pairs)
    assert packed_lengths(*lengths) == whole
    assert (packed.tokens, padded.tokens) == (sum(whole), len(pairs) * max(whole))
    for batch in (packed, padded):
        assert batch.targets.tolist() == np.concatenate(responses).tolist()
        assert (list(batch.chosen_tokens), list(batch.rejected_tokens)) == (lengths[1], lengths[2])


def test_packed_has_no_padding_and_positions_of_separate_sequences() -> None:
    pairs = make_pairs(6)
    batch = pack_pairs(pairs)
    lengths = packed_lengths(
        [len(p.prompt) for p in pairs], [len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs]
    )
    assert batch.tokens == batch.input_ids.numel() == sum(lengths)
    first = pairs[0]
    p, c, r = len(first.prompt), len(first.chosen) - 1, len(first.rejected) - 1
    assert batch.position_ids[0, : p + c + r].tolist() == [*range(p + c), *range(p, p + r)]


def test_rows_of_a_pair_are_adjacent() -> None:
    batch = pack_pairs(make_pairs(5), prompt=True)
    assert batch.pair_rows[-1] == len(batch.rows)
    for number, (low, high) in enumerate(zip(batch.pair_rows, batch.pair_rows[1:], strict=False)):
        assert set((batch.pair_kinds[low:high] // len(TOKEN_KINDS)).tolist()) == {number}


@pytest.mark.parametrize(
    ("empty", "message"), [(("prompt",), "an empty prompt"), (("chosen", "rejected"), "no response")], ids=str
)
def test_an_empty_part_is_refused(empty: tuple[str, ...], message: str) -> None:
    parts = {"prompt": np.ones(3, np.int32), "chosen": np.ones(2, np.int32), "rejected": np.ones(2, np.int32)}
    parts |= {name: parts[name][:0] for name in empty}
    for layout in LAYOUTS.values():
        with pytest.raises(ValueError, match=message):
            layout([Pair(**parts)])
        with pytest.raises(ValueError, match="no response"):
            layout([Pair(np.ones(3, np.int32), parts["chosen"][:0], np.ones(2, np.int32))], rejected=False)
        with pytest.raises(ValueError, match="at least one"):
            layout([])


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), budget=st.integers(1, 120), seed=st.integers(0, 9)
)
def test_micro_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    batches = micro_batches(lengths, order, budget)
    assert [index for batch in batches for index in batch] == order
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    assert batches == micro_batches(lengths, order, budget)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), budget=st.integers(1, 200))
def test_micro_batches_of_padded_pairs_are_bounded_with_their_padding(lengths: list[int], budget: int) -> None:
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = micro_batches(lengths, order, budget, padded=True)
    assert [index for batch in batches for index in batch] == order
    for batch in batches:
        assert max(lengths[i] for i in batch) * len(batch) <= budget or len(batch) == 1


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        micro_batches([1], [0], 0)


def test_batches_move() -> None:
    batch = pack_pairs(make_pairs(2)).to(torch.device("meta"))
    assert batch.rows.device.type == batch.input_ids.device.type == "meta"
