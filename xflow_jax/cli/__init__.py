"""The command line: main.py, and one module for each command."""

from xflow_jax.cli.process import run_process

__all__ = ["run_process"]
