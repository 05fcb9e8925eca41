"""Configuration of Dream, Dream-Coder and DiffuCoder, under the keys of their config.json.

The model is Qwen2 without a causal mask. The logits of a position predict the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from xflow_jax.models.chat_templates import CHATML_WITH_SYSTEM
from xflow_jax.models.config_base import KeyTable
from xflow_jax.models.llama_config import FIXED, WINDOW_KEYS, LlamaConfig


@dataclass(frozen=True, kw_only=True)
class DreamConfig(LlamaConfig):
    """Dream's configuration: the keys of its config.json that the computation reads."""

    family: ClassVar[str] = "dream"
    stop_token_names: ClassVar[tuple[str, ...]] = ("<|im_end|>",)
    chat_template: ClassVar[str | None] = CHATML_WITH_SYSTEM
    logits_shift: ClassVar[bool] = True
    mask_token_names: ClassVar[tuple[str, ...]] = ("<|mask|>",)
    key_table: ClassVar[KeyTable] = KeyTable(
        FIXED,
        {"architectures": ("DreamModel",), "layer_types": ("full_attention",)},
        WINDOW_KEYS,
    )
    template: ClassVar[dict[str, Any]] = {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "hidden_act": "silu",
    }

    @property
    def qkv_bias(self) -> bool:
        """True: queries, keys and values have biases."""
        return True
