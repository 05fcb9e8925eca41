"""Training steps: pure functions of a state, a batch and a key, to be jitted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from xflow_jax import losses
from xflow_jax.models import abstract_params
from xflow_jax.policy import Policy
from xflow_jax.rollout import Rollout

if TYPE_CHECKING:
    from flax import linen as nn

    from xflow_jax.alignment import AlignSettings

Params = Any
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """What a run is, apart from its data: the step it is at, its parameters and its optimiser's state."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def update(self, grads: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state after a step along `grads`."""
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        return TrainState(self.step + 1, optax.apply_updates(self.params, updates), opt_state)


def response_logits(model: nn.Module, params: Params, tokens: jax.Array, mask: jax.Array, prompt: int) -> jax.Array:
    """tokens int [B, L], mask bool [B, L] (False = padding) -> logits [B, N, V]; the head skips the prompt."""
    x = model.apply({"params": params}, tokens, method="embed")
    hidden = model.apply({"params": params}, x, mask, method="hidden")
    return model.apply({"params": params}, hidden[:, prompt:], method="head")


def make_pretrain_step(
    model: nn.Module, optimizer: optax.GradientTransformation, largest_sigma: optax.Schedule
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]:
    """The step of masked diffusion training (Eq. 1).

    batch: "prompt" int [B, P] and "prompt_mask" bool [B, P] (left padding False), "response" int [B, N]. The key is
    folded with the state's step, so one key serves a whole run. largest_sigma: step -> the upper end of the masking
    ratio, 1 for Eq. 1 as it stands, less at first as a curriculum.
    """

    def loss_fn(params: Params, batch: dict[str, jax.Array], key: jax.Array, largest: jax.Array):
        ratio_key, mask_key = jax.random.split(key)
        prompt, response = batch["prompt"], batch["response"]
        sigma = losses.mask_ratios(ratio_key, response.shape[0], largest)
        masked = losses.draw_masks(mask_key, sigma, response.shape[1])
        tokens = jnp.concatenate([prompt, jnp.where(masked, model.config.mask_id, response)], axis=1)
        mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(masked)], axis=1)
        nll = losses.cross_entropy(response_logits(model, params, tokens, mask, prompt.shape[1]), response)
        loss = losses.diffusion_loss(nll, masked, sigma)
        return loss, {"loss": loss, "masked_nll": losses.masked_mean(nll, masked)}

    def step(state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> tuple[TrainState, Metrics]:
        largest = jnp.asarray(largest_sigma(state.step), jnp.float32)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, batch, jax.random.fold_in(key, state.step), largest
        )
        return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

    return step


def make_alignment_loss(model: nn.Module, config: AlignSettings) -> Callable[..., tuple[jax.Array, Metrics]]:
    """loss(params, batch, key, base=None) -> (loss, metrics): Eqs. 11, 12 on a batch as `make_pretrain_step` takes it.

    The loss is the mean over all response positions, masked and clean alike, with `clean_nll` times the cross-entropy
    of the clean ones. The metrics tell the two apart and give the cross-entropy at masked positions. base: with LoRA
    the frozen parameters, below which `params` are the adapters.
    With `block_length` one block of each row is noised and counted, and the blocks before it are clean, as a
    block-causal decode meets them.
    """

    def loss_fn(params: Params, batch: dict[str, jax.Array], key: jax.Array, base: Params | None = None):
        full = base if config.tune == "lora" else compute_copy(model, params)
        if config.freeze_embedding:
            full = {**full, "wte": jax.lax.stop_gradient(full["wte"])}
        ours = {"params": full, "lora": params} if config.tune == "lora" else {"params": full}
        prompt, response = batch["prompt"], batch["response"]
        masked, counted = _noise(key, batch, config.block_length)
        tokens = jnp.concatenate([prompt, jnp.where(masked, model.config.mask_id, response)], axis=1)
        mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(masked)], axis=1)

        x = model.apply(ours, tokens, method="embed")
        hidden = model.apply(ours, x, mask, config.block_length or None, method="hidden")[:, prompt.shape[1] :]
        kernel, bias = _head(full)
        error, nll = losses.alignment_errors(hidden, kernel, full["wte"]["embedding"], response, bias, config.chunk)
        clean = counted & ~masked
        loss = losses.masked_mean(error + config.clean_nll * jnp.where(clean, nll, 0.0), counted)
        return loss, {
            "loss": loss,
            "error_masked": losses.masked_mean(error, masked),
            "error_clean": losses.masked_mean(error, clean),
            "masked_nll": losses.masked_mean(nll, masked),
        }

    return loss_fn


