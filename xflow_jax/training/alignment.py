"""x-prediction alignment as one program: settings, what is trained, and the compiled step with all its shardings.

`train.align` runs what `align_program` returns, and `xflow plan` lowers the very same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from xflow_jax.errors import require
from xflow_jax.models import LoraConfig, abstract_params
from xflow_jax.training import alignment_loss, losses
from xflow_jax.training.optimizers import OptimizerConfig, Storage
from xflow_jax.training.state import Metrics, Params, TrainState
from xflow_jax.types import Backbone


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """What an alignment computes. Lengths are in tokens.

    tune: all parameters, or LoRA adapters beside them (`lora`), which are float32. storage: of trained parameters:
    float32, or bfloat16 with stochastic rounding or with Kahan's compensation; frozen ones are in `dtype`, which is
    also the computation's. accumulate: equal parts of a batch that pass one after the other. block_length: 0 for models
    of full attention, the block's for block-causal ones. clean_nll: how much of the cross-entropy at clean positions is
    added to the loss: where softmax gives the right token next to nothing, the squared error has next to no slope.
    chunk: vocabulary rows whose logits stand in memory at a time. remat: what the backward pass recomputes.
    """

    prompt_length: int = 40
    gen_length: int = 48
    block_length: int = 0
    batch_size: int = 64
    accumulate: int = 1
    steps: int = 200
    tune: Literal["all", "lora"] = "all"
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    storage: Storage = "float32"
    freeze_embedding: bool = True
    clean_nll: float = 0.0
    chunk: int = 4096
    remat: Literal["none", "dots", "full"] = "full"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_length", "gen_length", "batch_size", "accumulate", "steps", "chunk"):
            require(
                getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but it must be positive"
            )
        for name in ("block_length", "clean_nll"):
            require(
                getattr(self, name) >= 0,
                f"{name} is {getattr(self, name)}, but it must not be negative",
            )
        require(
            self.batch_size % self.accumulate == 0,
            f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}",
        )
        require(
            self.storage == "float32" or (self.dtype == "bfloat16" and self.tune == "all"),
            f'storage is "{self.storage}", which is for dtype = "bfloat16" and tune = "all"; use "float32"',
        )

    @property
    def kept(self) -> str:
        """The dtype in which the model's own parameters are kept."""
        return "float32" if self.tune == "all" and self.storage == "float32" else self.dtype


def make_alignment_loss(
    model: Backbone, config: AlignmentConfig
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """loss(params, batch, key, base=None) -> (loss, metrics): Eqs. 11, 12 on a batch as `make_pretrain_step` takes it.

    The loss is the mean over all response positions, masked and clean alike, with `clean_nll` times the cross-entropy
    of the clean ones. The metrics tell the two apart and give the cross-entropy at masked positions. base: with LoRA
    the frozen parameters, below which `params` are the adapters.
    With `block_length` one block of each row is noised and counted, and the blocks before it are clean, as a
    block-causal decode meets them.
    """

    def loss_fn(
        params: Params, batch: dict[str, jax.Array], key: jax.Array, base: Params | None = None
    ):
        full = base if config.tune == "lora" else compute_copy(model, params)
        if config.freeze_embedding:
            full = {**full, "wte": jax.lax.stop_gradient(full["wte"])}
        ours = {"params": full, "lora": params} if config.tune == "lora" else {"params": full}
        prompt, response = batch["prompt"], batch["response"]
        masked, counted = _noise(key, batch, config.block_length)
        tokens = jnp.concatenate(
            [prompt, jnp.where(masked, model.config.mask_id, response)], axis=1
        )
        mask = jnp.concatenate([batch["prompt_mask"], jnp.ones_like(masked)], axis=1)

        x = model.apply(ours, tokens, method="embed")
        hidden = model.apply(ours, x, mask, config.block_length or None, method="hidden")[
            :, prompt.shape[1] :
        ]
        kernel, bias = _head_parameters(full)
        error, nll = alignment_loss.alignment_errors(
            hidden, kernel, full["wte"]["embedding"], response, bias, config.chunk
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


def compute_copy(model: Backbone, params: Params) -> Params:
    """Parameters in the dtypes that the model computes in: under fsdp half as many bytes travel then, as bfloat16."""
    wanted = abstract_params(model.clone(param_dtype=model.dtype))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), params, wanted)


def _head_parameters(params: Params) -> tuple[jax.Array, jax.Array | None]:
    """(kernel [E, V], bias [V] or None) of the head, which is the embedding table's where they are tied."""
    if "ff_out" in params:
        return params["ff_out"]["kernel"], params["ff_out"].get("bias")
    return params["wte"]["embedding"].T, None


def _noise(
    key: jax.Array, batch: dict[str, jax.Array], block_length: int
) -> tuple[jax.Array, jax.Array]:
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
    chosen = first + jnp.floor(jax.random.uniform(block_key, (b, 1)) * (last - first + 1)).astype(
        block.dtype
    )
    counted = block == chosen
    return masked & counted, counted


def make_align_step(
    model: Backbone, optimizer: optax.GradientTransformation, config: AlignmentConfig
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step of x-prediction alignment: step(state, batch, key, base=None) -> (state, metrics).

    base as in `make_alignment_loss`. The batch is cut into `accumulate` equal parts, whose gradients are averaged in
    float32 before the one update.
    """
    grad_fn = jax.grad(make_alignment_loss(model, config), has_aux=True)
    count = config.accumulate

    def step(
        state: TrainState, batch: dict[str, jax.Array], key: jax.Array, base: Params | None = None
    ):
        key = jax.random.fold_in(key, state.step)
        if count == 1:
            grads, metrics = grad_fn(state.params, batch, key, base)
            return state.update(grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}
        # Part i has the rows i, i + count, ...: each of them is spread over the devices as the batch is.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch
        )

        def visit(
            total: Params, part: tuple[dict[str, jax.Array], jax.Array]
        ) -> tuple[Params, Metrics]:
            grads, metrics = grad_fn(state.params, *part, base)
            return jax.tree.map(lambda t, g: t + g / count, total, grads), metrics

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        grads, metrics = jax.lax.scan(visit, zero, (parts, jax.random.split(key, count)))
        metrics = jax.tree.map(jnp.mean, metrics) | {"grad_norm": optax.tree.norm(grads)}
        return state.update(grads, optimizer), metrics

    return step
