"""Programs that convert checkpoints, run from a checkout: from_hf, to_hf and verify."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from xflow_jax.errors import UserError


def run_program(
    main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser
) -> None:
    """Runs a program with the arguments of the command line.

    A UserError ends the program with a message on stderr and status 2, an interrupt with status
    130.

    Args:
        main: function of the parsed arguments.
        parser: parser of the command line.
    """
    try:
        main(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
