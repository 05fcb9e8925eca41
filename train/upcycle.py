"""A LLaDA2.0-style model out of a LLaDA, for training to start from: `python -m train.upcycle tiny-base DIR`.

All matrices are the model's. Each layer after the first has its MLP several times, as experts of which two share the
work on each token, so the router's choice changes nothing yet (sparse upcycling, Komatsuzaki et al. 2023). New are the
norms of queries and keys, at the sizes that these have on average, and the block-causal attention of LLaDA2.0: what
they change, training has to make up for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from train.setup import export, run_program
from xflow_jax.checkpoints import refuse_existing
from xflow_jax.errors import UserError
from xflow_jax.lm import load, read_model_config
from xflow_jax.models import LLaDA2Config, LLaDAConfig, build, init_params

USAGE = "python -m train.upcycle MODEL DIR [--experts X] [--seed N]"
_EXPERTS = {"gate": "ff_proj", "up": "up_proj", "down": "ff_out"}


def upcycle(
    params: Any, config: LLaDAConfig, experts: int, key: jax.Array
) -> tuple[Any, LLaDA2Config]:
    """LLaDA's parameters, float32 -> LLaDA2.0's, and their configuration; key: of the routers.

    Raises UserError where the model has what LLaDA2.0 of this kind has not: biases, or a tied head.
    """
    blocks = params["blocks"]
    if "ff_out" not in params or any("bias" in leaf for leaf in blocks.values()):
        raise UserError(
            "the model has biases or a tied head, and a LLaDA2.0 of its weights would not"
        )
    if config.n_layers < 2 or experts < 2:
        raise UserError(
            "it takes two layers at least, of which the first stays dense, and two experts"
        )
    made = LLaDA2Config(
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
        num_experts_per_tok=2,  # the shares of several add up to 1, that of one alone need not
        moe_intermediate_size=config.mlp_dim,
        routed_scaling_factor=1.0,
        partial_rotary_factor=1.0,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_length,
    )
    layers = {
        name: blocks[name]
        for name in ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out")
    }
    for name in ("q", "k"):
        # The root mean square of a query or key whose input has unit size, as the norm before makes it.
        kernel = blocks[f"{name}_proj"]["kernel"] * blocks["attn_norm"]["scale"][:, :, None]
        size = jnp.sqrt(jnp.mean(jnp.sum(kernel**2, axis=1), axis=-1, keepdims=True))
        layers[f"{name}_norm"] = {"scale": jnp.broadcast_to(size, (config.n_layers, made.head_dim))}
    mlp = {name: blocks[name] for name in ("ff_proj", "up_proj", "ff_out")}
    copies = {
        ours: jnp.repeat(mlp[its]["kernel"][1:, None], experts, axis=1)
        for ours, its in _EXPERTS.items()
    }
    router = init_params(build(made), key)["blocks"]["router"]
    return {
        "wte": params["wte"],
        "dense": jax.tree.map(lambda x: x[:1], layers | mlp),
        "blocks": jax.tree.map(lambda x: x[1:], layers) | {"experts": copies, "router": router},
        "ln_f": params["ln_f"],
        "ff_out": params["ff_out"],
    }, made


def main(model: str, rest: list[str]) -> None:
    """The command: a model's directory or name, then what `USAGE` says."""
    parser = argparse.ArgumentParser(prog="python -m train.upcycle MODEL")
    parser.add_argument("out", help="directory to make, in the Hugging Face format")
    parser.add_argument(
        "--experts",
        type=int,
        default=4,
        metavar="X",
        help="of each layer but the first (default: 4)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the routers (default: 0)"
    )
    arguments = parser.parse_args(rest)
    refuse_existing(Path(arguments.out))
    directory, config = read_model_config(model)
    if not isinstance(config, LLaDAConfig):
        raise UserError(
            f"{model} is of the family {config.family}, but this starts from a LLaDA model"
        )
    params, made = upcycle(
        load(directory).params, config, arguments.experts, jax.random.key(arguments.seed)
    )
    made_by = {"command": "python -m train.upcycle", "model": model, **vars(arguments)}
    export(Path(arguments.out), params, made, directory, made_by, "float32")


if __name__ == "__main__":
    run_program(main, USAGE)
