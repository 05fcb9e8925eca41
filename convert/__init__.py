"""Programs that convert checkpoints, run from a checkout: from_hf, to_hf and verify."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from xflow_jax.errors import UserError


def run_program(
    main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser
) -> None:
    """`main(arguments)` from the command line; a user's mistake is one sentence and exit status 2."""
    try:
        main(parser.parse_args())
    except UserError as error:
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))


def _say(sentence: str, status: int) -> int:
    print(sentence, file=sys.stderr)
    return status
