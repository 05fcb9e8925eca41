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
from xflow_jax.training.block_copies import block_hidden
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
    blocks: Int[Array, "B L"],
    shared: int = 0,
) -> Float[Array, "B N V"]:
    """Computes the logits of noised responses, block by block.

    A block is predicted from the clean blocks before it. One pass over the noised response, the
    prompt and the clean response computes all blocks (block_copies.py).

    Args:
        model: the model, whose logits are not shifted.
        params: its parameters.
        batch: as in `make_pretrain_step`.
        noised: responses with masks.
        blocks: block number of each of the L = P + N positions.
        shared: most positions of a prompt in the block with which its response begins.
    """
    prompt, variables = batch["prompt"], {"params": params}
    end = prompt[:, prompt.shape[1] - shared :]
    x = model.apply(variables, jnp.concatenate([end, noised], axis=1), method="embed")
    tokens = jnp.concatenate([prompt, batch["response"]], axis=1)
    mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(noised, bool)], axis=1)
    hidden = block_hidden(model, variables, x, tokens, blocks, mask)
    return model.apply(variables, hidden[:, shared:], method="head")


def draw_blocks(
    key: Key[Array, ""], sizes: Int[Array, " B"], prompt_length: int, length: int
) -> Int[Array, "B L"]:
    """Draws a grid of blocks for each row, under full attention.

    Args:
        key: a random key.
        sizes: positions of a block of each row.
        prompt_length: P.
        length: N, positions of a response.

    Returns:
        Block number of each of the L = P + N positions. A prompt is block 0. The first block of a
        response may be shorter, so that blocks end anywhere.
    """
    first = jax.random.randint(key, sizes.shape, 0, sizes)
    blocks = 1 + (jnp.arange(length)[None, :] + first[:, None]) // sizes[:, None]
    return jnp.pad(blocks, ((0, 0), (prompt_length, 0)))


def count_blocks(
    sizes: Int[Array, " B"], prompt_mask: Bool[Array, "B P"], length: int
) -> Int[Array, "B L"]:
    """Counts the blocks of a block-causal model, from each row's first token.

    Args:
        sizes: positions of a block of each row.
        prompt_mask: False at padding.
        length: N, positions of a response.

    Returns:
        Block number of each of the L = P + N positions, 0 at padding.
    """
    padding = jnp.sum(~prompt_mask, axis=1, keepdims=True)
    places = jnp.arange(prompt_mask.shape[1] + length)[None, :] - padding
    return jnp.maximum(places, 0) // sizes[:, None]


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
        model: the model. If it is block-causal, blocks count from the first token of a row.
        block_lengths: positions of a block, for one row of the batch after another.

    Raises:
        UserError: if the model shifts its logits.
    """
    require(
        not model.config.logits_shift, "clean copies are for models whose logits are not shifted"
    )
    causal = model.config.is_block_causal

    def loss_fn(
        params: Params, batch: Batch, key: jax.Array, largest: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        ratio_key, mask_key, block_key = jax.random.split(key, 3)
        response, prompt_mask = batch["response"], batch["prompt_mask"]
        (rows, n), p = response.shape, prompt_mask.shape[1]
        sizes = jnp.resize(jnp.asarray(block_lengths), (rows,))
        if causal:
            blocks, shared = count_blocks(sizes, prompt_mask, n), min(max(block_lengths) - 1, p)
        else:
            blocks, shared = draw_blocks(block_key, sizes, p, n), 0
        sigma = jnp.where(sizes == 1, 1.0, losses.mask_ratios(ratio_key, rows, largest))
        masked = losses.draw_masks(mask_key, sigma, n)
        noised = jnp.where(masked, model.config.mask_id, response)
        logits = block_logits(model, params, batch, noised, blocks, shared)
        return _loss_of_masks(losses.cross_entropy(logits, response), masked, sigma)

    return loss_fn


def make_pretrain_loss(model: Backbone, block_lengths: Sequence[int] = ()) -> PretrainLoss:
    """Builds the loss of Eq. 1 that fits a model.

    Args:
        model: the model.
        block_lengths: blocks that are predicted behind clean copies, as in `make_block_loss`. If
            empty, those of a block-causal model, and masks anywhere in the response of another.
    """
    own = model.config.default_block_length
    if model.config.is_block_causal and own and not block_lengths:
        block_lengths = (own,)
    return make_block_loss(model, block_lengths) if block_lengths else make_response_loss(model)


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
        block_lengths: blocks that are predicted behind clean copies, as in `make_pretrain_loss`.

    Returns:
        step(state, batch, key) -> (state, metrics). The batch holds "prompt" int [B, P],
        "prompt_mask" bool [B, P], False at the padding on the left, and "response" int [B, N]. The
        step folds its number into the key, so one key serves a complete run.
    """
    loss_fn = make_pretrain_loss(model, block_lengths)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        largest = jnp.asarray(largest_sigma(state.step), jnp.float32)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, batch, jax.random.fold_in(key, state.step), largest
        )
        return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

    return step
