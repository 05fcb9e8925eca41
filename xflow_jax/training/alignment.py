"""Configuration of an alignment, and the loss of x-prediction alignment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from xflow_jax.errors import require
from xflow_jax.models import abstract_params, make_head, shift_rows
from xflow_jax.training import alignment_loss, losses
from xflow_jax.training.config import TrainingConfig
from xflow_jax.training.state import Batch
from xflow_jax.training.trajectory import TrajectoryConfig
from xflow_jax.types import Array, Backbone, Bool, Float, Key, Metrics, Params

# It also takes the frozen parameters `base` last, and does not need them without LoRA.
LossFn: TypeAlias = Callable[..., tuple[Float[Array, ""], Metrics]]


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(TrainingConfig):
    """The computation of an alignment. Lengths are in tokens.

    Attributes:
        prompt_length: P, to which prompts are padded.
        gen_length: N, positions of a response.
        block_length: positions of a block for block-causal models, 0 for full attention.
        states: states to train on: "masked" (Eq. 11, the paper's), or "trajectory", those of live
            decodes (training/trajectory.py).
        trajectory: makers of the states of live decodes.
        clean_nll: weight in the loss of the cross-entropy at clean positions. If softmax gives the
            right token almost no probability, the squared error has almost no slope. Of states =
            "masked" alone.

    Raises:
        UserError: if a value is out of range, or if values do not fit each other.
    """

    prompt_length: int = 40
    gen_length: int = 48
    block_length: int = 0
    states: Literal["masked", "trajectory"] = "masked"
    trajectory: TrajectoryConfig = TrajectoryConfig()
    clean_nll: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_length", "gen_length"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}, but it must be positive")
        for name in ("block_length", "clean_nll"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}, but it must not be negative")
        require(
            self.states == "masked" or not self.clean_nll,
            f'clean_nll is {self.clean_nll}, but states = "trajectory" has the cross-entropy at '
            "all positions. Set clean_nll = 0.",
        )
        require(
            self.batch_size // self.accumulate % self.groups == 0,
            f"the {self.groups} rules of the trajectories do not divide batch_size "
            f"{self.batch_size} in {self.accumulate} parts",
        )

    @property
    def groups(self) -> int:
        """Groups of rows that have states of their own."""
        return len(self.trajectory.rules) if self.states == "trajectory" else 1


def make_alignment_loss(model: Backbone, config: AlignmentConfig) -> LossFn:
    """Builds the loss of x-prediction alignment (Eqs. 11 and 12).

    The loss is the mean squared error over all response positions, masked and clean, plus
    `clean_nll` times the cross-entropy at clean ones. With `block_length`, one block of each row is
    masked and counts. The blocks before it are clean, as they are in a block-causal decode.

    Args:
        model: the model.
        config: the configuration.

    Returns:
        loss(params, batch, key, base=None) -> (loss, metrics), with a batch as in
        `make_pretrain_step`. With LoRA, `params` are the adapters and `base` the frozen parameters.
        Metrics are the errors at masked and at clean positions, and the cross-entropy at masked
        ones.
    """

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array, base: Params | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        variables = model_variables(model, config, params, base)
        response = batch["response"]
        masked, counted = draw_noise(key, batch, config.block_length)
        tokens = jnp.where(masked, model.config.mask_id, response)
        x = model.apply(variables, tokens, method="embed")
        hidden = response_hidden(model, variables, batch, x, config.block_length)
        head = make_head(variables["params"])
        table = variables["params"]["wte"]["embedding"]
        error, nll = alignment_loss.alignment_errors(
            hidden, head.kernel, table, response, head.bias, config.chunk
        )
        clean = counted & ~masked
        loss = losses.masked_mean(error + config.clean_nll * jnp.where(clean, nll, 0.0), counted)
        return loss, {
            "loss": loss,
            "error_masked": losses.masked_mean(error, masked),
            "error_clean": losses.masked_mean(error, clean),
            "masked_nll": losses.masked_mean(nll, masked),
        }

    return loss_fn


def response_hidden(
    model: Backbone,
    variables: dict[str, Params],
    batch: Batch,
    x: Float[Array, "B N E"],
    block_length: int,
) -> Float[Array, "B N E"]:
    """Computes the hidden states from which response positions are predicted.

    Args:
        model: the model.
        variables: its variables.
        batch: "prompt" int [B, P] and "prompt_mask" bool [B, P], False at padding.
        x: inputs of the response, of any float dtype.
        block_length: positions of a block for block-causal attention, 0 for full attention.

    Returns:
        The hidden states, moved to the positions that they predict.
    """
    prompt_x = model.apply(variables, batch["prompt"], method="embed")
    both = jnp.concatenate([prompt_x, x.astype(prompt_x.dtype)], axis=1)
    mask = jnp.concatenate([batch["prompt_mask"], jnp.ones(x.shape[:2], bool)], axis=1)
    hidden = model.apply(variables, both, mask, block_length or None, method="hidden")
    if model.config.logits_shift:
        hidden = shift_rows(hidden, mask)
    return hidden[:, prompt_x.shape[1] :]


def model_variables(
    model: Backbone, config: TrainingConfig, params: Params, base: Params | None
) -> dict[str, Params]:
    """Returns the variables of the model, with the adapters of LoRA.

    Args:
        model: the model.
        config: the configuration.
        params: the trained parameters, or the adapters with LoRA.
        base: the frozen parameters, with LoRA.

    Returns:
        The collections "params", in the dtypes of the computation, and with LoRA "lora".
    """
    full = compute_copy(model, params) if config.tune == "all" else base
    if full is None:
        raise ValueError("LoRA needs the frozen parameters `base`")
    if config.freeze_embedding:
        full = {**full, "wte": jax.lax.stop_gradient(full["wte"])}
    return {"params": full} if config.tune == "all" else {"params": full, "lora": params}


def compute_copy(model: Backbone, params: Params) -> Params:
    """Casts parameters to the dtypes in which the model computes.

    Under fsdp, a bfloat16 copy halves the number of bytes that are gathered.

    Args:
        model: the model.
        params: its parameters, in the dtypes of their storage.

    Returns:
        The parameters in the dtypes of the computation.
    """
    compute = abstract_params(model.clone(param_dtype=model.dtype))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), params, compute)


def draw_noise(
    key: Key[Array, ""], batch: Batch, block_length: int
) -> tuple[Bool[Array, "B N"], Bool[Array, "B N"]]:
    """Draws masked states (Eq. 11).

    Args:
        key: a random key.
        batch: requests and responses.
        block_length: positions of a block of which one is masked in each row, or 0.

    Returns:
        (masked, counted): mask tokens, and positions that count in the loss.
    """
    b, n = batch["response"].shape
    ratio_key, mask_key, block_key = jax.random.split(key, 3)
    masked = losses.draw_masks(mask_key, losses.mask_ratios(ratio_key, b), n)
    if not block_length:
        return masked, jnp.ones_like(masked)
    # Blocks count from the first token of each row, so the first one may begin inside the prompt.
    start = jnp.sum(batch["prompt_mask"], axis=1, keepdims=True)
    block = (start + jnp.arange(n)[None]) // block_length
    first, last = block[:, :1], block[:, -1:]
    offset = jnp.floor(jax.random.uniform(block_key, (b, 1)) * (last - first + 1))
    counted = block == first + offset.astype(block.dtype)
    return masked & counted, counted
