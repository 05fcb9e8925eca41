"""Modules from configurations, and their parameters as a nested dict."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from xflow_jax.models.llada import LLaDA
from xflow_jax.models.llada2 import LLaDA2, LLaDAMoE
from xflow_jax.models.quantization import INT8, compute_dtype, quantize_params
from xflow_jax.models.size_limits import check_sizes
from xflow_jax.types import Array, Backbone, Key, ModelConfig

_BACKBONES: dict[str, Callable[..., Backbone]] = {
    "llada": LLaDA,
    "illada": LLaDA,
    "dream": LLaDA,
    "sdar": LLaDA,
    "fast_dllm": LLaDA,
    "llada2": LLaDA2,
    "lladamoe": LLaDAMoE,
}


def build(config: ModelConfig, dtype: DTypeLike = jnp.float32, **fields: object) -> Backbone:
    """Builds the module of a configuration.

    Args:
        config: the configuration. Its family selects the module.
        dtype: dtype of the computation.
        **fields: further fields of the module, for example remat.

    Returns:
        The module.

    Raises:
        UserError: if a size is impossible (`check_sizes`).
    """
    check_sizes(config)
    return _BACKBONES[config.family](config, dtype=dtype, **fields)


@partial(jax.jit, static_argnames="model")
def init_params(model: Backbone, key: Key[Array, ""]) -> dict[str, Any]:
    """Draws fresh parameters.

    Matrices are normal with a standard deviation of 0.02. Outputs into the residual stream are
    scaled down by the square root of their number.

    Args:
        model: the module.
        key: the random key.

    Returns:
        The nested dict of parameters.
    """
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_params(model: Backbone) -> dict[str, Any]:
    """Returns the tree of parameters as jax.ShapeDtypeStruct.

    It is the contract for initialisation, restoring and conversion.
    """
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def abstract_weights(config: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
    """Returns the tree of parameters in a dtype of weights.

    Args:
        config: the configuration.
        dtype: dtype of the parameters. With int8 the layers' matrices are quantised, and the other
            parameters are bfloat16. The bias of a router is always float32.

    Returns:
        The tree, of jax.ShapeDtypeStruct.
    """
    float_dtype = compute_dtype(dtype)
    abstract = abstract_params(build(config, float_dtype, param_dtype=float_dtype))
    return jax.eval_shape(quantize_params, abstract) if np.dtype(dtype) == INT8 else abstract
