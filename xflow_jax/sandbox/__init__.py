"""Untrusted programs in limited processes."""

from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.pool import Pool, run_many

__all__ = [
    "Limits",
    "Pool",
    "run_many",
]
