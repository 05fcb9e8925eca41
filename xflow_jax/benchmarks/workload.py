"""Models with random weights and random prompts."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from xflow_jax.decoding import pad_prompts
from xflow_jax.errors import UserError
from xflow_jax.lm import DTYPE_CHOICE, DTYPES, LM, load
from xflow_jax.models import (
    PRESETS,
    SCALE,
    LLaDAConfig,
    abstract_weights,
    build,
    compute_dtype,
    init_params,
    quantize_params,
    shardings,
)
from xflow_jax.parallel import make_mesh
from xflow_jax.types import ModelConfig, Params

# A vocabulary as large as LLaDA's behind a backbone that a CPU can run: 97 M parameters.
MID = LLaDAConfig(
    d_model=320,
    n_layers=12,
    n_heads=5,
    mlp_hidden_size=960,
    vocab_size=126464,
    mask_token_id=126336,
    eos_token_id=126081,
    rope_theta=500000.0,
)
# A model for trials of a measurement: 9 M parameters.
SMALL = dataclasses.replace(
    MID,
    d_model=256,
    n_layers=6,
    n_heads=4,
    mlp_hidden_size=1024,
    vocab_size=4096,
    mask_token_id=4095,
    eos_token_id=4094,
)
# With random weights.
RANDOM_MODELS: dict[str, ModelConfig] = {**PRESETS, "mid": MID, "small": SMALL}


def load_or_make(name: str, dtype: str, mesh: str | None = None, mask_id: int | None = None) -> LM:
    """Loads a model, or makes one with random weights.

    Args:
        name: key of RANDOM_MODELS for random weights, or what `load` takes.
        dtype: float32, bfloat16 or int8, as in `load`.
        mesh: sizes of data, fsdp and tensor, like "1,8,1", or None for one device.
        mask_id: id of the mask token, as for `load`.

    Raises:
        UserError: as `load`.
    """
    if name not in RANDOM_MODELS:
        return load(name, dtype, mesh, mask_id)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, but it must be {DTYPE_CHOICE}")
    config = RANDOM_MODELS[name]
    float_dtype = compute_dtype(dtype)
    model = build(config, float_dtype, param_dtype=float_dtype)
    devices = make_mesh(mesh) if mesh else None
    placed = None
    if devices is not None:
        placed = shardings(abstract_weights(config, dtype), devices, config.family)

    def draw(key: jax.Array) -> Params:
        params = init_params(model, key)
        return quantize_params(params) if dtype == "int8" else params

    params = jax.jit(draw, out_shardings=placed)(jax.random.key(0))
    return LM(model, config, params, None, devices)


def random_prompts(
    lm: LM, batch: int, prompt_length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws prompts of equal length, always the same ones.

    Returns:
        Token ids int32 [B, P], mask bool [B, P], and a random key for each row.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(0, lm.config.vocab_size, (batch, prompt_length)).tolist()
    ids, mask = jax.device_put(pad_prompts(lm, rows))
    return ids, mask, jax.random.split(jax.random.key(0), batch)


def count_parameters(lm: LM) -> int:
    """Counts the parameters of a model, without the scales of int8."""
    leaves = flatten_dict(lm.params, sep="/")
    return sum(x.size for path, x in leaves.items() if not path.endswith(SCALE))
