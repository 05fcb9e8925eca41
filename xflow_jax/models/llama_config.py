"""Configurations under the keys of Llama's config.json, which several families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from xflow_jax.errors import require
from xflow_jax.models.config_base import (
    DenseModel,
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
from xflow_jax.toml_config import write_keys

# What Llama's and Qwen's code computes, under keys that change something in other code.
FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (None, False),
    "clip_qkv": (None,),
    "num_experts": (None, 0),
    "quantization_config": (None,),
}
# Without effect, since no layer has a window.
WINDOW_KEYS = frozenset({"sliding_window", "max_window_layers"})
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "eos_token_id",
)


ConfigT = TypeVar("ConfigT", bound="LlamaConfig")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(EndTokens, TransformersKeys, DenseModel, HfConfig):
    """Base class of configurations with the keys of Llama.

    A family sets the class attributes, overrides defaults, and adds the keys that it has beside
    these. The properties translate to the vocabulary of `xflow_jax.types.ModelConfig`.

    Attributes:
        head_dim: D. If 0 is passed, hidden_size / num_attention_heads.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    eos_token_id: int
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False

    family: ClassVar[str]
    key_table: ClassVar[KeyTable]
    template: ClassVar[dict[str, Any]]  # keys of a new config.json that are no fields

    head_bias: ClassVar[bool] = False
    rope_full_precision: ClassVar[bool] = False
    is_block_causal: ClassVar[bool] = False

    @property
    def qkv_bias(self) -> bool:
        """True if queries, keys and values have biases."""
        return False

    @property
    def attn_out_bias(self) -> bool:
        """True if the output of attention has biases."""
        return False

    @property
    def mlp_bias(self) -> bool:
        """True if the MLP's matrices have biases."""
        return False

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that are rotated: all."""
        return self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP."""
        return self.intermediate_size

    @property
    def default_block_length(self) -> int | None:
        """None: the whole response is one block."""
        return None

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "intermediate_size", "num_hidden_layers")
        check_positive(self, "num_attention_heads", "vocab_size", "rms_norm_eps", "rope_theta")
        check_positive(self, "max_position_embeddings")
        check_not_negative(self, "num_key_value_heads")
        heads = self.num_attention_heads
        check_divides("num_key_value_heads", self.num_kv_heads, "num_attention_heads", heads)
        if not self.head_dim:
            check_divides("num_attention_heads", heads, "hidden_size", self.hidden_size)
            object.__setattr__(self, "head_dim", self.hidden_size // heads)  # frozen dataclass
        require(
            self.head_dim > 0 and self.head_dim % 2 == 0,
            f"the width of a head is {self.head_dim}, but rotary positions need an even number",
        )
        check_token_ids(self, self.vocab_rows)

    @classmethod
    def from_hf(cls: type[ConfigT], hf: object, where: str = "config.json") -> ConfigT:
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
        return read_config(cls, hf, where, REQUIRED, cls.key_table)

    def to_hf(self) -> dict[str, Any]:
        """Returns the dict of a config.json, unknown keys of `from_hf` included."""
        return update_rope(write_keys(self, self.template), self)
