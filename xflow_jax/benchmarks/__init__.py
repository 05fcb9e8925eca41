"""Speed of decoding, and the time of each part of a step."""

from xflow_jax.benchmarks.accelerator import SHAPES, Numbers
from xflow_jax.benchmarks.accelerator_bench import SECTIONS, run_sections
from xflow_jax.benchmarks.cache_bench import cache_variants, measure_variants, ratio_sentence
from xflow_jax.benchmarks.decode_bench import measure_decode, timing_table
from xflow_jax.benchmarks.profiler import StepProfiler, parse_profile, profile_calls
from xflow_jax.benchmarks.timer import matmul_rate
from xflow_jax.benchmarks.torch_baseline import compare_with_torch
from xflow_jax.benchmarks.workload import RANDOM_MODELS, count_parameters, load_or_make

__all__ = [
    "Numbers",
    "RANDOM_MODELS",
    "SECTIONS",
    "SHAPES",
    "StepProfiler",
    "cache_variants",
    "compare_with_torch",
    "count_parameters",
    "load_or_make",
    "matmul_rate",
    "measure_decode",
    "measure_variants",
    "parse_profile",
    "profile_calls",
    "ratio_sentence",
    "run_sections",
    "timing_table",
]
