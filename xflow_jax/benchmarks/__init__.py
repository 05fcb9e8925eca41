"""Speed of decoding: tokens per second and where the time of a step goes."""

from xflow_jax.benchmarks import cache_bench
from xflow_jax.benchmarks.decode_bench import (
    SHAPES,
    compare_with_torch,
    load_or_make,
    matmul_rate,
    measure_decode,
    seconds,
    timing_table,
)

__all__ = [
    "SHAPES",
    "cache_bench",
    "compare_with_torch",
    "load_or_make",
    "matmul_rate",
    "measure_decode",
    "seconds",
    "timing_table",
]
