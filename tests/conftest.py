"""Configuration of all tests: eight fake CPU devices, exact float32, no network."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Before the first import of jax, which reads these when it starts.
_FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if "--xla_backend_optimization_level=0" in _FLAGS[0] and version("jaxlib").startswith("0.10."):
    # The first one takes an unoptimised compilation to two thirds of its time, and later versions
    # do not know it. The others take some more off.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    _FLAGS.append("--xla_llvm_disable_expensive_passes=true")
    _FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Commands enable the cache in the user's own directory.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Source lines of operations take a seventh of the time of tests that compile much.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Shapes and dtypes of annotations are checked at every call, also while a function is traced, by
# the tests of these packages. They are a fifth of the time of tests/models/test_llada.py.
_CHECKED = ("decoding", "models", "training")
jaxtyping.install_import_hook([f"xflow_jax.{name}" for name in _CHECKED], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


_MAPPINGS = Path("/proc/self/maps")
_MOST_MAPPINGS = 8_000  # about 1.5 GB. Linux allows 65,530, and a module adds some thousands


@pytest.fixture(scope="module", autouse=True)
def _check_annotations(request):
    """Checks annotations in the tests of the packages that have them."""
    package = request.path.relative_to(Path(__file__).parent).parts[0]
    jaxtyping.config.update("jaxtyping_disable", package not in _CHECKED)


def pytest_collection_finish():
    """Takes what is imported out of later garbage collections, which would look at all of it."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Clears programs when there are many, before they exceed the mappings that Linux allows."""
    yield
    if not _MAPPINGS.exists() or _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
