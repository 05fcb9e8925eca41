"""Table of small bugs, and their application to source text."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("patches.toml")
ROOT = Path(__file__).parents[2]  # of the checkout


class StalePatch(ValueError):
    """The source text has changed, so a patch no longer applies."""


@dataclass(frozen=True)
class Mutation:
    """One bug: a replacement in one file, and the tests that must find it.

    Attributes:
        name: key in the table.
        file: path from the root of the checkout.
        old: text that occurs in the file once.
        new: text that takes its place.
        tests: files or "file::test" of the default run.
        as_root: True if the bug has an effect for root alone.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    as_root: bool = False

    def apply(self, text: str) -> str:
        """Returns the text of the file with the bug.

        Raises:
            StalePatch: if `old` does not occur exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise StalePatch(
                f"{TABLE.name}: the text of {self.name} occurs {count} times in {self.file}, "
                f"but it must occur once. Correct its `old`: {self.old!r}."
            )
        return text.replace(self.old, self.new)


def read_mutations(only: Sequence[str] = ()) -> list[Mutation]:
    """Reads the table.

    Args:
        only: names to select, or nothing for all.

    Raises:
        ValueError: for a name that the table lacks.
    """
    table = tomllib.loads(TABLE.read_text())
    if unknown := [name for name in only if name not in table]:
        raise ValueError(f"there is no mutation {unknown[0]!r} in {TABLE.name}")
    return [
        Mutation(name, **row | {"tests": tuple(row["tests"])})
        for name, row in table.items()
        if name in (only or table)
    ]
