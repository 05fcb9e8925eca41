"""Shared models of the tests: golden ones, a random one that compiles fast, and a stub."""

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
    rope_theta=4.0,  # all four frequencies of a head then distinguish neighbours
)
# Factors of random weights, which make positions and prompts matter and the rules differ.
_SCALES = {
    "wte": 20,
    "blocks/q_proj": 24,
    "blocks/k_proj": 24,
    "blocks/v_proj": 12,
    "blocks/attn_out": 24,
}
_SCALES |= {"blocks/ff_proj": 16, "blocks/up_proj": 16, "blocks/ff_out": 32, "ff_out": 50}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an npz file, and closes it."""
    with np.load(path) as file:
        return dict(file)


@functools.cache
def llada_tiny() -> LM:
    """Loads the golden checkpoint in float32, with its tokenizer."""
    return load(GOLDENS / "llada_tiny")


@functools.cache
def toy(mesh: str | None = None, **changes: Any) -> LM:
    """Makes a random model of two layers and 24 rows, whose logits make the rules differ."""
    config = dataclasses.replace(TOY, **changes)
    model = build(config)

    def scaled(path: Any, x: jax.Array) -> jax.Array:
        return x * _SCALES.get(path_name(path).rpartition("/")[0], 1)

    params = jax.tree_util.tree_map_with_path(scaled, init_params(model, jax.random.key(1)))
    if mesh is None:
        return LM(model, config, params, None)
    devices = make_mesh(mesh)
    params = jax.device_put(params, shardings(params, devices, "llada"))
    return LM(model, config, params, None, devices)


@functools.partial(jax.jit, static_argnames=("model", "method", "block_length"))
def apply(model: Any, params: Any, *arguments: Any, **named: Any) -> Any:
    """Calls a module as one program. Outside of jit each of its operations would be compiled."""
    return model.apply({"params": params}, *arguments, **named)


def logits(
    config: Any, params: Any, tokens: Any = None, x: Any = None, dtype: Any = jnp.float32, **kw: Any
) -> Any:
    """Computes the logits of tokens or of embeddings, through embed, hidden and head."""
    model = build(config, dtype)
    x = apply(model, params, tokens, method="embed") if x is None else x
    return apply(model, params, apply(model, params, x, method="hidden", **kw), method="head")


def random_prompts(lengths: list[int], seed: int = 0, top: int = 20) -> list[list[int]]:
    """Draws prompts of these lengths, of ids below `top`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, top, n).tolist() for n in lengths]


@functools.cache
def decode_golden() -> dict[str, list[dict[str, Any]]]:
    """Reads the cases of decode_golden.json, by kind."""
    groups = json.loads((GOLDENS / "decode_golden.json").read_text())["groups"]
    return {group["kind"]: group["cases"] for group in groups}


@dataclasses.dataclass(frozen=True)
class Stub:
    """Model that is small enough to compute by hand or in NumPy.

    hidden = tanh(x A + mean of the real rows B + position C). It has only the interface that
    decode.py uses.
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

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def clone(self, **updates: Any) -> Stub:
        return dataclasses.replace(self, **updates)

    def empty_cache(self, batch: int, positions: int) -> Any:
        raise NotImplementedError


def stub_hidden(np_: Any, p: Any, x: Any, mask: Any) -> Any:
    """Computes hidden states [B, L, E] of x [B, L, E] with the array library np_.

    Positions count from the right, so that padding has no effect.
    """
    weight = mask[..., None].astype(x.dtype)
    mean = (x * weight).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
    place = np_.arange(x.shape[1])[::-1, None] * p["place"][None, :]
    return np_.tanh(x @ p["a"] + mean @ p["b"] + np_.sin(place)[None])


STUB = dataclasses.replace(TOY, vocab_size=10, embedding_size=11, mask_token_id=8, eos_token_id=9)


def stub(seed: int = 0, sharpness: float = 1.5, eos: float = 1.0) -> LM:
    """Makes a model around a `Stub` with ids 0 to 9. `eos` scales the logit of EOS."""
    params = stub_params(seed, 6, STUB.vocab_rows, sharpness)
    params["ff_out"]["kernel"][:, STUB.eos_id] *= eos
    return LM(Stub(STUB), STUB, jax.tree.map(jnp.asarray, params), None)


def stub_params(seed: int, width: int, rows: int, sharpness: float) -> dict[str, Any]:
    """Draws float32 parameters of a `Stub`, as NumPy arrays."""
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
    """Makes a random model with the tokenizer of microcode."""
    ids = {
        "mask_token_id": TOKENIZER.convert_tokens_to_ids("<|mdm_mask|>"),
        "eos_token_id": TOKENIZER.eos_token_id,
    }
    rows = -(-len(TOKENIZER) // 64) * 64
    lm = toy(mesh, vocab_size=len(TOKENIZER), embedding_size=rows, **ids)
    return dataclasses.replace(lm, tokenizer=TOKENIZER)
