"""Supervised fine-tuning of masked diffusion models (Eq. 1), for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from xflow_jax.errors import require
from xflow_jax.models import make_head, shift_rows
from xflow_jax.training import losses
from xflow_jax.training.alignment import LossFn, model_variables
from xflow_jax.training.alignment_loss import chunked_cross_entropy
from xflow_jax.training.block_copies import block_hidden
from xflow_jax.training.config import TrainingConfig, check_block_length
from xflow_jax.training.gradients import mean_gradients
from xflow_jax.training.state import Batch, TrainState
from xflow_jax.types import Array, Backbone, Float, Int, Metrics, ModelConfig, Params

# (state, batch, key, base=None) -> (state, metrics)
SFTStep: TypeAlias = Callable[..., tuple[TrainState, Metrics]]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """The computation of a supervised fine-tuning. Lengths are in tokens.

    Attributes:
        lengths: lengths of the canvases, ascending. A batch gets the shortest one that holds its
            conversations with an EOS each, and there is one compilation for each length.
        block_length: positions of a block for block-causal models, 0 for the model's own.
        freeze_embedding: keep the embedding table constant.

    Raises:
        UserError: if a value is out of range, or if values do not fit each other.
    """

    lengths: tuple[int, ...] = (128, 256, 512)
    block_length: int = 0
    freeze_embedding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.lengths)
            and list(self.lengths) == sorted(set(self.lengths))
            and self.lengths[0] >= 2,
            f"lengths are {list(self.lengths)}, but they must be ascending and at least 2",
        )
        block = self.block_length
        require(block >= 0, f"block_length is {block}, but it must not be negative")


def find_block_length(model_config: ModelConfig, config: SFTConfig) -> int:
    """Returns the positions of a block, 0 for full attention.

    Args:
        model_config: configuration of the model.
        config: configuration of the fine-tuning.

    Raises:
        UserError: if the model has no blocks, or no length of them, or if a length is no whole
            number of blocks.
    """
    block = config.block_length
    if model_config.is_block_causal:
        block = block or model_config.default_block_length or 0
    check_block_length(model_config, block)
    for length in config.lengths if block else ():
        require(
            length % block == 0,
            f"the {length} of lengths is not a whole number of blocks of {block}",
        )
    return block


def make_sft_loss(model: Backbone, config: SFTConfig) -> LossFn:
    """Builds the loss of Eq. 1 at the positions of responses.

    A row is a prompt, a response and EOS tokens. Each response position is masked with probability
    sigma. The loss of a row is the sum of -log p / sigma over its masks, divided by the length of
    its response with the EOS tokens that count. That is the convention of LLaDA's own fine-tuning.

    Under full attention sigma belongs to a row. A block-causal model has one sigma for each block,
    and predicts it from the clean blocks before it, as in BD3-LM (arXiv:2503.09573). One pass over
    the noised row and the clean one computes all blocks (`block_copies_mask`).

    Args:
        model: the model.
        config: the configuration.

    Returns:
        loss(params, batch, key, base=None) -> (loss, metrics). The batch holds "tokens" int [B, L]
        and "response" bool [B, L], True at positions that are noised and count. With LoRA, `params`
        are the adapters and `base` the frozen parameters. Metrics are the loss, and the
        cross-entropy at all masks (masked_nll) and at those of other tokens than EOS (text_nll).
    """
    block_length = find_block_length(model.config, config)

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array, base: Params | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        variables = model_variables(model, config, params, base)
        tokens, response = batch["tokens"], batch["response"]
        masked, sigma = losses.draw_response_noise(key, response, block_length)
        noised = jnp.where(masked, model.config.mask_id, tokens)
        if block_length:
            x = model.apply(variables, noised, method="embed")
            blocks = jnp.arange(tokens.shape[1])[None, :] // block_length
            hidden = block_hidden(model, variables, x, tokens, blocks)
        else:
            hidden = full_hidden(model, variables, noised)
        head = make_head(variables["params"])
        nll = chunked_cross_entropy(hidden, head.kernel, tokens, head.bias, config.chunk)
        loss = losses.response_loss(nll, masked, sigma, response)
        return loss, {
            "loss": loss,
            "masked_nll": losses.masked_mean(nll, masked),
            "text_nll": losses.masked_mean(nll, masked & (tokens != model.config.eos_id)),
        }

    return loss_fn


def make_sft_step(
    model: Backbone, optimizer: optax.GradientTransformation, config: SFTConfig
) -> SFTStep:
    """Builds the step of a supervised fine-tuning.

    Args:
        model: the model.
        optimizer: the optimiser of the trained parameters.
        config: the configuration.

    Returns:
        step(state, batch, key, base=None) -> (state, metrics), with `batch` and `base` as in
        `make_sft_loss`. The step folds its number into the key, so one key serves a complete run.
        The gradients of the `accumulate` parts are averaged in float32 before the one update.
    """
    gradient = jax.grad(make_sft_loss(model, config), has_aux=True)

    def step(
        state: TrainState, batch: Batch, key: jax.Array, base: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        def grad_fn(
            params: Params, part: Batch, key: jax.Array
        ) -> tuple[Params, tuple[Metrics, tuple[()]]]:
            grads, metrics = gradient(params, part, key, base)
            return grads, (metrics, ())

        key = jax.random.fold_in(key, state.step)
        grads, (metrics, _) = mean_gradients(grad_fn, state.params, batch, key, config.accumulate)
        return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

    return step


def full_hidden(
    model: Backbone, variables: dict[str, Params], noised: Int[Array, "B L"]
) -> Float[Array, "B L E"]:
    """Computes the hidden states that predict each position, under full attention.

    Args:
        model: the model.
        variables: its variables.
        noised: prompts, and responses with masks. There is no padding.
    """
    x = model.apply(variables, noised, method="embed")
    hidden = model.apply(variables, x, method="hidden")
    return shift_rows(hidden, jnp.ones_like(noised, bool)) if model.config.logits_shift else hidden
