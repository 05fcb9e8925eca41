"""Configuration of LLaDA-MoE, under the keys of its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from xflow_jax.errors import UserError, require
from xflow_jax.models.chat_templates import ROLES
from xflow_jax.models.config_base import (
    EndTokens,
    HfConfig,
    KeyTable,
    TransformersKeys,
    read_config,
    update_rope,
)
from xflow_jax.models.config_checks import (
    check_divides,
    check_not_negative,
    check_positive,
    check_token_ids,
)
from xflow_jax.toml_config import format_value, write_keys

# The class defaults of the original code are placeholders, so these keys must be there.
_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "num_experts",
    "num_experts_per_tok",
    "expert_intermediate_size",
    "eos_token_id",
)
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
}
_KEYS = KeyTable(
    _FIXED,
    {"architectures": ("LLaDAMoEModelLM",), "layer_types": ("full_attention",)},
    # The original code reads these and computes the same in any case: a softmax over all experts,
    # and the weights of the chosen ones as they are.
    frozenset(
        {"norm_topk_prob", "routed_scaling_factor", "router_num_group", "router_topk_group"}
        | {"moe_router_score_function", "max_window_layers", "sliding_window"}
    ),
)
_TEMPLATE: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "hidden_act": "silu",
}


@dataclass(frozen=True, kw_only=True)
class LLaDAMoEConfig(EndTokens, TransformersKeys, HfConfig):
    """LLaDA-MoE's configuration: the keys of its config.json that the computation reads.

    Attributes:
        mask_token_id: the mask token. The released config.json lacks it. The tokenizer has it.
        moe_layer_freq: 1 for each layer with experts, 0 for a dense one. None: all have experts.
        shared_expert_intermediate_size: width of the shared expert's MLP. None: there is none.
        clip_qkv: bound on queries, keys and values after the norm, or None.
        moe_router_enable_expert_bias: True if a bias is added to the experts' scores.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int
    expert_intermediate_size: int
    eos_token_id: int
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    num_key_value_heads: int | None = None
    dense_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    moe_layer_freq: tuple[int, ...] | None = None
    qk_layernorm: bool = True
    clip_qkv: float | None = None
    attention_bias: bool = False
    moe_router_enable_expert_bias: bool = False
    partial_rotary_factor: float = 1.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False

    family: ClassVar[str] = "lladamoe"
    stop_token_names: ClassVar[tuple[str, ...]] = ("<|role_end|>",)
    chat_template: ClassVar[str | None] = ROLES
    mask_token_names: ClassVar[tuple[str, ...]] = ("<|mask|>",)
    head_bias: ClassVar[bool] = False
    rope_full_precision: ClassVar[bool] = False
    is_block_causal: ClassVar[bool] = False
    softmax_router: ClassVar[bool] = True

    @property
    def num_dense_layers(self) -> int:
        """Number of layers, the first ones, that have no experts."""
        return 0 if self.moe_layer_freq is None else self.moe_layer_freq.count(0)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dims of a head, the first ones, that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def dense_mlp_dim(self) -> int:
        """Width of the MLP of a dense layer."""
        return self.dense_intermediate_size or 0

    @property
    def moe_mlp_dim(self) -> int:
        """Width of one expert's MLP."""
        return self.expert_intermediate_size

    @property
    def shared_mlp_dim(self) -> int:
        """Width of the MLP of the shared expert, or 0."""
        return self.shared_expert_intermediate_size or 0

    @property
    def mlp_dim(self) -> int:
        """Width of a dense MLP or of one token's experts, if larger."""
        dense = self.dense_mlp_dim if self.num_dense_layers else 0
        return max(dense, self.num_experts_per_tok * self.moe_mlp_dim)

    @property
    def use_qkv_bias(self) -> bool:
        """True if queries, keys and values have biases."""
        return self.attention_bias

    @property
    def use_bias(self) -> bool:
        """True if the output of attention has biases."""
        return self.attention_bias

    @property
    def use_qk_norm(self) -> bool:
        """True if each head's queries and keys are normalised."""
        return self.qk_layernorm

    @property
    def router_bias(self) -> bool:
        """True if a bias is added to the experts' scores."""
        return self.moe_router_enable_expert_bias

    @property
    def default_block_length(self) -> int | None:
        """None: the whole response is one block."""
        return None

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_positive(self, "vocab_size", "rope_theta", "rms_norm_eps", "max_position_embeddings")
        check_positive(self, "num_experts", "num_experts_per_tok", "expert_intermediate_size")
        check_not_negative(self, "num_key_value_heads", "shared_expert_intermediate_size")
        heads, k, experts = self.num_attention_heads, self.num_experts_per_tok, self.num_experts
        check_divides("num_attention_heads", heads, "hidden_size", self.hidden_size)
        check_divides("num_key_value_heads", self.num_kv_heads, "num_attention_heads", heads)
        require(
            0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"partial_rotary_factor {self.partial_rotary_factor} of {self.head_dim} dims is "
            f"{self.rotary_dim}, but it must be an even number of at least 2, and not exceed "
            "the head",
        )
        require(k <= experts, f"num_experts_per_tok is {k}, but there are {experts} experts")
        require(self.clip_qkv is None or self.clip_qkv > 0, "clip_qkv must be positive or null")
        self._check_layers()
        check_token_ids(self, self.vocab_rows)

    def _check_layers(self) -> None:
        if (kinds := self.moe_layer_freq) is None:
            return
        require(
            len(kinds) == self.num_layers and set(kinds) <= {0, 1},
            f"moe_layer_freq must have a 0 or 1 for each of the {self.num_layers} layers",
        )
        require(
            list(kinds) == sorted(kinds) and kinds[-1] == 1,
            "moe_layer_freq has a dense layer behind one with experts, which is not implemented",
        )
        if self.num_dense_layers:
            check_positive(self, "dense_intermediate_size", reason="there are dense layers")

    @classmethod
    def from_hf(cls, hf: object, where: str = "config.json") -> LLaDAMoEConfig:
        """Reads the dict of a config.json.

        Args:
            hf: the dict.
            where: the file, for error messages.

        Returns:
            The configuration.

        Raises:
            UserError: if a key is missing, a value is impossible or of a wrong type, or a setting
                of the original code is not implemented.
        """
        if isinstance(hf, dict) and hf.get("d_model") is not None:
            raise UserError(
                f"{where}: d_model is a key of LLaDA-8B, but architectures or num_experts is that "
                "of LLaDA-MoE. Use the config.json that came with the weights."
            )
        if isinstance(hf, dict) and hf.get("shared_expert_intermediate_size") == -1:
            raise UserError(
                f"{where}: shared_expert_intermediate_size is -1, a placeholder. It must be "
                f"{format_value(None)} or the width of the shared expert."
            )
        return read_config(cls, hf, where, _REQUIRED, _KEYS)

    def to_hf(self) -> dict[str, Any]:
        """Returns the dict of a config.json, unknown keys of `from_hf` included."""
        hf = update_rope(write_keys(self, _TEMPLATE), self)
        kinds = hf.get("moe_layer_freq")
        return hf if kinds is None else hf | {"moe_layer_freq": list(kinds)}
