"""Shares of independent workers, given by hand and by schedulers."""

from __future__ import annotations

import pytest

from xflow_jax.errors import UserError
from xflow_jax.parallel import WHOLE, Shard, parse_shard


def test_shares_are_disjoint_and_complete():
    shares = [Shard(i, 3) for i in range(3)]
    assert sorted(n for share in shares for n in range(10) if share.takes(n)) == list(range(10))
    assert all(WHOLE.takes(n) for n in range(10))
    assert Shard(2, 8).name == "00002-of-00008"


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, Shard(3, 4)),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
                "SLURM_ARRAY_TASK_ID": "11",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "10",
            },
            Shard(1, 4),
        ),
        ({"JOB_COMPLETION_INDEX": "15", "JOB_COMPLETIONS": "16"}, Shard(15, 16)),
        (
            {"XFLOW_SHARD_INDEX": "1", "XFLOW_SHARD_COUNT": "2", "SLURM_PROCID": "0"},
            Shard(1, 2),
        ),
    ],
)
def test_schedulers_give_the_numbers(environment, share):
    assert parse_shard("auto", environment) == share


def test_texts():
    assert parse_shard("", {}) == WHOLE
    assert parse_shard("0/8", {}) == Shard(0, 8)
    for text in ("8/8", "1", "a/b", "-1/2", "1/0", "1/2/3"):
        with pytest.raises(UserError, match="it must be i/n"):
            parse_shard(text, {})
    with pytest.raises(UserError, match="the environment lacks XFLOW_SHARD_INDEX and"):
        parse_shard("auto", {"SLURM_PROCID": "1"})
    with pytest.raises(UserError, match="SLURM_PROCID is '4'"):
        parse_shard("auto", {"SLURM_PROCID": "4", "SLURM_NTASKS": "4"})
