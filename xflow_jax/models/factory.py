"""The models, in Flax Linen; elsewhere parameters are a plain nested dict of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xflow_jax.models.llada import LLaDA
from xflow_jax.models.llada2 import LLaDA2

_FAMILIES = {"llada": LLaDA, "llada2": LLaDA2}


def build(config: Any, dtype: DTypeLike = jnp.float32, **fields: Any) -> nn.Module:
    """The module of a configuration, computing in `dtype`; `fields` are further fields of the module, e.g. remat."""
    return _FAMILIES[config.family](config, dtype=dtype, **fields)


def init_params(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters: normal of 0.02, outputs into the residual stream scaled down by the root of their number."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_params(model: nn.Module) -> dict[str, Any]:
    """The tree of parameters as jax.ShapeDtypeStruct: the contract for initialisation, restoring and conversion."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
