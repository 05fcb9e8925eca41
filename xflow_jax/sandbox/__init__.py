"""Untrusted programs in limited processes."""

from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.pool import SAME_INTERPRETER, Pool, run_many

__all__ = [
    "SAME_INTERPRETER",
    "Limits",
    "Pool",
    "run_many",
]
