"""Reading and properties that the configurations of several families share."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from xflow_jax.errors import UserError
from xflow_jax.toml_config import format_value, read_keys
from xflow_jax.types import ModelConfig

if sys.version_info >= (3, 12):
    from typing import Protocol, runtime_checkable
else:  # as in types.py
    from typing_extensions import Protocol, runtime_checkable

ConfigT = TypeVar("ConfigT", bound="HfConfig")

# Keys of transformers, and of modelling code in general, that change no logits: names, training,
# initialisation, the original's own caches and kernels, and defaults of its text generation. The
# dtype is chosen when a model is loaded.
_IGNORED = """
    _name_or_path _attn_implementation _attn_implementation_autoset attn_implementation
    _commit_hash auto_map model_type name_or_path transformers_version dtype torch_dtype
    use_bfloat16 attention_dropout attn_pdrop embd_pdrop embedding_dropout hidden_dropout
    output_dropout
    resid_pdrop residual_dropout initializer_range init_cutoff_factor init_device init_fn init_std
    gradient_checkpointing chunk_size_feed_forward flash_attention fuse_cross_entropy torchscript
    use_cache tf_legacy_loss pruned_heads is_decoder is_encoder_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder output_attentions output_hidden_states
    output_router_logits output_scores return_dict return_dict_in_generate router_aux_loss_coef
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class
    prefix bos_token_id sep_token_id cls_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id bad_words_ids begin_suppress_tokens suppress_tokens max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    pretraining_tp num_return_sequences remove_invalid_values exponential_decay_length_penalty
"""
IGNORED = frozenset(_IGNORED.split())
# Keys that transformers 5 writes into a dict instead of the top level.
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")
_ROPE_DICTS = ("rope_parameters", "rope_scaling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfConfig:
    """A configuration with the dict of its config.json.

    Attributes:
        hf: the dict that the configuration was read from, as JSON. It keeps the keys that are no
            fields, for `to_hf`.
        more_stop_ids: tokens beside EOS that end a text. No key has them.
    """

    hf: str = dataclasses.field(default="", repr=False, metadata={"key": False})
    more_stop_ids: tuple[int, ...] = dataclasses.field(
        default=(), repr=False, metadata={"key": False}
    )

    stop_token_names: ClassVar[tuple[str, ...]] = ()
    mask_token_names: ClassVar[tuple[str, ...]] = ()
    chat_template: ClassVar[str | None] = None
    logits_shift: ClassVar[bool] = False
    norm_full_precision: ClassVar[bool] = False

    @property
    def given_mask_id(self) -> int | None:
        """Id of the mask token as the configuration has it, or None."""
        return getattr(self, "mask_token_id", None)

    @property
    def mask_id(self) -> int:
        """Id of the mask token.

        Raises:
            UserError: if there is none.
        """
        if (mask := self.given_mask_id) is not None:
            return mask
        names = " or ".join(self.mask_token_names)
        raise UserError(
            f"the model's configuration has no mask_token_id, and no tokenizer beside it {names}. "
            "Give --mask-id ID, or mask_id=ID to xflow_jax.load."
        )

    @property
    def eos_id(self) -> int:
        """Id of the end token, to be defined by the family."""
        raise NotImplementedError

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text: EOS, then the others."""
        return (self.eos_id, *self.more_stop_ids)

    def with_stop_ids(self: ConfigT, stop_ids: Collection[int]) -> ConfigT:
        """Returns the configuration with further tokens that end a text."""
        more = sorted({*stop_ids} - {self.eos_id})
        return dataclasses.replace(self, more_stop_ids=tuple(more))

    def with_mask_id(self: ConfigT, mask_id: int) -> ConfigT:
        """Returns the configuration with this mask token."""
        changes: dict[str, Any] = {"mask_token_id": mask_id}
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class KeyTable:
    """Keys of a family's config.json beside the fields of its configuration.

    A key that is in no part of the table is unknown, and a warning names it.

    Attributes:
        fixed: key -> the values that are implemented: the one that an absent key counts as, then
            others that mean the same.
        lists: key -> the words that its list may hold. An absent key is right.
        ignored: keys that change no logits, beside those of IGNORED.
    """

    fixed: Mapping[str, tuple[object, ...]]
    lists: Mapping[str, tuple[str, ...]]
    ignored: frozenset[str] = frozenset()


