"""python -m xflow_jax: the same as the command xflow."""

import sys

from xflow_jax.cli.main import main

sys.exit(main())
