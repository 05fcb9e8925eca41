"""What several tests share: the golden model, a random one that compiles fast, and a stub whose numbers are ours."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xflow_jax.lm import BUNDLED, LM, load
from xflow_jax.models.config import LLaDAConfig
from xflow_jax.models.factory import build, init_params
from xflow_jax.models.logical_axes import shardings
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.parallel.partitioning import path_name
from xflow_jax.tokenizer import load_tokenizer

eight = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices, which conftest.py fakes"
)

TOKENIZER = load_tokenizer(BUNDLED["tiny"])
GOLDENS = Path(__file__).parent / "goldens"
TOY = LLaDAConfig(
    d_model=16,
    n_layers=2,
    n_heads=2,
    mlp_hidden_size=24,
    vocab_size=22,
    embedding_size=24,
    mask_token_id=20,
    eos_token_id=21,
    max_sequence_length=128,
    rope_theta=4.0,  # of four frequencies per head all should tell neighbours apart
)
# What random weights are multiplied with, so that positions and prompts matter and every rule has something to decide.
_SCALES = {
    "wte": 20,
    "blocks/q_proj": 24,
    "blocks/k_proj": 24,
    "blocks/v_proj": 12,
    "blocks/attn_out": 24,
}
_SCALES |= {"blocks/ff_proj": 16, "blocks/up_proj": 16, "blocks/ff_out": 32, "ff_out": 50}


@functools.cache
def llada_tiny() -> LM:
    """The golden checkpoint in float32, with its tokenizer."""
    return load(GOLDENS / "llada_tiny")


@functools.cache
def toy(mesh: str | None = None, **changes: Any) -> LM:
    """A random model of two layers and 24 rows, opinionated enough that every rule has something to decide."""
    config = dataclasses.replace(TOY, **changes)
    model = build(config)

    def scaled(path: Any, x: jax.Array) -> jax.Array:
        return x * _SCALES.get(path_name(path).rpartition("/")[0], 1)

    params = jax.tree_util.tree_map_with_path(scaled, init_params(model, jax.random.key(1)))
    if mesh is None:
        return LM(model, config, params, None)
    made = make_mesh(mesh)
    return LM(model, config, jax.device_put(params, shardings(params, made, "llada")), None, made)


def random_prompts(lengths: list[int], seed: int = 0, top: int = 20) -> list[list[int]]:
    """Prompts of these lengths, of ids below `top`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, top, n).tolist() for n in lengths]


@functools.cache
def decode_golden() -> dict[str, list[dict[str, Any]]]:
    """kind -> cases of decode_golden.json."""
    groups = json.loads((GOLDENS / "decode_golden.json").read_text())["groups"]
    return {group["kind"]: group["cases"] for group in groups}


@dataclasses.dataclass(frozen=True)
class Stub:
    """A model small enough to compute by hand or in NumPy: hidden = tanh(x A + mean of the real rows B + position C).

    It has the interface that decode.py uses, no more.
    """

    config: LLaDAConfig
    dtype: ClassVar[Any] = jnp.float32

    def apply(
        self, variables: Any, x: Any, mask: Any = None, block_length: Any = None, method: str = ""
    ) -> Any:
        p = variables["params"]
        if method == "embed":
            return p["wte"]["embedding"][x]
        return stub_hidden(jnp, p, x, mask)


def stub_hidden(np_: Any, p: Any, x: Any, mask: Any) -> Any:
    """x [B, L, E] -> [B, L, E], in the array library np_; positions count from the right, so padding moves nothing."""
    weight = mask[..., None].astype(x.dtype)
    mean = (x * weight).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
    place = np_.arange(x.shape[1])[::-1, None] * p["place"][None, :]
    return np_.tanh(x @ p["a"] + mean @ p["b"] + np_.sin(place)[None])


STUB = dataclasses.replace(TOY, vocab_size=10, embedding_size=11, mask_token_id=8, eos_token_id=9)


def stub(seed: int = 0, sharpness: float = 1.5, eos: float = 1.0) -> LM:
    """A language model around a `Stub` of ids 0 ... 9; eos: how much it likes to end."""
    params = stub_params(seed, 6, STUB.vocab_rows, sharpness)
    params["ff_out"]["kernel"][:, STUB.eos_id] *= eos
    return LM(Stub(STUB), STUB, jax.tree.map(jnp.asarray, params), None)


def stub_params(seed: int, width: int, rows: int, sharpness: float) -> dict[str, Any]:
    """Random float32 parameters of a `Stub`, as NumPy arrays."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "wte": {"embedding": normal(rows, width)},
        "a": normal(width, width),
        "b": normal(width, width) * 0.5,
        "place": normal(width),
        "ff_out": {"kernel": normal(width, rows) * np.float32(sharpness)},
    }


def tiny_lm(mesh: str | None = None):
    """A random model with microcode's tokenizer."""
    ids = {
        "mask_token_id": TOKENIZER.convert_tokens_to_ids("<|mdm_mask|>"),
        "eos_token_id": TOKENIZER.eos_token_id,
    }
    rows = -(-len(TOKENIZER) // 64) * 64
    lm = toy(mesh, vocab_size=len(TOKENIZER), embedding_size=rows, **ids)
    return dataclasses.replace(lm, tokenizer=TOKENIZER)
