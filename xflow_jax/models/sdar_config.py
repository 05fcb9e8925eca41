"""Configuration of SDAR and TraDo, under the keys of their config.json.

The model is Qwen3 with block-causal attention, in blocks of 4 to 64 positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from xflow_jax.models.chat_templates import CHATML
from xflow_jax.models.config_base import KeyTable
from xflow_jax.models.config_checks import check_positive
from xflow_jax.models.llama_config import FIXED, WINDOW_KEYS, LlamaConfig


@dataclass(frozen=True, kw_only=True)
class SDARConfig(LlamaConfig):
    """SDAR's configuration: the keys of its config.json that the computation reads.

    Attributes:
        block_size: positions of a block in training.
    """

    block_size: int = 4

    family: ClassVar[str] = "sdar"
    stop_token_names: ClassVar[tuple[str, ...]] = ("<|im_end|>",)
    chat_template: ClassVar[str | None] = CHATML
    is_block_causal: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = True
    norm_full_precision: ClassVar[bool] = True
    key_table: ClassVar[KeyTable] = KeyTable(
        {**FIXED, "attention_bias": (None, False)},
        {"architectures": ("SDARForCausalLM",), "layer_types": ("full_attention",)},
        # Of the original's training and kernels.
        WINDOW_KEYS | {"debug", "ep_size", "micro_forward", "skip_checkpoint", "use_deepep"},
    )
    template: ClassVar[dict[str, Any]] = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "hidden_act": "silu",
    }

    @property
    def default_block_length(self) -> int | None:
        """Positions of a block in training."""
        return self.block_size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "block_size")
