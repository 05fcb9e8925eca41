"""Parts that the training programs share: export and the command line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from train.run import Run
from xflow_jax.checkpoints import delete_directory, exists, save_params, write_atomic, write_hf
from xflow_jax.cli import run_process
from xflow_jax.models import abstract_params, build
from xflow_jax.parallel import find_devices, multihost
from xflow_jax.types import ModelConfig, Params


def export(
    folder: Path,
    params: Params,
    config: ModelConfig,
    tokenizer_dir: str | Path,
    made_by: Mapping[str, object],
    dtype: str,
) -> None:
    """Writes a model with its provenance, and replaces an earlier export.

    One process writes the Hugging Face format. None of several processes has all parameters, so
    each writes its shards of a converted checkpoint instead.

    Args:
        folder: the destination.
        params: parameters of the model.
        config: its configuration.
        tokenizer_dir: directory of the tokenizer's files, which are copied.
        made_by: JSON values for provenance.json.
        dtype: dtype of the parameters. The bias of a router stays float32.
    """
    like = abstract_params(build(config, param_dtype=jnp.dtype(dtype)))
    params = jax.jit(lambda tree: jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like))(params)
    provenance = json.dumps(made_by, indent=2, default=str) + "\n"
    if jax.process_count() > 1:
        if multihost.is_first_process() and exists(folder):
            delete_directory(folder)
        multihost_utils.sync_global_devices("export")
        save_params(folder, params, config, tokenizer_dir, made_by)
        if multihost.is_first_process():
            write_atomic(folder / "provenance.json", provenance)
        kind = "converted checkpoint. python -m convert.to_hf makes the Hugging Face format."
    else:
        texts = {"provenance.json": provenance}
        write_hf(folder, params, config, tokenizer_dir, texts=texts, replace=True)
        kind = "model in the Hugging Face format"
    if multihost.is_first_process():
        print(f"{folder}: {kind}")


def run_program(main: Callable[[str, list[str]], None], usage: str) -> None:
    """Runs a program with the arguments of the command line.

    Errors end it as those of a command (`run_process`). After SIGTERM the status is 75, so that a
    scheduler starts the program again.

    Args:
        main: function of the first argument, a configuration, and the rest, the overrides.
        usage: the form of the command, for a message if there is no configuration.
    """
    Run.began = time.time()
    arguments = sys.argv[2:]
    if "--profile" in arguments[:-1]:
        at = arguments.index("--profile")
        Run.profile = arguments[at + 1]
        del arguments[at : at + 2]
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(f"usage: {usage} [--profile DIR[:STEPS]]", file=sys.stderr)
        sys.exit(2)

    def run() -> int:
        multihost.configure_process()
        find_devices()
        main(sys.argv[1], arguments)
        return multihost.RESTART_STATUS if Run.ended_early else 0

    sys.exit(run_process(run, interrupted="interrupted. The same command continues."))
