"""LLaDA's configuration, under the keys of its config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from xflow_jax.errors import require
from xflow_jax.models.config_base import (
    DenseModel,
    EndTokens,
    HfConfig,
    KeyTable,
    read_config,
    update_rope,
)
from xflow_jax.models.config_checks import check_divides, check_positive, check_token_ids
from xflow_jax.toml_config import format_value, write_keys

_REQUIRED = ("d_model", "n_layers", "n_heads", "vocab_size", "mask_token_id", "eos_token_id")
# Every key of LLaDA's ModelConfig is a field, fixed or ignored. Fixed keys change the computation
# or the names of the tensors.
_FIXED: dict[str, tuple[object, ...]] = {
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
    "partial_rotary_factor": (None, 1.0),
    "clip_qkv": (None,),
    "use_sliding_window": (None, False),
    "sliding_window": (None,),
    "quantization_config": (None,),
    # LLaDA-MoE has the same model_type.
    "num_experts": (None, 0),
    "qk_layernorm": (None, False),
}
_KEYS = KeyTable(
    _FIXED,
    {"architectures": ("LLaDAModelLM",), "layer_types": ("full_attention",)},
    # attention_layer_norm_with_affine and alibi_bias_max belong to settings that are fixed to off.
    # weight_tying takes the place of tie_word_embeddings.
    frozenset(
        {"alibi_bias_max", "attention_layer_norm_with_affine", "precision", "tie_word_embeddings"}
    ),
)
_TEMPLATE: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    **{key: choices[0] for key, choices in _FIXED.items() if choices[0] is not None},
}


@dataclass(frozen=True)
class LLaDAConfig(EndTokens, DenseModel, HfConfig):
    """LLaDA's configuration: the keys of its config.json that the computation reads.

    The properties translate them to the vocabulary of `xflow_jax.types.ModelConfig`.
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

    mask_token_names: ClassVar[tuple[str, ...]] = ("<|mdm_mask|>",)

    @property
    def family(self) -> str:
        """Name of the family."""
        return "llada"

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table and the head."""
        return self.vocab_size if self.embedding_size is None else self.embedding_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.d_model

    @property
    def max_length(self) -> int:
        """Positions that the model was made for."""
        return self.max_sequence_length

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.n_layers

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self.n_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        return 1 if self.multi_query_attention else self.n_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that are rotated: all."""
        return self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP."""
        if self.mlp_hidden_size is None:
            return self.mlp_ratio * self.d_model
        return self.mlp_hidden_size

    @property
    def qkv_bias(self) -> bool:
        """True if queries, keys and values have biases."""
        return self.include_bias or bool(self.include_qkv_bias)

    @property
    def attn_out_bias(self) -> bool:
        """True if the output of attention has biases."""
        return self.include_bias

    @property
    def mlp_bias(self) -> bool:
        """True if the MLP's matrices have biases."""
        return self.include_bias

    @property
    def head_bias(self) -> bool:
        """True if the logits have biases."""
        return self.include_bias

    @property
    def tie_embeddings(self) -> bool:
        """True if the embedding table is the head."""
        return self.weight_tying

    @property
    def is_block_causal(self) -> bool:
        """False: attention is bidirectional."""
        return False

    @property
    def default_block_length(self) -> None:
        """None: the whole response is one block."""
        return None

    def __post_init__(self) -> None:
        check_positive(self, "d_model", "n_layers", "n_heads", "vocab_size")
        check_positive(self, "max_sequence_length", "rope_theta", "rms_norm_eps")
        check_divides("n_heads", self.n_heads, "d_model", self.d_model)
        require(
            self.head_dim % 2 == 0,
            f"d_model / n_heads is {self.head_dim}, but rotary positions need an even number",
        )
        kv = self.num_kv_heads
        check_divides("n_kv_heads", kv, "n_heads", self.n_heads)
        require(
            self.multi_query_attention is None
            or self.multi_query_attention == (kv == 1)
            or self.n_heads == 1,
            f"multi_query_attention is {format_value(self.multi_query_attention)}, "
            f"but n_kv_heads is {kv}",
        )
        require(self.mlp_dim > 0, f"the MLP's width is {self.mlp_dim}, but it must be positive")
        require(
            self.vocab_rows >= self.vocab_size,
            f"embedding_size {self.embedding_size} is less than vocab_size {self.vocab_size}",
        )
        check_token_ids(self, self.vocab_rows)

    @classmethod
    def from_hf(cls, hf: object, where: str = "config.json") -> LLaDAConfig:
        """Reads the dict of a config.json.

        Args:
            hf: the dict.
            where: the file, for error messages.

        Returns:
            The configuration.

        Raises:
            UserError: if a key is missing, a value is impossible or of a wrong type, or a setting
                of LLaDA's code is not implemented.
        """
        table = _KEYS
        if isinstance(hf, dict) and hf.get("include_bias"):
            # Null means "as include_bias": the norms would have biases too.
            fixed = {**_FIXED, "bias_for_layer_norm": (False,)}
            table = dataclasses.replace(_KEYS, fixed=fixed)
        return read_config(cls, hf, where, _REQUIRED, table)

    def to_hf(self) -> dict[str, Any]:
        """Returns the dict of a config.json, unknown keys of `from_hf` included."""
        return update_rope(write_keys(self, _TEMPLATE), self)
