"""Configuration that alignment and fine-tuning share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xflow_jax.errors import require
from xflow_jax.models import LoraConfig
from xflow_jax.training.optimizers import OptimizerConfig, Storage
from xflow_jax.types import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batches, trained parameters, optimiser and precision of a training.

    Attributes:
        batch_size: B, rows of a batch.
        accumulate: equal parts of a batch that are processed one after the other.
        steps: updates of the run.
        tune: train all parameters, or LoRA adapters, which are float32.
        lora: rank, strength and targets of the adapters.
        optimizer: the optimiser and its rate.
        storage: storage of trained parameters: float32, or bfloat16 with stochastic rounding or
            Kahan compensation. Frozen parameters are in `dtype`.
        freeze_embedding: keep the embedding table constant.
        chunk: vocabulary rows whose logits are in memory at a time.
        remat: activations that the backward pass recomputes.
        dtype: dtype of the computation.
        seed: seed of masks, adapters and stochastic rounding.

    Raises:
        UserError: if a value is out of range, or if values do not fit each other.
    """

    batch_size: int = 64
    accumulate: int = 1
    steps: int = 200
    tune: Literal["all", "lora"] = "all"
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    storage: Storage = "float32"
    freeze_embedding: bool = True
    chunk: int = 4096
    remat: Literal["none", "dots", "full"] = "full"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "steps", "chunk"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}, but it must be positive")
        require(
            self.batch_size % self.accumulate == 0,
            f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}",
        )
        require(
            self.storage == "float32" or (self.dtype == "bfloat16" and self.tune == "all"),
            f'storage is "{self.storage}", which is for dtype = "bfloat16" and tune = "all". '
            'Use "float32".',
        )

    @property
    def groups(self) -> int:
        """Groups of rows that have states of their own."""
        return 1

    @property
    def param_dtype(self) -> Literal["float32", "bfloat16"]:
        """Dtype in which the parameters of the model are stored."""
        return "float32" if self.tune == "all" and self.storage == "float32" else self.dtype


def check_block_length(model_config: ModelConfig, block_length: int, instead: str = "") -> None:
    """Checks that blocks are those of the model's attention.

    Args:
        model_config: configuration of the model.
        block_length: positions of a block, 0 for full attention.
        instead: a sentence for who gives blocks to a model with full attention.

    Raises:
        UserError: if only one of the two has blocks.
    """
    if model_config.is_block_causal:
        require(
            block_length > 0, "block_length is 0, but the model is block-causal: set block_length"
        )
    else:
        require(
            not block_length,
            f"block_length is {block_length}, but the model attends to all positions. Leave it out."
            + instead,
        )
