"""Language models: loading, and a class for model, parameters and tokenizer."""

from __future__ import annotations

import contextlib
import difflib
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from xflow_jax.checkpoints import (
    abstract_model,
    find_hf_directory,
    is_checkpoint,
    load_params,
    read_hf_config,
    read_hf_params,
    read_record,
    resolve_mask_id,
    resolve_stop_ids,
)
from xflow_jax.errors import UserError, describe
from xflow_jax.input_files import is_cloud, read_json_object, to_path
from xflow_jax.models import INT8, build, check_heads, compute_dtype, is_quantized
from xflow_jax.parallel import (
    batch_sharding,
    computation_scope,
    count_shards,
    find_devices,
    make_mesh,
    replicated,
)
from xflow_jax.tokenizer import load_tokenizer
from xflow_jax.types import Backbone, ModelConfig, Params, Tokenizer

# Bundled models: "tiny-base" is pretrained. "tiny" is aligned from it as in the paper, and then
# trained on the states of live decodes. "tiny-long" is block-causal and pretrained from "tiny-base"
# on longer programs. "tiny-squares" is pretrained on squares of digits.
BUNDLED = {
    "tiny": Path(__file__).parent / "tiny",
    "tiny-base": Path(__file__).parent / "tiny_base",
    "tiny-long": Path(__file__).parent / "tiny_long",
    "tiny-squares": Path(__file__).parent / "tiny_squares",
}
DTYPES = ("float32", "bfloat16", "int8")
DTYPE_CHOICE = "float32, bfloat16 or int8"


