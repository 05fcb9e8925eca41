"""LLaDA2.0-style model from a LLaDA: `python -m train.upcycle tiny-base DIR`.

It is a start for training. All matrices are those of the LLaDA model. Each layer after the first
has its MLP several times, as experts of which two share each token, so the choice of the router
changes nothing yet (sparse upcycling, Komatsuzaki et al. 2023). The norms of queries and keys are
new, at the mean sizes of these, and so is the block-causal attention. Training has to compensate
for their effect.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from train.setup import export, run_program
from xflow_jax.checkpoints import refuse_existing
from xflow_jax.errors import UserError, check_seed, require
from xflow_jax.input_files import to_path
from xflow_jax.lm import load, read_model_config
from xflow_jax.models import LLaDA2Config, LLaDAConfig, build, init_params
from xflow_jax.types import Params

MOST_EXPERTS = 1024
USAGE = "python -m train.upcycle MODEL DIR [--experts X] [--seed N]"
# name in an expert -> name in the MLP
_EXPERT_KERNELS = {"gate": "ff_proj", "up": "up_proj", "down": "ff_out"}


def upcycle(
    params: Params, config: LLaDAConfig, experts: int, key: jax.Array
) -> tuple[dict[str, Any], LLaDA2Config]:
    """Converts LLaDA's parameters to LLaDA2.0's.

    Args:
        params: parameters of the LLaDA model, float32.
        config: its configuration.
        experts: X, experts of each layer but the first.
        key: a random key for the routers.

    Returns:
        (parameters, configuration) of the LLaDA2.0 model.

    Raises:
        UserError: if the model has biases or a tied head, which LLaDA2.0 has not, or if there are
            less than two layers or experts.
    """
    blocks = params["blocks"]
    require(
        "ff_out" in params and not any("bias" in leaf for leaf in blocks.values()),
        "the model has biases or a tied head, and a LLaDA2.0 of its weights would not",
    )
    require(
        config.n_layers >= 2 and experts >= 2,
        "it takes two layers at least, of which the first stays dense, and two experts",
    )
    made = _upcycled_config(config, experts)
    names = ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out")
    layers = {name: blocks[name] for name in names}
    layers |= query_norms(blocks, made.head_dim)
    mlp = {name: blocks[name] for name in ("ff_proj", "up_proj", "ff_out")}
    copies = {
        name: jnp.repeat(mlp[source]["kernel"][1:, None], experts, axis=1)
        for name, source in _EXPERT_KERNELS.items()
    }
    router = init_params(build(made), key)["blocks"]["router"]
    return {
        "wte": params["wte"],
        "dense": jax.tree.map(lambda x: x[:1], layers | mlp),
        "blocks": jax.tree.map(lambda x: x[1:], layers) | {"experts": copies, "router": router},
        "ln_f": params["ln_f"],
        "ff_out": params["ff_out"],
    }, made


def query_norms(blocks: Mapping[str, Params], head_dim: int) -> dict[str, dict[str, jax.Array]]:
    """Makes norms of queries and keys for layers without them.

    Args:
        blocks: parameters of the layers, of which the sizes of queries and keys are estimated.
        head_dim: D.

    Returns:
        The parameters of q_norm and k_norm, scales [layers, D].
    """
    norms = {}
    for name in ("q", "k"):
        # RMS of a query or key whose input has unit size, as the norm before it makes it.
        kernel = blocks[f"{name}_proj"]["kernel"] * blocks["attn_norm"]["scale"][:, :, None]
        size = jnp.sqrt(jnp.mean(jnp.sum(kernel**2, axis=1), axis=-1, keepdims=True))
        norms[f"{name}_norm"] = {"scale": jnp.broadcast_to(size, (len(kernel), head_dim))}
    return norms


def _upcycled_config(config: LLaDAConfig, experts: int) -> LLaDA2Config:
    """Returns the configuration of the LLaDA2.0 model."""
    return LLaDA2Config(
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.num_kv_heads,
        vocab_size=config.vocab_rows,
        pad_token_id=config.pad_id,
        eos_token_id=config.eos_id,
        mask_token_id=config.mask_id,
        intermediate_size=config.mlp_dim,
        first_k_dense_replace=1,
        num_experts=experts,
        num_experts_per_tok=2,  # the weights of two experts add up to 1, that of one need not
        moe_intermediate_size=config.mlp_dim,
        routed_scaling_factor=1.0,
        partial_rotary_factor=1.0,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_length,
    )


def main(model: str, rest: list[str]) -> None:
    """Runs the command.

    Args:
        model: directory or name of the LLaDA model.
        rest: the arguments after it (`USAGE`).

    Raises:
        UserError: for bad input.
    """
    parser = argparse.ArgumentParser(prog="python -m train.upcycle", usage=USAGE)
    parser.add_argument("out", help="directory to make, in the Hugging Face format")
    parser.add_argument(
        "--experts",
        type=int,
        default=4,
        metavar="X",
        help="experts of each layer but the first (default: 4)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the routers (default: 0)"
    )
    arguments = parser.parse_args(rest)
    refuse_existing(to_path(arguments.out))
    check_seed(arguments.seed, "--seed")
    require(arguments.experts <= MOST_EXPERTS, f"--experts must be at most {MOST_EXPERTS}")
    directory, config = read_model_config(model)
    if not isinstance(config, LLaDAConfig):
        raise UserError(
            f"{model} is of the family {config.family}, but upcycling starts from a LLaDA model"
        )
    params, made = upcycle(
        load(directory).params, config, arguments.experts, jax.random.key(arguments.seed)
    )
    made_by = {"command": "python -m train.upcycle", "model": model, **vars(arguments)}
    export(to_path(arguments.out), params, made, directory, made_by, "float32")


if __name__ == "__main__":
    run_program(main, USAGE)
