"""Batches of rows of similar lengths."""

import numpy as np
import pytest

from xflow_jax.errors import UserError
from xflow_jax.training import LengthGroups, batch_iterator
from xflow_jax.training.length_groups import cut_padding

EOS, ROWS, P, N = 9, 4, 40, 64


class Numbered:
    """Pairs of random lengths. The first token of a response is the number of the pair."""

    def __len__(self):
        return 400

    def __getitem__(self, index):
        prompt, text = np.random.default_rng(index).integers(1, (P, N))
        response = np.full(N, EOS, np.int32)
        response[:text] = 10 + index
        return {
            "prompt": np.where(np.arange(P) >= P - prompt, index, 0).astype(np.int32),
            "prompt_mask": np.arange(P) >= P - prompt,
            "response": response,
        }


def kind(batch):
    return batch // 2 % 2


def make(window=6, until=15):
    return LengthGroups(batch_iterator(Numbered(), ROWS), kind, window, until, EOS)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_rows_change_places_in_their_window_and_kind_only():
    batches = take(make(), 15)
    for first, last in ((0, 6), (6, 12), (12, 15)):
        for which in (0, 1):
            places = [i for i in range(first, last) if kind(i) == which]
            rows = np.concatenate([batches[i]["response"][:, 0] - 10 for i in places])
            assert sorted(rows) == [ROWS * i + row for i in places for row in range(ROWS)]


def test_batches_lose_padding_alone():
    source, seen = Numbered(), set()
    for batch in take(make(), 15):
        prompt, text = batch["prompt"].shape[1], batch["response"].shape[1]
        seen.add((prompt, text))
        assert (batch["response"] == EOS).any(axis=1).all()
        for row, index in enumerate(batch["response"][:, 0] - 10):
            whole = source[int(index)]
            np.testing.assert_array_equal(batch["prompt"][row], whole["prompt"][-prompt:])
            np.testing.assert_array_equal(batch["prompt_mask"][row], whole["prompt_mask"][-prompt:])
            np.testing.assert_array_equal(batch["response"][row], whole["response"][:text])
            assert not whole["prompt_mask"][: P - prompt].any()
            assert (whole["response"][text:] == EOS).all()
    assert len(seen) > 3 and all(n % 16 == 0 for _, n in seen)


def test_groups_need_fewer_positions():
    def positions(batches):
        return sum(b["prompt"].size + 2 * b["response"].size for b in batches)

    assert positions(take(make(24, 24), 24)) < 0.85 * positions(take(make(1, 24), 24))


def test_later_batches_are_as_they_were():
    batches, plain = make(), batch_iterator(Numbered(), ROWS)
    for later, same in zip(take(batches, 30)[15:], take(plain, 30)[15:], strict=True):
        for name in same:
            np.testing.assert_array_equal(later[name], same[name])


@pytest.mark.parametrize("position", [0, 4, 6, 11, 14, 15, 20])
def test_a_restored_position_gives_the_same_batches(position):
    before, after = make(), make()
    take(before, position)
    after.set_state(before.get_state())
    for one, other in zip(take(before, 9), take(after, 9), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_another_window_is_refused():
    before = make(window=6)
    take(before, 4)
    with pytest.raises(UserError, match="in groups of 6 batches, and not of 4. Give it the same"):
        make(window=4).set_state(before.get_state())


def test_another_end_of_the_groups_is_refused_inside_one():
    def continued(position, until):
        before, after = make(until=10), make(until=until)
        take(before, position)
        after.set_state(before.get_state())
        return after

    with pytest.raises(UserError, match="and 10 batches were to be grouped, not 15. Give it the"):
        continued(10, until=15)
    with pytest.raises(UserError, match="the run is inside a group of 6 batches"):
        continued(8, until=9)
    # Between groups, and behind both ends, nothing is lost.
    same = take(make(), 15)
    for one, other in zip(take(continued(6, until=15), 9), same[6:], strict=True):
        np.testing.assert_array_equal(one["response"], other["response"])
    plain = take(batch_iterator(Numbered(), ROWS), 15)[14]
    np.testing.assert_array_equal(next(continued(14, until=8))["response"], plain["response"])


def test_a_window_of_one_leaves_all_batches():
    """It also goes on from the position of the plain batches."""
    ours, plain = make(window=1), batch_iterator(Numbered(), ROWS)
    for again in (False, True):
        if again:
            ours.set_state(plain.get_state())
        for one, other in zip(take(ours, 3), take(plain, 3), strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


def test_a_text_of_sixteen_tokens_keeps_an_end():
    response = np.where(np.arange(N) < 16, 1, EOS)[None].astype(np.int32)
    real = (np.arange(P) >= P - 16)[None]
    cut = cut_padding(
        {"prompt": real.astype(np.int32), "prompt_mask": real, "response": response}, EOS
    )
    assert cut["response"].shape == (1, 32) and cut["prompt"].shape == (1, 16)