@dataclass(frozen=True, eq=False)
class LM:
    """A language model with its parameters and tokenizer.

    `logits`, `embed` and `logits_from_embeddings` are jitted and compile once per shape.

    Attributes:
        model: the backbone.
        config: its configuration.
        params: its parameters, a nested dict of arrays.
        tokenizer: the tokenizer, or None if the directory has none.
        mesh: mesh of the parameters, or None for one device.
        tasks: the only tasks that the model was trained for, as its provenance.json names them.
            Empty if it names none.
    """

    model: Backbone
    config: ModelConfig
    params: Params = field(repr=False)
    tokenizer: Tokenizer | None = field(repr=False)
    mesh: Mesh | None = None
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mesh is not None:
            check_heads(self.config, self.mesh)

    @property
    def family(self) -> str:
        """Name of the model's family."""
        return self.config.family

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the computation."""
        return np.dtype(self.model.dtype)

    @property
    def weight_dtype(self) -> np.dtype:
        """Dtype of the layers' matrices: int8 if they are quantised, otherwise `dtype`."""
        return INT8 if is_quantized(self.params) else self.dtype

    def logits(
        self, tokens: ArrayLike, mask: ArrayLike | None = None, block_length: int | None = None
    ) -> jax.Array:
        """Computes the logits of token ids.

        Args:
            tokens: token ids, int [B, L].
            mask: bool [B, L], True at real tokens, with padding on the left. None means no padding.
            block_length: positions of a block for block-causal attention, counted from the first
                real token of each row. None means full attention.

        Returns:
            Logits, float32 [B, L, V] with V = config.vocab_rows.

        Raises:
            UserError: for a wrong shape or dtype, or an id out of range.
        """
        with self.scope():
            tokens = self._check_tokens(tokens)
            mask = self._check_mask(mask, tokens.shape)
            return _logits(self.model, self.params, tokens, mask, _check_block_length(block_length))

    def embed(self, tokens: ArrayLike) -> jax.Array:
        """Looks up the embeddings of token ids.

        Args:
            tokens: token ids, int [B, L].

        Returns:
            Embeddings [B, L, E] in the dtype of the model.

        Raises:
            UserError: for a wrong shape or dtype, or an id out of range.
        """
        with self.scope():
            tokens = self._check_tokens(tokens)
            return _embed(self.model, self.params, tokens)

    def logits_from_embeddings(
        self, x: ArrayLike, mask: ArrayLike | None = None, block_length: int | None = None
    ) -> jax.Array:
        """Computes the logits of input embeddings.

        Args:
            x: embeddings [B, L, E]. They are cast to the dtype of the model.
            mask: as in `logits`.
            block_length: as in `logits`.

        Returns:
            Logits, float32 [B, L, V].

        Raises:
            UserError: for a wrong shape.
        """
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        if x.ndim != 3 or x.shape[-1] != self.config.hidden_size:
            raise UserError(
                f"embeddings must be [B, L, {self.config.hidden_size}], not {list(x.shape)}"
            )
        with self.scope():
            x, mask = self._place(x), self._check_mask(mask, x.shape[:2])
            return _logits_from_embeddings(
                self.model, self.params, x, mask, _check_block_length(block_length)
            )

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which programs of this model run (`computation_scope`)."""
        return computation_scope(self.mesh, self.dtype)

    def _check_tokens(self, tokens: ArrayLike) -> jax.Array:
        """Checks token ids and moves them to the mesh."""
        # Ids on a device are not fetched only to check their range.
        ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise UserError(f"tokens must be integers [B, L], not {ids.dtype} {list(ids.shape)}")
        rows = self.config.vocab_rows
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < rows:
            bad = ids[(ids < 0) | (ids >= rows)][0]
            raise UserError(f"tokens hold the id {bad}, but the vocabulary has ids 0 to {rows - 1}")
        return self._place(ids.astype(np.int32))

    def _check_mask(self, mask: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
        """Checks a mask and moves it to the mesh."""
        if mask is None:
            return None
        mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
        if mask.shape != shape:
            raise UserError(
                f"the mask must be {list(shape)} like the tokens, not {list(mask.shape)}"
            )
        return self._place(mask.astype(bool))

    def _place(self, x: jax.Array | np.ndarray) -> jax.Array:
        """Moves an array [B, ...] to the mesh, sharded if possible."""
        if self.mesh is None or isinstance(x, jax.core.Tracer):
            return jnp.asarray(x)
        divides = x.shape[0] % count_shards(self.mesh) == 0
        return jax.device_put(x, batch_sharding(self.mesh) if divides else replicated(self.mesh))


@partial(jax.jit, static_argnames=("model", "block_length"))
def _logits(
    model: Backbone,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array | None,
    block_length: int | None,
) -> jax.Array:
    return model.apply({"params": params}, tokens, mask, block_length).astype(jnp.float32)


@partial(jax.jit, static_argnames="model")
def _embed(model: Backbone, params: Params, tokens: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens, method="embed")


@partial(jax.jit, static_argnames=("model", "block_length"))
def _logits_from_embeddings(
    model: Backbone,
    params: Params,
    x: jax.Array,
    mask: jax.Array | None,
    block_length: int | None,
) -> jax.Array:
    hidden = model.apply({"params": params}, x, mask, block_length, method="hidden")
    return model.apply({"params": params}, hidden, method="head").astype(jnp.float32)


def _check_block_length(block_length: int | None) -> int | None:
    if block_length is not None and block_length < 1:
        raise UserError(f"block_length must be at least 1, not {block_length}")
    return block_length


def _find_model(path: str | Path) -> Path:
    """Returns the directory of a bundled, local or hub model."""
    name = str(path)
    if name in BUNDLED:
        return BUNDLED[name]
    near = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.7)
    if near and not is_cloud(name) and not to_path(name).exists():
        raise UserError(f"there is no model {name!r}. Did you mean {near[0]}?")
    return find_hf_directory(path)


def read_model_config(path: str | Path) -> tuple[Path, ModelConfig]:
    """Reads the configuration of a model without its parameters.

    Args:
        path: as in `load`.

    Returns:
        (directory, configuration).

    Raises:
        UserError: as `load`.
    """
    directory = _find_model(path)
    if is_checkpoint(directory):
        config = abstract_model(directory, read_record(directory))[0]
    else:
        config = read_hf_config(directory)
    return directory, resolve_stop_ids(resolve_mask_id(config, directory), directory)


def load(
    path: str | Path,
    dtype: DTypeLike = "float32",
    mesh: Mesh | str | None = None,
    mask_id: int | None = None,
) -> LM:
    """Loads a model.

    Args:
        path: a directory in the Hugging Face format, a directory made by `convert.from_hf`, the
            name of a bundled model ("tiny", "tiny-base" before its alignments, "tiny-long" for
            longer programs, or "tiny-squares" for squares of digits), or the name of a model on
            the hub.
        dtype: float32 or bfloat16, for the computation and the parameters. int8 rounds the matrices
            of the layers to int8 with a scale for each output channel, and the rest is bfloat16.
        mesh: a mesh made by `make_mesh`, or its sizes like "1,8,1". Each process reads its own
            shards. None places everything on the default device.
        mask_id: id of the mask token, for a model whose config.json lacks it. None: that of
            config.json, or else the added token of the tokenizer that has the family's name for it.

    Returns:
        The model.

    Raises:
        UserError: if the model is not found, damaged or not supported, or for another dtype.
    """
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}, but it must be {DTYPE_CHOICE}")
    dtype = jnp.dtype(name)
    find_devices()  # before a large file is read
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"the model must be a path or a name, not {describe(path)}")
    directory = _find_model(path)
    if directory in BUNDLED.values() and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"{directory}: the weights of the bundled model are missing. Install the package again."
        )
    read = load_params if is_checkpoint(directory) else read_hf_params
    config, params = read(directory, dtype, mesh)
    config = resolve_stop_ids(resolve_mask_id(config, directory, mask_id), directory)
    float_dtype = compute_dtype(dtype)
    model = build(config, float_dtype, param_dtype=float_dtype)
    tokenizer = load_tokenizer(directory, config.chat_template)
    return LM(model, config, params, tokenizer, mesh, read_tasks(directory))


def read_tasks(directory: Path) -> tuple[str, ...]:
    """Returns the tasks in the provenance.json of a model, if any.

    They are under `task` or `tasks`.
    """
    file = directory / "provenance.json"
    if not file.exists():
        return ()
    try:
        about = read_json_object(file)
    except UserError:  # a file of another program, which no result depends on
        return ()
    names = about.get("tasks", [about.get("task")])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)
