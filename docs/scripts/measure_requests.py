"""Measures how well a model reads the requests of microcode-long.

    python docs/scripts/measure_requests.py MODEL

Cross-entropy of answers in nats a token, behind the right request and behind that of another row:
under masks, of the first token after a clean beginning, and of all tokens behind clean copies.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import xflow_jax as xf
from xflow_jax.tasks import get_task
from xflow_jax.training import TaskPairs, cross_entropy, stack_examples
from xflow_jax.training.pretraining import block_logits, response_logits

ROWS, PROMPT, RESPONSE, SEED, MASKED = 128, 96, 128, 77, 0.8


def main(path: str) -> None:
    """Prints a line for each kind of request.

    Args:
        path: the model.
    """
    lm = xf.load(path)
    assert lm.tokenizer is not None
    source = TaskPairs(get_task("microcode-long"), SEED, lm.tokenizer, PROMPT, RESPONSE)
    batch = jax.tree.map(jnp.asarray, stack_examples([source[row] for row in range(ROWS)]))
    response, mask_id = batch["response"], lm.config.mask_id
    lengths = (np.asarray(response) != lm.config.eos_id).sum(axis=1)
    places, rng = np.arange(RESPONSE)[None], np.random.default_rng(0)
    begin = (rng.random(ROWS) * lengths).astype(int)
    some = rng.random(response.shape) < MASKED
    is_text = places < lengths[:, None]

    @jax.jit
    def whole(prompt: jax.Array, real: jax.Array, masked: jax.Array) -> jax.Array:
        tokens = jnp.concatenate([prompt, jnp.where(masked, mask_id, response)], axis=1)
        real = jnp.concatenate([real, jnp.ones_like(masked)], axis=1)
        logits = response_logits(lm.model, lm.params, tokens, real, PROMPT)
        return cross_entropy(logits, response)

    @jax.jit
    def copies(prompt: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = {"prompt": prompt, "prompt_mask": real, "response": response}
        blocks = jnp.broadcast_to(1 + jnp.asarray(places), response.shape)
        blocks = jnp.pad(blocks, ((0, 0), (PROMPT, 0)))  # a prompt is block 0
        logits = block_logits(lm.model, lm.params, rows, jnp.full_like(response, mask_id), blocks)
        return cross_entropy(logits, response), logits.argmax(axis=-1) == response

    for name, shift in (("right", 0), ("another's", 1)):
        request = [jnp.roll(batch[key], shift, axis=0) for key in ("prompt", "prompt_mask")]
        under_masks = np.asarray(whole(*request, jnp.asarray(some)))[some].mean()
        behind = np.asarray(whole(*request, jnp.asarray(places >= begin[:, None])))
        after = np.take_along_axis(behind, begin[:, None], axis=1).mean()
        nll, is_likeliest = (np.asarray(x) for x in copies(*request))
        answers = (is_likeliest | ~is_text).all(axis=1).mean()
        print(
            f"{name + ' request':<18} 80 % masks {under_masks:.2f}, next token {after:.2f}, "
            f"clean copies {nll[is_text].mean():.3f} ({100 * answers:.0f} % of answers likeliest)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="the model")
    main(parser.parse_args().model)
