"""Shares of work for independent workers, without a mesh between them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from xflow_jax.errors import UserError, require

MERGE = "merge"
MOST_SHARDS = 99_999
# Pairs of variables that tell a worker its number and the count, the first of them first.
_VARIABLES = (
    ("XFLOW_SHARD_INDEX", "XFLOW_SHARD_COUNT"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),  # an indexed Job of Kubernetes
)


@dataclass(frozen=True)
class Shard:
    """One of several equal shares of a list.

    Attributes:
        index: number of the share, from 0.
        count: number of shares.
    """

    index: int = 0
    count: int = 1

    def takes(self, number: int) -> bool:
        """Returns True if the element of this number is in the share."""
        return number % self.count == self.index

    @property
    def name(self) -> str:
        """Name of the share, such as 00002-of-00008."""
        return f"{self.index:05d}-of-{self.count:05d}"


WHOLE = Shard()


def parse_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """Parses the share of a worker.

    Args:
        text: "i/n" with i from 0 to n - 1, or "auto" for the numbers that Slurm, an indexed Job of
            Kubernetes, or XFLOW_SHARD_INDEX and XFLOW_SHARD_COUNT give. Empty for the whole.
        environment: the variables.

    Returns:
        The share.

    Raises:
        UserError: for other texts, if no numbers are given, or for several connected processes.
    """
    if not text:
        return WHOLE
    require(
        jax.process_count() == 1,
        "shard is for independent workers, but these processes are connected. Start them without "
        "JAX_COORDINATOR_ADDRESS and XFLOW_DISTRIBUTED.",
    )
    if text == "auto":
        return _from_environment(environment)
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
    require(
        match is not None and int(match[1]) < int(match[2]),
        f"shard is {text!r}, but it must be i/n with i from 0 to n - 1, like 0/8, or auto",
    )
    assert match is not None
    return Shard(int(match[1]), int(match[2]))


def _from_environment(environment: Mapping[str, str]) -> Shard:
    for index_name, count_name in _VARIABLES:
        if index_name not in environment or count_name not in environment:
            continue
        try:
            index, count = int(environment[index_name]), int(environment[count_name])
        except ValueError:
            index, count = -1, 0
        index -= int(environment.get("SLURM_ARRAY_TASK_MIN") or 0) * ("ARRAY" in index_name)
        if not 0 <= index < count <= MOST_SHARDS:
            raise UserError(
                f"shard is auto, but {index_name} is {environment[index_name]!r} and {count_name} "
                f"is {environment[count_name]!r}"
            )
        return Shard(index, count)
    names = ", or ".join(" and ".join(pair) for pair in _VARIABLES)
    raise UserError(f"shard is auto, but the environment lacks {names}")
