"""Command `python -m tests.mutations [--only NAME ...]`, from the root of a checkout."""

from __future__ import annotations

import argparse
import sys

from tests.mutations.runner import Outcome, check_mutations
from tests.mutations.table import read_mutations


def main() -> int:
    """Runs the check. Returns 1 if a bug was not found."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    names = parser.parse_args().only
    try:
        outcomes = check_mutations(read_mutations(names), _print)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    killed = sum(outcome.state == "killed" for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} killed")
    for outcome in outcomes:
        if outcome.state == "unreliable":
            _print(outcome)
    return int(any(o.state not in ("killed", "skipped") for o in outcomes))


def _print(outcome: Outcome) -> None:
    print(f"{outcome.state:10} {outcome.name}  {outcome.by}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
