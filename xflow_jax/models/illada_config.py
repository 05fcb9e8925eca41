"""iLLaDA's configuration, under the keys of its config.json.

The model is Llama without a causal mask. Its tokenizer alone names the mask token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from xflow_jax.models.config_base import KeyTable
from xflow_jax.models.llama_config import FIXED, LlamaConfig

_NAMES: dict[str, Any] = {"architectures": ["ILLaDAForCausalLM"], "model_type": "illada"}


@dataclass(frozen=True, kw_only=True)
class ILLaDAConfig(LlamaConfig):
    """iLLaDA's configuration: the keys of its config.json that the computation reads.

    Attributes:
        mask_token_id: the mask token. The released config.json lacks it. The tokenizer has it.
        attention_bias: True if queries, keys, values and the output of attention have biases.
        mlp_bias: True if the MLP's matrices have biases.
    """

    attention_bias: bool = False
    mlp_bias: bool = False

    family: ClassVar[str] = "illada"
    mask_token_names: ClassVar[tuple[str, ...]] = ("<[MASK]>",)
    # A number for layer_norm_eps would mean LayerNorm.
    key_table: ClassVar[KeyTable] = KeyTable(
        {**FIXED, "layer_norm_eps": (None,)},
        {"architectures": ("ILLaDAForCausalLM",), "layer_types": ("full_attention",)},
    )
    template: ClassVar[dict[str, Any]] = {**_NAMES, "hidden_act": "silu"}

    @property
    def qkv_bias(self) -> bool:
        """True if queries, keys and values have biases."""
        return self.attention_bias

    @property
    def attn_out_bias(self) -> bool:
        """True if the output of attention has biases."""
        return self.attention_bias
