"""The models' configurations, under Hugging Face's own key names, and presets; `load_toml` is for the commands'."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from xflow_jax.errors import UserError, require
from xflow_jax.toml_config import format_value, read_keys, write_keys

# Keys that change LLaDA's computation or its tensor names and of which one setting is implemented: that setting first,
# then others that mean the same. An absent key means the first.
_LLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "alibi": (False,),
    "rope": (True,),
    "rope_scaling": (None,),
    "clip_qkv": (None,),
}


@dataclass(frozen=True)
class LLaDAConfig:
    """LLaDA's configuration: the keys of its config.json that the computation reads, with the values that stand there.

    `hf` holds the dict that the configuration was read from, as JSON, so that keys unknown to us survive `to_hf`.
    """

    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int | None = None
    n_kv_heads: int | None = None
    multi_query_attention: bool | None = None
    mlp_ratio: int = 4
    mlp_hidden_size: int | None = None
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 10000.0
    rope_full_precision: bool = True
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    include_bias: bool = False
    include_qkv_bias: bool | None = False
    hf: str = dataclasses.field(default="", repr=False)

    @property
    def family(self) -> str:
        return "llada"

    @property
    def mask_id(self) -> int:
        return self.mask_token_id

    @property
    def eos_id(self) -> int:
        return self.eos_token_id

    @property
    def pad_id(self) -> int:
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table and of the head; those from `vocab_size` on belong to no token."""
        return self.vocab_size if self.embedding_size is None else self.embedding_size

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def max_length(self) -> int:
        return self.max_sequence_length

    @property
    def num_layers(self) -> int:
        return self.n_layers

    @property
    def num_heads(self) -> int:
        return self.n_heads

    @property
    def is_block_causal(self) -> bool:
        return False

    @property
    def default_block_length(self) -> None:
        return None

    @property
    def num_kv_heads(self) -> int:
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        return 1 if self.multi_query_attention else self.n_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def mlp_dim(self) -> int:
        return (
            self.mlp_ratio * self.d_model if self.mlp_hidden_size is None else self.mlp_hidden_size
        )

    @property
    def qkv_bias(self) -> bool:
        return self.include_bias or bool(self.include_qkv_bias)

    def __post_init__(self) -> None:
        sizes = (
            "d_model",
            "n_layers",
            "n_heads",
            "vocab_size",
            "max_sequence_length",
            "rope_theta",
            "rms_norm_eps",
        )
        for key in sizes:
            require(
                getattr(self, key) > 0, f"{key} is {getattr(self, key)}, but it must be positive"
            )
        require(
            self.d_model % self.n_heads == 0,
            f"n_heads {self.n_heads} does not divide d_model {self.d_model}",
        )
        require(
            self.head_dim % 2 == 0,
            f"d_model / n_heads is {self.head_dim}, but rotary positions need it even",
        )
        kv = self.num_kv_heads
        require(
            kv > 0 and self.n_heads % kv == 0,
            f"n_kv_heads {kv} does not divide n_heads {self.n_heads}",
        )
        require(
            self.multi_query_attention is None
            or self.multi_query_attention == (kv == 1)
            or self.n_heads == 1,
            f"multi_query_attention is {format_value(self.multi_query_attention)}, but n_kv_heads is {kv}",
        )
        require(self.mlp_dim > 0, f"the MLP's width is {self.mlp_dim}, but it must be positive")
        require(
            self.vocab_rows >= self.vocab_size,
            f"embedding_size {self.embedding_size} is less than vocab_size {self.vocab_size}",
        )
        for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, key)
            require(
                value is None or 0 <= value < self.vocab_rows,
                f"{key} is {value}, but the ids go from 0 to {self.vocab_rows - 1}",
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> LLaDAConfig:
        """Reads the dict of a config.json; `where` names the file in errors.

        Raises UserError for a missing mask_token_id, a wrong type, and whatever LLaDA's code can do and ours cannot.
        """
        fixed = dict(_LLADA_FIXED)
        if isinstance(hf, dict) and hf.get("include_bias"):
            # Null means "as include_bias": the norms would have biases too.
            fixed["bias_for_layer_norm"] = (False,)
        return read_keys(
            cls, hf, where, ("d_model", "n_layers", "n_heads", "vocab_size", *_IDS), fixed
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict of a config.json; for one that was read with `from_hf`, exactly that, unknown keys included."""
        return write_keys(self, _LLADA_TEMPLATE)


_IDS = ("mask_token_id", "eos_token_id")


_LLADA_TEMPLATE: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    **{key: choices[0] for key, choices in _LLADA_FIXED.items() if choices[0] is not None},
}


_LLADA2_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid", None),
    "rope_scaling": (None, {"type": "default"}, {"rope_type": "default"}),
    "use_qk_norm": (True, None),
    "using_split_qkv_in_self_attention": (False,),
}


_RELEASED_ROWS, _RELEASED_MASK = 157184, 156895


@dataclass(frozen=True)
class LLaDA2Config:
    """LLaDA2.0's configuration: the keys of its config.json that the computation reads; see LLaDAConfig for `hf`.

    The released config.json names neither the mask nor the end token: the mask is known by the released vocabulary, or
    from a key mask_token_id, and the end is eos_token_id or else pad_token_id. num_experts None: every layer is dense.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    pad_token_id: int
    eos_token_id: int | None = None
    mask_token_id: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    num_experts: int | None = None
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None
    num_shared_experts: int | None = None
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 16384
    tie_word_embeddings: bool = False
    use_bias: bool = False
    use_qkv_bias: bool = False
    hf: str = dataclasses.field(default="", repr=False)

    @property
    def family(self) -> str:
        return "llada2"

    @property
    def mask_id(self) -> int:
        """Raises UserError where the configuration does not tell."""
        if self.mask_token_id is not None:
            return self.mask_token_id
        if self.vocab_size == _RELEASED_ROWS:
            return _RELEASED_MASK
        raise UserError("the model's configuration has no mask_token_id; add it to config.json")

    @property
    def eos_id(self) -> int:
        return self.pad_token_id if self.eos_token_id is None else self.eos_token_id

    @property
    def pad_id(self) -> int:
        return self.pad_token_id

    @property
    def vocab_rows(self) -> int:
        return self.vocab_size

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def num_layers(self) -> int:
        return self.num_hidden_layers

    @property
    def num_dense_layers(self) -> int:
        """How many of the layers, the first ones, have a dense MLP; the others have experts."""
        return (
            self.num_layers
            if self.num_experts is None
            else min(self.first_k_dense_replace, self.num_layers)
        )

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def num_heads(self) -> int:
        return self.num_attention_heads

    @property
    def mlp_dim(self) -> int:
        """F. In a sparse layer, the width of the experts that one token meets."""
        routed = self.num_experts_per_tok * (self.moe_intermediate_size or 0)
        return max(self.intermediate_size or 0, routed)

    @property
    def is_block_causal(self) -> bool:
        return True

    @property
    def default_block_length(self) -> int:
        return 32

    @property
    def rotary_dim(self) -> int:
        """How many dims of a head, the first ones, are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def shared_mlp_dim(self) -> int:
        """Width of the shared experts' one MLP; 0 = there is none."""
        return (self.moe_intermediate_size or 0) * (self.num_shared_experts or 0)

    def __post_init__(self) -> None:
        sizes = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "rope_theta",
            "rms_norm_eps",
        )
        for key in (*sizes, "max_position_embeddings", "routed_scaling_factor"):
            require(
                getattr(self, key) > 0, f"{key} is {getattr(self, key)}, but it must be positive"
            )
        for key in ("first_k_dense_replace", "num_shared_experts", "num_key_value_heads"):
            require(
                (getattr(self, key) or 0) >= 0,
                f"{key} is {getattr(self, key)}, but it must not be negative",
            )
        h, kv = self.num_attention_heads, self.num_kv_heads
        require(h % kv == 0, f"num_key_value_heads {kv} does not divide num_attention_heads {h}")
        if not self.head_dim:
            require(
                self.hidden_size % h == 0,
                f"num_attention_heads {h} does not divide hidden_size {self.hidden_size}, "
                "and there is no head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // h)
        require(
            0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"partial_rotary_factor {self.partial_rotary_factor} of {self.head_dim} dims is {self.rotary_dim}, "
            "but it must be an even number of them, and at least 2",
        )
        if self.num_dense_layers:
            self._positive("intermediate_size", "there are dense layers")
        if self.num_dense_layers < self.num_layers:
            self._check_experts()
        for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, key)
            require(
                value is None or 0 <= value < self.vocab_rows,
                f"{key} is {value}, but the ids go from 0 to {self.vocab_rows - 1}",
            )

    def _positive(self, key: str, why: str) -> None:
        value = getattr(self, key)
        require(
            (value or 0) > 0,
            f"{key} is {format_value(value)}, but it must be positive, since {why}",
        )

    def _check_experts(self) -> None:
        for key in (
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
        ):
            self._positive(key, "there are layers of experts")
        x, groups = self.num_experts, self.n_group
        require(x % groups == 0, f"n_group {groups} does not divide num_experts {x}")
        require(
            self.topk_group <= groups, f"topk_group {self.topk_group} is more than n_group {groups}"
        )
        room = self.topk_group * x // groups
        require(
            self.num_experts_per_tok <= room,
            f"num_experts_per_tok is {self.num_experts_per_tok}, but the groups that are kept hold {room} experts",
        )

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> LLaDA2Config:
        """Reads the dict of a config.json; `where` names the file in errors. Raises UserError as LLaDAConfig does."""
        required = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "pad_token_id",
        )
        if isinstance(hf, dict) and hf.get("num_experts") is not None:
            required += ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
        return read_keys(cls, hf, where, required, _LLADA2_FIXED)

    def to_hf(self) -> dict[str, Any]:
        """The dict of a config.json; for one that was read with `from_hf`, exactly that, unknown keys included."""
        return write_keys(self, _LLADA2_TEMPLATE)


_LLADA2_TEMPLATE: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    **{key: choices[0] for key, choices in _LLADA2_FIXED.items()},
}


# family by model_type; veomni is the same model with the weights of a layer's experts stacked
_FAMILIES: dict[str, type] = {
    "llada": LLaDAConfig,
    "llada2_moe": LLaDA2Config,
    "llada2_moe_veomni": LLaDA2Config,
}


def model_config(hf: dict[str, Any], where: str = "config.json") -> LLaDAConfig | LLaDA2Config:
    """The configuration of the family that `model_type` names; UserError where there is no such family."""
    kind = hf.get("model_type") if isinstance(hf, dict) else None
    if kind not in _FAMILIES:
        right = " or ".join(format_value(name) for name in _FAMILIES)
        raise UserError(
            f"{where}: model_type is {format_value(kind)}, which is not implemented; it must be {right}"
        )
    return _FAMILIES[kind].from_hf(hf, where)
