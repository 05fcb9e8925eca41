"""How likely a model finds given responses: the Monte-Carlo bound that the official LLaDA code computes.

Masks at many levels are drawn for each response, all of one response's draws evenly spread over the levels (`draws`),
and the cross-entropy at masked positions is weighted by length / masked. Rows of all responses share batches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xflow_jax.checkpoints import write_atomic
from xflow_jax.errors import UserError
from xflow_jax.evaluation import log_likelihoods, read_pairs
from xflow_jax.lm import load
from xflow_jax.parallel import default_mesh, multihost


def run(args: Any) -> None:
    """`xflow evaluate --task likelihood`."""
    if args.model is None or args.data is None:
        raise UserError(
            "--task likelihood needs --model DIR and --data FILE, jsonl with prompt and response"
        )
    mesh = default_mesh(args.mesh)
    lm = load(args.model, dtype=args.dtype, mesh=mesh)
    pairs = read_pairs(Path(args.data), lm, args.limit)
    samples = 128 if args.samples == 1 else args.samples
    group = next(g for g in range(min(16, samples), 0, -1) if samples % g == 0)
    found = log_likelihoods(
        lm,
        pairs,
        samples,
        group,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=multihost.is_first_process(),
    )
    if not multihost.is_first_process():
        return
    tokens = sum(len(response) for _, response in pairs)
    print(f"{len(pairs)} responses of {tokens} tokens, {samples} masks for each, seed {args.seed}")
    per_token = found.sum() / tokens
    print(
        f"log p(response | prompt) is at least {found.mean():.4f} nats on average, {per_token:.4f} a token"
    )
    if args.out is not None:
        folder = Path(args.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made an output folder: {error.strerror}") from None
        rows = [
            {"tokens": len(r), "log_likelihood": float(x)}
            for (_, r), x in zip(pairs, found, strict=True)
        ]
        write_atomic(folder / "likelihood.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"Wrote {folder / 'likelihood.jsonl'}.")
