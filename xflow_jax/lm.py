"""A language model ready for use: its module, parameters and tokenizer, loaded from wherever they are."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from xflow_jax.checkpoints import huggingface, orbax_checkpoint
from xflow_jax.errors import UserError
from xflow_jax.models import build, check_heads
from xflow_jax.parallel import batch_sharding, computation_scope, make_mesh, replicated
from xflow_jax.tokenizer import load_tokenizer
from xflow_jax.types import Backbone

TINY = Path(__file__).parent / "tiny"


# The bundled models: the one to use, and the one it was aligned from.
BUNDLED = {"tiny": TINY, "tiny-base": TINY.with_name("tiny_base")}


DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class LM:
    """A model with its parameters. tokenizer: None where its directory has none; mesh: None = one device.

    The three methods are jitted and compile once per shape. tokens: int [B, L]; mask: bool [B, L], True = real token,
    padding on the left; block_length: block-causal attention, the grid counting from each row's first real token.
    """

    model: Backbone
    config: Any
    params: dict[str, Any] = field(repr=False)
    tokenizer: Any = field(repr=False)
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None:
            check_heads(self.config, self.mesh)

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def dtype(self) -> np.dtype:
        """Of the computation and of the parameters."""
        return np.dtype(self.model.dtype)

    def logits(
        self, tokens: ArrayLike, mask: ArrayLike | None = None, block_length: int | None = None
    ) -> jax.Array:
        """tokens int [B, L] -> logits float32 [B, L, V], V = config.vocab_rows; UserError for an id out of range."""
        tokens = self._tokens(tokens)
        mask = self._mask(mask, tokens.shape)
        with self.scope():
            return _logits(self.model, self.params, tokens, mask, _checked(block_length))

    def embed(self, tokens: ArrayLike) -> jax.Array:
        """tokens int [B, L] -> their rows of the embedding table, [B, L, E] in the model's dtype."""
        tokens = self._tokens(tokens)
        with self.scope():
            return _embed(self.model, self.params, tokens)

    def logits_from_embeddings(
        self, x: ArrayLike, mask: ArrayLike | None = None, block_length: int | None = None
    ) -> jax.Array:
        """x [B, L, E], cast to the model's dtype -> logits float32 [B, L, V]."""
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        if x.ndim != 3 or x.shape[-1] != self.config.hidden_size:
            raise UserError(
                f"embeddings must be [B, L, {self.config.hidden_size}], not {list(x.shape)}"
            )
        x, mask = self._place(x), self._mask(mask, x.shape[:2])
        with self.scope():
            return _logits_from_embeddings(self.model, self.params, x, mask, _checked(block_length))

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which programs of this model run (`computation_scope`)."""
        return computation_scope(self.mesh, self.dtype)

    def _tokens(self, tokens: ArrayLike) -> jax.Array:
        # Ids that are on a device already are not fetched back for their range.
        host = not isinstance(tokens, jax.Array)
        tokens = np.asarray(tokens) if host else tokens
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(
                f"tokens must be integers [B, L], not {tokens.dtype} {list(tokens.shape)}"
            )
        if host and tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_rows:
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab_rows)][0]
            raise UserError(
                f"tokens hold the id {bad}; the vocabulary has ids 0 to {self.config.vocab_rows - 1}"
            )
        return self._place(tokens)

    def _mask(self, mask: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
        if mask is None:
            return None
        mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
        if mask.shape != shape:
            raise UserError(
                f"the mask must be {list(shape)} like the tokens, not {list(mask.shape)}"
            )
        return self._place(mask.astype(bool))

    def _place(self, x: Any) -> jax.Array:
        if self.mesh is None or isinstance(x, jax.core.Tracer):
            return jnp.asarray(x)
        sharding = batch_sharding(self.mesh)
        divides = x.shape[0] % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0
        return jax.device_put(x, sharding if divides else replicated(self.mesh))


@partial(jax.jit, static_argnames=("model", "block_length"))
def _logits(
    model: Backbone, params: Any, tokens: jax.Array, mask: Any, block_length: int | None
) -> jax.Array:
    return model.apply({"params": params}, tokens, mask, block_length).astype(jnp.float32)


@partial(jax.jit, static_argnames="model")
def _embed(model: Backbone, params: Any, tokens: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens, method="embed")


@partial(jax.jit, static_argnames=("model", "block_length"))
def _logits_from_embeddings(
    model: Backbone, params: Any, x: jax.Array, mask: Any, block_length: int | None
) -> jax.Array:
    hidden = model.apply({"params": params}, x, mask, block_length, method="hidden")
    return model.apply({"params": params}, hidden, method="head").astype(jnp.float32)


def _checked(block_length: int | None) -> int | None:
    if block_length is not None and block_length < 1:
        raise UserError(f"block_length must be at least 1, not {block_length}")
    return block_length


def find_model(path: str | Path) -> Path:
    """The directory of a model that `load` is given by this path or name."""
    return BUNDLED.get(str(path)) or huggingface.find_hf_directory(path)


def read_model_config(path: str | Path) -> tuple[Path, Any]:
    """(directory, configuration) of a model, without its parameters; UserError as `load`'s."""
    directory = find_model(path)
    if orbax_checkpoint.is_checkpoint(directory):
        return directory, orbax_checkpoint.abstract_model(
            directory, orbax_checkpoint.read_record(directory)
        )[0]
    return directory, huggingface.read_hf_config(directory)


def load(path: str | Path, dtype: Any = "float32", mesh: Mesh | str | None = None) -> LM:
    """The model in a directory of the Hugging Face format or a converted one, a bundled one by name ("tiny", or
    "tiny-base", before its alignment), or of the hub.

    dtype: float32 or bfloat16, of the computation and the parameters. mesh: of `sharding.make_mesh`, or its sizes like
    "1,8,1": each process reads its own shards; None = everything on the default device. Raises UserError for whatever
    is wrong with the directory, and where there is neither a directory nor a model of the hub that can be had.
    """
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}, but it must be {' or '.join(DTYPES)}")
    dtype = jnp.dtype(name)
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    directory = find_model(path)
    if directory in BUNDLED.values() and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"{directory}: the bundled model's weights are not there; install the package again, "
            "or make them with python -m train.pretrain configs/pretrain_tiny.toml"
        )
    read = (
        orbax_checkpoint.load_params
        if orbax_checkpoint.is_checkpoint(directory)
        else huggingface.read_hf_params
    )
    config, params = read(directory, dtype, mesh)
    return LM(
        build(config, dtype, param_dtype=dtype), config, params, load_tokenizer(directory), mesh
    )
