"""Run of `xflow serve`: the model, the engine and HTTP."""

from __future__ import annotations

import argparse
import time

from xflow_jax.cli.arguments import cache_arguments
from xflow_jax.cli.generate_run import longest_task
from xflow_jax.cli.process import print_text
from xflow_jax.decoding import CacheOptions, parse_rules
from xflow_jax.errors import require
from xflow_jax.input_files import to_path
from xflow_jax.lm import load
from xflow_jax.parallel import default_mesh, multihost
from xflow_jax.serving import (
    ApiOptions,
    Engine,
    EngineOptions,
    Server,
    ServerOptions,
    live_page,
    make_lengths,
)
from xflow_jax.tasks import find_tasks


def serve(args: argparse.Namespace) -> int:
    """Serves a model.

    Args:
        args: the arguments of `xflow serve`.

    Returns:
        The exit status.

    Raises:
        UserError: for bad input.
    """
    rules = parse_rules(args.rules)
    lm = load(args.model, dtype=args.dtype, mesh=default_mesh(args.mesh), mask_id=args.mask_id)
    require(lm.tokenizer is not None, f"{args.model} has no tokenizer.json, which the server needs")
    require(multihost.is_first_process(), "xflow serve runs as one process")
    gen_lengths, block_length = args.gen_lengths, args.block_length
    task = longest_task(find_tasks(lm.tasks), [])
    if task is not None and gen_lengths is None and block_length is None:
        gen_lengths, block_length = [task.config.gen_length], task.config.block_length
    cache = CacheOptions(**cache_arguments(args))
    lengths = make_lengths(lm, gen_lengths, args.prompt_lengths, block_length, args.slots, cache)
    limits = EngineOptions(args.steps_per_call, args.max_queue, float(args.request_timeout))
    engine = Engine(lm, rules, lengths, limits)
    name = args.served_model_name or to_path(args.model).name or args.model
    page = None if args.no_page else live_page()
    api = ApiOptions(name, args.api_key, tuple(args.allow_origin), page)
    server = Server(engine, api, ServerOptions(args.host, args.port, float(args.drain)))
    began = time.perf_counter()
    print_text(f"compiling {engine.describe()}")

    def announce() -> None:
        seconds = time.perf_counter() - began
        print_text(f"ready after {seconds:.0f} s at http://{args.host}:{server.port}")

    return server.run_until_end(announce)
