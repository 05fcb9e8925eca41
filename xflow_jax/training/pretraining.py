"""The step of masked diffusion pretraining, with or without clean copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from xflow_jax.errors import require
from xflow_jax.models import shift_rows
from xflow_jax.training import losses
from xflow_jax.training.block_copies import block_copies_mask
from xflow_jax.training.state import Batch, TrainState, TrainStep
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Key, Metrics, Params

# (params, batch, key, largest masking ratio) -> (loss, metrics)
PretrainLoss: TypeAlias = Callable[[Params, Batch, jax.Array, jax.Array], tuple[jax.Array, Metrics]]


def response_logits(
    model: Backbone,
    params: Params,
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    prompt_length: int,
) -> Float[Array, "B N V"]:
    """Computes the logits of the response positions only.

    Args:
        model: the model.
        params: its parameters.
        tokens: prompts and responses.
        mask: False at padding.
        prompt_length: P, positions before the response.

    Returns:
        Logits of the N = L - P response positions.
    """
    x = model.apply({"params": params}, tokens, method="embed")
    hidden = model.apply({"params": params}, x, mask, method="hidden")
    if model.config.logits_shift:
        hidden = shift_rows(hidden, mask)
    return model.apply({"params": params}, hidden[:, prompt_length:], method="head")


def block_logits(
    model: Backbone,
    params: Params,
    batch: Batch,
    noised: Int[Array, "B N"],
    blocks: Int[Array, "B N"],
) -> Float[Array, "B N V"]:
    """Computes the logits of noised responses, block by block.

    A block is predicted from the prompt and the clean blocks before it. One pass over the noised
    response, the prompt and the clean response computes all blocks (block_copies.py).

    Args:
        model: the model, with full attention and no shift.
        params: its parameters.
        batch: as in `make_pretrain_step`.
        noised: responses with masks.
        blocks: block number of each position, from 1.
    """
    prompt, real = batch["prompt"], batch["prompt_mask"]
    n, p = noised.shape[1], prompt.shape[1]
    tokens = jnp.concatenate([noised, prompt, batch["response"]], axis=1)
    mask = jnp.pad(real, ((0, 0), (n, n)), constant_values=True)
    allowed = block_copies_mask(blocks, jnp.pad(blocks, ((0, 0), (p, 0))))  # a prompt is block 0
    positions = jnp.concatenate([p + jnp.arange(n), jnp.arange(p + n)])
    x = model.apply({"params": params}, tokens, method="embed")
    hidden = model.apply({"params": params}, x, mask, None, allowed, positions, method="hidden")
    return model.apply({"params": params}, hidden[:, :n], method="head")


def draw_blocks(
    key: Key[Array, ""], block_lengths: Sequence[int], rows: int, length: int
) -> tuple[Int[Array, " B"], Int[Array, "B N"]]:
    """Draws a grid of blocks for each row.

    Args:
        key: a random key.
        block_lengths: positions of a block, for one row after another.
        rows: B.
        length: N, positions of a response.

    Returns:
        (positions of a block of each row, block number of each position, from 1). The first block
        may be shorter, so that blocks end anywhere.
    """
    sizes = jnp.resize(jnp.asarray(block_lengths), (rows,))
    first = jax.random.randint(key, (rows,), 0, sizes)
    return sizes, 1 + (jnp.arange(length)[None, :] + first[:, None]) // sizes[:, None]


def _loss_of_masks(
    nll: Float[Array, "B N"], masked: Bool[Array, "B N"], sigma: Float[Array, " B"]
) -> tuple[jax.Array, Metrics]:
    """Returns the loss of Eq. 1 and its metrics."""
    loss = losses.diffusion_loss(nll, masked, sigma)
    return loss, {"loss": loss, "masked_nll": losses.masked_mean(nll, masked)}


def make_response_loss(model: Backbone) -> PretrainLoss:
    """Builds the loss of Eq. 1 at masks anywhere in a response.

    Args:
        model: the model.
    """

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array, largest: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        ratio_key, mask_key = jax.random.split(key)
        prompt, response = batch["prompt"], batch["response"]
        sigma = losses.mask_ratios(ratio_key, response.shape[0], largest)
        masked = losses.draw_masks(mask_key, sigma, response.shape[1])
        tokens = jnp.concatenate(
            [prompt, jnp.where(masked, model.config.mask_id, response)], axis=1
        )
        mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(masked)], axis=1)
        nll = losses.cross_entropy(
            response_logits(model, params, tokens, mask, prompt.shape[1]), response
        )
        return _loss_of_masks(nll, masked, sigma)

    return loss_fn


def make_block_loss(model: Backbone, block_lengths: Sequence[int]) -> PretrainLoss:
    """Builds the loss of Eq. 1 at the masks of all blocks.

    Each block stands behind the clean beginning of its response. A row with blocks of one position
    is masked everywhere, which is next-token prediction.

    Args:
        model: a model with full attention.
        block_lengths: positions of a block, for one row of the batch after another.

    Raises:
        UserError: if the model is block-causal or shifts its logits.
    """
    require(
        not model.config.is_block_causal and not model.config.logits_shift,
        "clean copies are for models with full attention whose logits are not shifted",
    )

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array, largest: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        ratio_key, mask_key, block_key = jax.random.split(key, 3)
        response = batch["response"]
        sizes, blocks = draw_blocks(block_key, block_lengths, *response.shape)
        sigma = jnp.where(sizes == 1, 1.0, losses.mask_ratios(ratio_key, len(response), largest))
        masked = losses.draw_masks(mask_key, sigma, response.shape[1])
        noised = jnp.where(masked, model.config.mask_id, response)
        nll = losses.cross_entropy(block_logits(model, params, batch, noised, blocks), response)
        return _loss_of_masks(nll, masked, sigma)

    return loss_fn


def make_pretrain_step(
    model: Backbone,
    optimizer: optax.GradientTransformation,
    largest_sigma: optax.Schedule,
    block_lengths: Sequence[int] = (),
) -> TrainStep:
    """Builds the step of masked diffusion training (Eq. 1).

    Args:
        model: the model.
        optimizer: the optimiser of its parameters.
        largest_sigma: step -> largest masking ratio. It is 1 for Eq. 1 itself, and lower at first
            in a curriculum.
        block_lengths: blocks that are predicted behind clean copies, as in `make_block_loss`, or
            empty for masks anywhere in the response.

    Returns:
        step(state, batch, key) -> (state, metrics). The batch holds "prompt" int [B, P],
        "prompt_mask" bool [B, P], False at the padding on the left, and "response" int [B, N]. The
        step folds its number into the key, so one key serves a complete run.
    """
    loss_fn = make_block_loss(model, block_lengths) if block_lengths else make_response_loss(model)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        largest = jnp.asarray(largest_sigma(state.step), jnp.float32)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, batch, jax.random.fold_in(key, state.step), largest
        )
        return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

    return step
