"""Run of `xflow evaluate --task likelihood`: log-likelihoods of given responses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from xflow_jax.checkpoints import make_directory, write_atomic
from xflow_jax.errors import UserError
from xflow_jax.evaluation import log_likelihoods, read_pairs
from xflow_jax.input_files import to_path
from xflow_jax.lm import load
from xflow_jax.parallel import default_mesh, multihost

SAMPLES = 128  # masks of each response without --samples


def print_likelihood(args: argparse.Namespace) -> None:
    """Computes a bound on each log-likelihood, and prints the mean.

    Args:
        args: the arguments of `xflow evaluate`.

    Raises:
        UserError: for bad input.
    """
    if args.model is None or args.data is None:
        raise UserError(
            "--task likelihood needs --model DIR and --data FILE, jsonl with prompt and response"
        )
    if args.set:
        raise UserError("--set changes the protocol of a task, and likelihood has none")
    mesh = default_mesh(args.mesh)
    lm = load(args.model, dtype=args.dtype, mesh=mesh, mask_id=args.mask_id)
    pairs = read_pairs(to_path(args.data), lm, args.limit)
    samples = SAMPLES if args.samples is None else args.samples
    bounds = log_likelihoods(
        lm,
        pairs,
        samples,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=multihost.is_first_process(),
    )
    if not multihost.is_first_process():
        return
    lengths = [len(response) for _, response in pairs]
    tokens = sum(lengths)
    print(f"{len(pairs)} responses of {tokens} tokens, {samples} masks for each, seed {args.seed}")
    print(
        f"log p(response | prompt) is at least {bounds.mean():.4f} nats on average, "
        f"{bounds.sum() / tokens:.4f} a token"
    )
    if args.out is not None:
        file = _write_bounds(to_path(args.out), lengths, bounds.tolist())
        print(f"Wrote {file}.")


def _write_bounds(folder: Path, lengths: list[int], bounds: list[float]) -> Path:
    """Writes a line of JSON for each response."""
    try:
        make_directory(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made an output folder: {error.strerror}") from None
    rows = [
        {"tokens": length, "log_likelihood": bound}
        for length, bound in zip(lengths, bounds, strict=True)
    ]
    file = folder / "likelihood.jsonl"
    write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file