def read_config(
    cls: type[ConfigT],
    hf: object,
    where: str,
    required: tuple[str, ...],
    table: KeyTable,
) -> ConfigT:
    """Reads the dict of a config.json by the table of a family.

    Unknown keys are logged as a warning.

    Args:
        cls: the configuration of the family.
        hf: the dict.
        where: the file, for error messages.
        required: keys that must be there.
        table: meaning of the keys that are no fields.

    Returns:
        The configuration.

    Raises:
        UserError: if a key is missing, a value is impossible or of a wrong type, or a setting is
            not implemented.
    """
    if not isinstance(hf, dict):
        return read_keys(cls, hf, where, required, {})  # which raises
    for key, words in table.lists.items():
        value = hf.get(key)
        if value is not None and not (isinstance(value, list) and {*map(str, value)} <= {*words}):
            raise UserError(
                f"{where}: {key} is {format_value(value)}, which is not implemented. "
                f"It must be {format_value(list(words))}."
            )
    flat, ends = _flatten_rope(hf, where), hf.get("eos_token_id")
    more = ()
    if isinstance(ends, list) and ends and all(type(token) is int for token in ends):
        flat, more = flat | {"eos_token_id": ends[0]}, tuple(ends[1:])
    config = read_keys(cls, flat, where, required, table.fixed)
    fields = {f.name for f in dataclasses.fields(cls)} - {"hf"}
    known = fields | {*table.fixed, *table.lists, *table.ignored, *IGNORED, *_ROPE_DICTS}
    _warn_unknown(tuple(key for key, value in hf.items() if key not in known and value is not None))
    return dataclasses.replace(config, hf=json.dumps(hf)).with_stop_ids(more)


@functools.cache
def _warn_unknown(keys: tuple[str, ...]) -> None:
    """Logs a warning about unknown keys, once for the same keys."""
    if keys:
        logging.getLogger("xflow_jax").warning(
            "The model's config.json has unknown keys, which have no effect here: %s.",
            ", ".join(keys),
        )


def _flatten_rope(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Moves the rotary keys of rope_parameters and rope_scaling to the top level.

    Raises:
        UserError: for another type of rotary embedding, or two different values of a key.
    """
    flat = {key: value for key, value in hf.items() if key not in _ROPE_DICTS}
    for name in _ROPE_DICTS:
        rope = hf.get(name)
        if rope is None:
            continue
        is_default = (
            isinstance(rope, dict)
            and all(rope.get(key) in (None, "default") for key in ("type", "rope_type"))
            and not rope.keys() - {"type", "rope_type", *_ROPE_KEYS}
        )
        if not is_default:
            raise UserError(
                f"{where}: {name} is {format_value(rope)}, which is not implemented. "
                'It must be null or {"rope_type": "default"}, with rope_theta at most.'
            )
        for key in _ROPE_KEYS:
            inner, outer = rope.get(key), flat.get(key)
            if inner is not None and outer is not None and inner != outer:
                raise UserError(
                    f"{where}: {key} is {format_value(outer)}, but another place of the file has "
                    f"{format_value(inner)}. They must be equal."
                )
            if inner is not None:
                flat[key] = inner
    return flat


def update_rope(hf: dict[str, Any], config: object) -> dict[str, Any]:
    """Makes the rotary keys of a config.json agree with a configuration.

    Args:
        hf: the dict.
        config: the configuration.
    """
    updated = dict(hf)
    for name in _ROPE_DICTS:
        if isinstance(rope := hf.get(name), dict):
            changed = {k: getattr(config, k, v) for k, v in rope.items() if k in _ROPE_KEYS}
            if any(rope[key] != value for key, value in changed.items()):
                updated[name] = rope | changed
    return updated


@runtime_checkable
class DenseConfig(ModelConfig, Protocol):
    """Properties that the dense backbone reads, beside those of every model.

    Attributes:
        qkv_bias: True if queries, keys and values have biases.
        attn_out_bias: True if the output of attention has biases.
        mlp_bias: True if the MLP's matrices have biases.
        qk_norm: True if each head's queries and keys are normalised.
    """

    @property
    def qkv_bias(self) -> bool: ...
    @property
    def attn_out_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...


class EndTokens:
    """Ids of end and padding from the keys of transformers."""

    eos_token_id: int
    pad_token_id: int | None

    @property
    def eos_id(self) -> int:
        """Id of the end token."""
        return self.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id of the padding token: the end token's if there is none."""
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id


class TransformersKeys:
    """Sizes from the usual keys of transformers.

    A configuration names this class before `DenseModel`, whose properties it replaces.
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table and the head."""
        return self.vocab_size

    @property
    def max_length(self) -> int:
        """Positions that the model was made for."""
        return self.max_position_embeddings

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.num_hidden_layers

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def tie_embeddings(self) -> bool:
        """True if the embedding table is the head."""
        return self.tie_word_embeddings


class DenseModel:
    """Sizes of a model without experts, in the vocabulary of experts."""

    qk_norm: ClassVar[bool] = False

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP, to be defined by the family."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Number of layers, to be defined by the family."""
        raise NotImplementedError

    @property
    def num_dense_layers(self) -> int:
        """All layers."""
        return self.num_layers

    @property
    def dense_mlp_dim(self) -> int:
        """The MLP's only width."""
        return self.mlp_dim

    @property
    def num_experts(self) -> None:
        """None."""
        return None

    @property
    def num_experts_per_tok(self) -> int:
        """Zero."""
        return 0

    @property
    def moe_mlp_dim(self) -> int:
        """Zero."""
        return 0

    @property
    def shared_mlp_dim(self) -> int:
        """Zero."""
        return 0
