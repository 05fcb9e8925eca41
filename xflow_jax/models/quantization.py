"""Matrices of the layers in int8, with scales of their columns.

A matrix [..., in, out] becomes int8 at its own path, and its scales, float32 [..., out], stand
beside it under the same name with "_scale" behind it. The matrix is then q * scale. Activations
keep the dtype of the computation, and the compiler converts the integers inside the product.
Embedding, head, norms, biases and the router are as they were.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike, DTypeLike

from xflow_jax.errors import require
from xflow_jax.parallel import path_name
from xflow_jax.types import Params

INT8 = np.dtype(np.int8)
SCALE = "_scale"  # behind the name of a matrix
STACKS = ("dense", "blocks")
_LARGEST = 127
# Multiplied by, since XLA may turn a division by a constant into this product.
_STEP = np.float32(1 / _LARGEST)


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of activations for a dtype of weights.

    It is bfloat16 for int8, and otherwise the same.
    """
    return np.dtype(jnp.bfloat16) if np.dtype(dtype) == INT8 else np.dtype(dtype)


def is_layer_matrix(path: str) -> bool:
    """Returns True for the path of a layer's matrix.

    The router is none of them.
    """
    parts = path.split("/")
    return (
        parts[0] in STACKS
        and "router" not in parts
        and (parts[-1] == "kernel" or "experts" in parts)
    )


def rescale(y: jax.Array, scale: ArrayLike) -> jax.Array:
    """Multiplies the product with an int8 matrix by its scales.

    Args:
        y: [..., out].
        scale: float32, [out] or one row for each of y.

    Returns:
        The product in the dtype of y.
    """
    scale = jnp.asarray(scale)
    scale = scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)
    return (y.astype(jnp.float32) * scale).astype(y.dtype)


def is_quantized(params: Params) -> bool:
    """Returns True if the matrices of a tree of parameters are int8."""
    return any(
        path_name(path).endswith(SCALE) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    )


def require_float(params: Params, user: str) -> None:
    """Raises UserError if the matrices of a tree of parameters are int8.

    Args:
        params: the parameters.
        user: the part of the program that needs other ones, for the message.
    """
    require(
        not is_quantized(params),
        f"{user} needs float32 or bfloat16 parameters, but the matrices of these are int8",
    )


def quantize(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds matrices to int8 on the host, one at a time.

    Args:
        matrices: [..., in, out], of any floating-point dtype.

    Returns:
        (int8 matrices in the same layout, float32 scales [..., out]). A channel of zeros has the
        scale 0. One with NaN or infinity has a scale that is not finite.
    """
    rounded = np.empty_like(matrices, np.int8)
    scales = np.empty((*matrices.shape[:-2], matrices.shape[-1]), np.float32)
    # Values that are not finite are found in the scales.
    with np.errstate(over="ignore", invalid="ignore"):
        for index in np.ndindex(*matrices.shape[:-2]):
            rounded[index], scales[index] = _round(np, matrices[index].astype(np.float32))
    return rounded, scales


def quantize_params(params: Params) -> dict[str, Any]:
    """Rounds the matrices of all layers to int8, on their devices.

    Args:
        params: the parameters, arrays or jax.ShapeDtypeStruct under `jax.eval_shape`.

    Returns:
        The tree with int8 matrices and their scales. It equals that of `quantize` if the devices
        divide exactly.
    """
    leaves = {}
    for path, x in flatten_dict(params, sep="/").items():
        leaves[path] = x
        if is_layer_matrix(path):
            leaves[path], leaves[path + SCALE] = _round(jnp, x.astype(jnp.float32))
    return unflatten_dict(leaves, sep="/")


def _round(xp: ModuleType, w: Any) -> tuple[Any, Any]:
    """Rounds float32 matrices to int8, by the largest value of each column."""
    scale = xp.abs(w).max(axis=-2) * _STEP
    divisor = xp.where(scale > 0, scale, xp.ones_like(scale))[..., None, :]
    rounded = xp.clip(xp.rint(w / divisor), -_LARGEST, _LARGEST)
    return rounded.astype(xp.int8), scale
