"""Entry point of `python -m xflow_jax`, which is the command xflow."""

import sys

from xflow_jax.cli.main import main

sys.exit(main())
