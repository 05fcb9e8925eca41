"""Measures the likelihood of right answers that no training has seen.

    python docs/scripts/measure_likelihood.py MODEL... [--task microcode-long]

Eq. 1 in nats a token, which bounds the negative log-likelihood from above, and the cross-entropy
in nats at masked positions. A block-causal model predicts each block behind the clean ones before
it. All models get the same answers and masks.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import xflow_jax as xf
from xflow_jax.tasks import get_task
from xflow_jax.training import TaskPairs, stack_examples
from xflow_jax.training.pretraining import make_pretrain_loss

ROWS, BATCH, PROMPT, SEED = 1024, 32, 96, 77


def main(path: str, task_name: str) -> None:
    """Prints a line for a model.

    Args:
        path: the model.
        task_name: the task of the answers.
    """
    lm = xf.load(path)
    assert lm.tokenizer is not None
    task = get_task(task_name)
    source = TaskPairs(task, SEED, lm.tokenizer, PROMPT, task.config.gen_length)
    loss = jax.jit(make_pretrain_loss(lm.model))
    found = []
    for first in range(0, ROWS, BATCH):
        batch = stack_examples([source[row] for row in range(first, first + BATCH)])
        key = jax.random.fold_in(jax.random.key(0), first)
        _, metrics = loss(lm.params, jax.tree.map(jnp.asarray, batch), key, jnp.asarray(1.0))
        found.append([float(metrics[name]) for name in ("loss", "masked_nll")])
    mean = np.mean(found, axis=0)
    error = np.std(found, axis=0, ddof=1) / len(found) ** 0.5
    bound, masked = (f"{x:.4f} ± {e:.4f}" for x, e in zip(mean, error, strict=True))
    print(f"{path:<40} Eq. 1 {bound}, at masks {masked}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="the models")
    parser.add_argument("--task", default="microcode-long", help="the task of the answers")
    args = parser.parse_args()
    for model in args.models:
        main(model, args.task)