def compute_copy(model: nn.Module, params: Params) -> Params:
    """Parameters in the dtypes that the model computes in: under fsdp half as many bytes travel then, as bfloat16."""
    wanted = abstract_params(model.clone(param_dtype=model.dtype))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), params, wanted)


def _head(params: Params) -> tuple[jax.Array, jax.Array | None]:
    """(kernel [E, V], bias [V] or None) of the head, which is the embedding table's where they are tied."""
    if "ff_out" in params:
        return params["ff_out"]["kernel"], params["ff_out"].get("bias")
    return params["wte"]["embedding"].T, None


def _noise(key: jax.Array, batch: dict[str, jax.Array], block_length: int) -> tuple[jax.Array, jax.Array]:
    """(masked, counted), bool [B, N]: where the mask token stands, and what the loss is averaged over."""
    b, n = batch["response"].shape
    ratio_key, mask_key, block_key = jax.random.split(key, 3)
    masked = losses.draw_masks(mask_key, losses.mask_ratios(ratio_key, b), n)
    if not block_length:
        return masked, jnp.ones_like(masked)
    # Blocks count from each row's own first token, so the first one may begin inside the prompt.
    start = jnp.sum(batch["prompt_mask"], axis=1, keepdims=True)
    block = (start + jnp.arange(n)[None]) // block_length
    first, last = block[:, :1], block[:, -1:]
    chosen = first + jnp.floor(jax.random.uniform(block_key, (b, 1)) * (last - first + 1)).astype(block.dtype)
    counted = block == chosen
    return masked & counted, counted


def make_align_step(
    model: nn.Module, optimizer: optax.GradientTransformation, config: AlignSettings
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step of x-prediction alignment: step(state, batch, key, base=None) -> (state, metrics).

    base as in `make_alignment_loss`. The batch is cut into `accumulate` equal parts, whose gradients are averaged in
    float32 before the one update.
    """
    grad_fn = jax.grad(make_alignment_loss(model, config), has_aux=True)
    count = config.accumulate

    def step(state: TrainState, batch: dict[str, jax.Array], key: jax.Array, base: Params | None = None):
        key = jax.random.fold_in(key, state.step)
        if count == 1:
            grads, metrics = grad_fn(state.params, batch, key, base)
            return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}
        # Part i has the rows i, i + count, ...: each of them is spread over the devices as the batch is.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)

        def visit(total: Params, part: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Params, Metrics]:
            grads, metrics = grad_fn(state.params, *part, base)
            return jax.tree.map(lambda t, g: t + g / count, total, grads), metrics

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        grads, metrics = jax.lax.scan(visit, zero, (parts, jax.random.split(key, count)))
        metrics = jax.tree.map(jnp.mean, metrics) | {"grad_norm": optax.tree.norm(grads)}
        return state.update(grads, optimizer), metrics

    return step


def make_policy_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    epsilon: float = 0.2,
    epochs: int = 1,
    per_position: bool = False,
    scale_rewards: str = "group",
) -> Callable[[TrainState, Rollout, jax.Array], tuple[TrainState, Metrics]]:
    """The step of GRPO on the step-size policy (Eq. 18): step(state, rollout, rewards) -> (state, metrics).

    policy: for its ranges; the parameters are the state's. rollout: of B prompts x G, the G of a prompt one after the
    other. rewards float32 [B, G, N]. epochs: updates made on the one batch. per_position, scale_rewards: as in
    losses.group_advantages.
    """

    def step(state: TrainState, rollout: Rollout, rewards: jax.Array) -> tuple[TrainState, Metrics]:
        advantages = losses.group_advantages(rewards, per_position, scale_rewards).reshape(-1, rewards.shape[-1])

        def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
            log_prob = policy.replace(params=params).log_prob(rollout.features, rollout.y)
            loss, metrics = losses.clipped_surrogate(log_prob, rollout.log_prob, advantages, rollout.acted, epsilon)
            # Of the behaviour, not of the update: an estimate from the actions themselves.
            entropy = -losses.masked_mean(log_prob, rollout.acted)
            return loss, metrics | {"loss": loss, "entropy": entropy}

        def update(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
            return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

        after, metrics = jax.lax.scan(update, state, None, length=epochs)
        return after.replace(step=state.step + 1), jax.tree.map(jnp.mean, metrics)

    return step
