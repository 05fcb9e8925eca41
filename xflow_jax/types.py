"""Types at the borders: arrays, parameters, models and tokenizers.

Shapes in annotations are jaxtyping's, with the letters B batch, P prompt length, N response length,
L = P + N, E embedding, V vocabulary, H heads, K key/value heads, D head width, F MLP width,
X experts, T decoding steps, G group size. A single axis is written with a space in front: " N".
The tests check them at run time by jaxtyping's import hook. Without jaxtyping they mean nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

if sys.version_info >= (3, 12):
    from typing import Protocol, runtime_checkable
else:  # isinstance() of Python 3.11 computes properties, and mask_id may raise
    from typing_extensions import Protocol, runtime_checkable

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, PyTree
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Key, PyTree
    except ImportError:  # a bare JAX installation: annotations are never evaluated there

        class _Unchecked:
            def __class_getitem__(cls, item: object) -> type:
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
        mlp_dim: F. For a mixture of experts, the widest MLP that one token meets.
        num_dense_layers: number of layers, the first ones, without experts.
        dense_mlp_dim: width of the MLP of a dense layer.
        num_experts: X, experts of each other layer, or None if every layer is dense.
        num_experts_per_tok: experts that one token is sent to.
        moe_mlp_dim: width of the MLP of one expert.
        shared_mlp_dim: width of the MLP of all shared experts, 0 if there is none.
        tie_embeddings: True if the embedding table is the head.
        head_bias: True if the logits have biases.
        rms_norm_eps: added to the mean square of a norm.
        rope_theta: base of the rotary frequencies.
        rotary_dim: dims of a head, the first ones, that are rotated.
        rope_full_precision: True to rotate in float32, False in the dtype of the computation.
        norm_full_precision: True if norms multiply by their scale in float32.
        vocab_size: number of tokens.
        vocab_rows: V, rows of the embedding table and the head. Those from vocab_size on
            belong to no token.
        max_length: positions that the model was made for.
        mask_id, eos_id, pad_id: ids of the special tokens.
        stop_ids: ids that end a text, EOS first.
        stop_token_names: names in the family's tokenizers of tokens that end a text.
        chat_template: template of the family's chats, for a tokenizer that has none, or None.
        given_mask_id: the mask token as the configuration has it, or None if only a
            tokenizer names it.
        mask_token_names: names of the mask token in the family's tokenizers.
        logits_shift: True if the logits of a position predict the next one.
        is_block_causal: True if a position attends to its own block and earlier ones only.
        default_block_length: positions of a block, or None if the whole response is one block.

    `to_hf()` returns the dict of a config.json, `with_mask_id(id)` a copy with this mask token, and
    `with_stop_ids(ids)` one with further tokens that end a text.
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
    def num_dense_layers(self) -> int: ...
    @property
    def dense_mlp_dim(self) -> int: ...
    @property
    def num_experts(self) -> int | None: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def moe_mlp_dim(self) -> int: ...
    @property
    def shared_mlp_dim(self) -> int: ...
    @property
    def tie_embeddings(self) -> bool: ...
    @property
    def head_bias(self) -> bool: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rotary_dim(self) -> int: ...
    @property
    def rope_full_precision(self) -> bool: ...
    @property
    def norm_full_precision(self) -> bool: ...
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
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def stop_token_names(self) -> tuple[str, ...]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def given_mask_id(self) -> int | None: ...
    @property
    def mask_token_names(self) -> tuple[str, ...]: ...
    @property
    def logits_shift(self) -> bool: ...
    @property
    def is_block_causal(self) -> bool: ...
    @property
    def default_block_length(self) -> int | None: ...
    def to_hf(self) -> dict[str, Any]: ...
    def with_mask_id(self, mask_id: int) -> ModelConfig: ...
    def with_stop_ids(self, stop_ids: Collection[int]) -> ModelConfig: ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen model module, as functions of its parameters.

    `apply({"params": params}, ..., method=name)` calls one of
      embed(tokens [B, L]) -> x [B, L, E]
      hidden(x [B, L, E], mask, block_length, allowed, positions) -> h [B, L, E]
      hidden_cached(x [B, n, E], cache, start, mask, block_length, replace) -> (h [B, n, E], Cache)
      head(h [..., E]) -> logits [..., V]
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> DTypeLike: ...
    def apply(
        self, variables: Mapping[str, Any], *args: object, method: str | None = None
    ) -> Any: ...
    def init(self, rngs: jax.Array, *args: object) -> Any: ...
    def clone(self, *, param_dtype: DTypeLike) -> Backbone: ...
    def empty_cache(self, batch: int, positions: int) -> Cache: ...


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    if TYPE_CHECKING:  # isinstance() does not find attributes of __getattr__, as these are

        @property
        def eos_token_id(self) -> int | None: ...
        @property
        def pad_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> str | None: ...
    @property
    def name_or_path(self) -> str: ...
    def __call__(self, text: str) -> Mapping[str, list[int]]: ...
    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...
    def convert_tokens_to_ids(self, token: str) -> int: ...
    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        return_dict: bool,
    ) -> list[int]: ...


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
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def mesh(self) -> Mesh | None: ...
    def scope(self) -> contextlib.AbstractContextManager[None]: ...
