"""Configuration of all tests: eight fake CPU devices, exact float32, no network."""

import gc
import os

# Before the first import of jax, which reads these when it starts.
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Commands enable the cache in the user's own directory.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Shapes and dtypes of annotations are checked at every call, also while a function is traced.
_CHECKED = ["xflow_jax.decoding", "xflow_jax.models", "xflow_jax.training"]
install_import_hook(_CHECKED, "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Clears programs: thousands of them exceed the memory mappings that Linux allows."""
    yield
    jax.clear_caches()
    gc.collect()
