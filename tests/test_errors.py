"""Messages of UserError are one printable line, and seeds are checked."""

from __future__ import annotations

import numpy as np
import pytest

from xflow_jax.errors import MOST_SEED, UserError, check_seed, describe, printable


def test_messages_are_printable():
    hostile = "a\x1b[2J\x07\r\nb\x9b1m\u202ec\u2028\ud800\x00\x7f"
    message = str(UserError(hostile))
    assert (
        message == r"a\x1b[2J\x07\r\nb\x9b1m\u202ec\u2028\ud800\x00\x7f" and message.isprintable()
    )
    assert str(UserError("Größe → 日本 \U0001f600")) == "Größe → 日本 \U0001f600"
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_long_messages_are_shortened():
    message = str(UserError("begin" + "x" * 10**6 + "end"))
    assert len(message) < 1300 and message.startswith("begin") and message.endswith("end")


@pytest.mark.parametrize("seed", [0, 7, np.int64(7), np.uint8(7), MOST_SEED])
def test_right_seeds(seed):
    assert check_seed(seed) == seed and type(check_seed(seed)) is int


@pytest.mark.parametrize(
    "seed",
    [-1, MOST_SEED + 1, 2**64, 1.0, "1", None, True, np.array([1, 2]), float("nan")],
)
def test_wrong_seeds(seed):
    with pytest.raises(UserError, match="^seed must be a whole number from 0 to 4294967295, not "):
        check_seed(seed)


def test_a_seed_of_many_digits():
    with pytest.raises(UserError, match="^seed must be a whole number"):
        check_seed(10**5000)


def test_descriptions_of_values():
    class Hostile:
        def __repr__(self):
            raise RuntimeError

    assert describe([1, "a"]) == "[1, 'a']" and len(describe("x" * 1000)) == 63
    assert describe(Hostile()) == "a value of type Hostile"
    assert describe(10**5000) == "a value of type int"
