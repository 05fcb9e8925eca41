"""Shared helpers of the checkpoint tests: golden directories, edited copies, raw tensors."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from xflow_jax.models.config import LLaDAConfig
from xflow_jax.models.factory import abstract_params, build

GOLDEN = Path(__file__).parent / "goldens" / "llada_tiny"
GOLDEN2 = GOLDEN.with_name("llada2_tiny")
PREFIX = "model.transformer."
Q2 = PREFIX + "blocks.2.q_proj.weight"
TOY = LLaDAConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    vocab_size=40,
    mlp_hidden_size=48,
    mask_token_id=39,
    eos_token_id=1,
)


def tensors_of(directory):
    """Reads all tensors of a directory with the format's own library.

    Returns:
        name -> (dtype, shape, bytes).
    """
    found = {}
    for file in Path(directory).glob("*.safetensors"):
        for name, x in load_file(file).items():
            assert name not in found
            found[name] = (x.dtype, x.shape, x.tobytes())
    return found


def edited(folder, change=None, config=None, drop=(), golden=GOLDEN):
    """Copies a golden checkpoint to one file, after `change(tensors)` and with another config."""
    folder.mkdir()
    tensors = {
        name: x
        for file in sorted(golden.glob("*.safetensors"))
        for name, x in load_file(file).items()
    }
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    keys = json.loads((golden / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in keys.items() if key not in drop})
    )
    return folder


def random_params(config, seed=0):
    """Draws random parameters with NumPy, as JAX would compile a program for every shape."""
    rng = np.random.default_rng(seed)
    return jax.device_put(
        jax.tree.map(
            lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(build(config))
        )
    )
