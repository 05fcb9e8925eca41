"""Configuration of Fast-dLLM v2, under the keys of its config.json.

The model is Qwen2 with block-causal attention. The logits of a position predict the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from xflow_jax.models.chat_templates import CHATML_WITH_SYSTEM
from xflow_jax.models.config_base import KeyTable
from xflow_jax.models.config_checks import check_positive
from xflow_jax.models.llama_config import FIXED, WINDOW_KEYS, LlamaConfig


@dataclass(frozen=True, kw_only=True)
class FastDLLMConfig(LlamaConfig):
    """Fast-dLLM v2's configuration: the keys of its config.json that the computation reads.

    Attributes:
        bd_size: positions of a block in training.
    """

    bd_size: int = 32

    family: ClassVar[str] = "fast_dllm"
    is_block_causal: ClassVar[bool] = True
    logits_shift: ClassVar[bool] = True
    mask_token_names: ClassVar[tuple[str, ...]] = ("|<MASK>|",)
    chat_template: ClassVar[str | None] = CHATML_WITH_SYSTEM
    key_table: ClassVar[KeyTable] = KeyTable(
        FIXED,
        {"architectures": ("Fast_dLLM_QwenForCausalLM",), "layer_types": ("full_attention",)},
        WINDOW_KEYS,
    )
    template: ClassVar[dict[str, Any]] = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "model_type": "Fast_dLLM_Qwen",
        "hidden_act": "silu",
    }

    @property
    def qkv_bias(self) -> bool:
        """True: queries, keys and values have biases."""
        return True

    @property
    def default_block_length(self) -> int | None:
        """Positions of a block in training."""
        return self.bd_size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "bd_size")
