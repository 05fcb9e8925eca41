"""Programs that convert checkpoints, run from a checkout: from_hf, to_hf and verify."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from xflow_jax.cli import run_process
from xflow_jax.parallel import find_devices, multihost


def run_program(
    main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser
) -> None:
    """Runs a program with the arguments of the command line.

    Errors end it as those of a command (`run_process`).

    Args:
        main: function of the parsed arguments.
        parser: parser of the command line.
    """
    arguments = parser.parse_args()

    def run() -> None:
        multihost.configure_types()
        multihost.skip_missing_tpu()
        find_devices()
        main(arguments)

    sys.exit(run_process(run))
