"""Types at the borders: parameters, arrays with shapes, and what decoding needs of a model.

Shapes in annotations are jaxtyping's, with the letters B batch, P prompt length, N response length,
L = P + N, E embedding, V vocabulary, H heads, K key/value heads, D head width, F MLP width,
X experts, T decoding steps, G group size. A single axis is written with a space in front: " N".
The tests check them at run time by jaxtyping's import hook. Without jaxtyping they mean nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, PyTree
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Key, PyTree
    except ImportError:  # a bare JAX installation: annotations are never evaluated there

        class _Unchecked:
            def __class_getitem__(cls, item: Any) -> type:
                return cls

        Array = jax.Array
        Bool = Float = Int = Key = PyTree = _Unchecked

__all__ = [
    "Array",
    "Backbone",
    "Bool",
    "Cache",
    "Float",
    "Int",
    "Key",
    "LanguageModel",
    "Metrics",
    "ModelConfig",
    "Params",
    "PyTree",
    "Tokenizer",
]

Params: TypeAlias = Mapping[str, Any]  # a nested dict of arrays
Metrics: TypeAlias = dict[str, jax.Array]  # scalars by name
# Stack of layers -> {"k", "v"}: [layers, B, M, K, D], the keys and values of M positions.
Cache: TypeAlias = dict[str, dict[str, jax.Array]]


@runtime_checkable
class ModelConfig(Protocol):
    """Properties of a model that code outside its family relies on.

    Attributes:
        family: name of the family. Only models/ and checkpoints/ compare it.
        hidden_size: E.
        num_layers: number of layers.
        num_heads: H, query heads.
        num_kv_heads: K, key/value heads.
        head_dim: D.
        mlp_dim: F. For a mixture of experts, the width that one token meets.
        vocab_size: number of tokens.
        vocab_rows: V, rows of the embedding table and the head. Those from vocab_size on
            belong to no token.
        max_length: positions that the model was made for.
        mask_id, eos_id, pad_id: ids of the special tokens.
        is_block_causal: True if a position attends to its own block and earlier ones only.
        default_block_length: positions of a block, or None if the whole response is one block.
    """

    @property
    def family(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def vocab_rows(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def is_block_causal(self) -> bool: ...
    @property
    def default_block_length(self) -> int | None: ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen model module, as functions of its parameters.

    `apply({"params": params}, ..., method=name)` calls one of
      embed(tokens [B, L]) -> x [B, L, E]
      hidden(x [B, L, E], mask, block_length, allowed) -> h [B, L, E]
      hidden_cached(x [B, n, E], cache, start, mask, block_length) -> (h [B, n, E], Cache)
      head(h [..., E]) -> logits [..., V]
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> DTypeLike: ...
    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any: ...
    def init(self, rngs: jax.Array, *args: Any, **kwargs: Any) -> Any: ...
    def clone(self, **updates: Any) -> Backbone: ...
    def empty_cache(self, batch: int, positions: int) -> Cache: ...


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    @property
    def eos_token_id(self) -> int | None: ...
    def __call__(self, text: str) -> Mapping[str, list[int]]: ...
    def __len__(self) -> int: ...
    def decode(self, ids: list[int]) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...
    def convert_tokens_to_ids(self, token: str) -> int: ...


@runtime_checkable
class LanguageModel(Protocol):
    """A model with its parameters, as `xflow_jax.load` returns it."""

    @property
    def model(self) -> Backbone: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> Params: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def mesh(self) -> Mesh | None: ...
    def scope(self) -> contextlib.AbstractContextManager[None]: ...
