"""What training programs share: checkpoints that a run resumes from, metrics as jsonl, a clean stop on SIGTERM."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from tqdm import tqdm

from xflow_jax.checkpoints import save_params, write_hf
from xflow_jax.errors import UserError
from xflow_jax.models import abstract_params, build
from xflow_jax.parallel import multihost, path_name
from xflow_jax.training import read_lines


class Run:
    """A run in its folder: `checkpoints/` (state, data position, notes), `metrics.jsonl`, `tensorboard/`.

    A folder that already holds checkpoints is continued; metrics written after its last checkpoint are dropped, since
    the steps that made them are done again. With several processes each writes its shards, the first one all else.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        # Named, so that a checkpoint's shapes can be asked for before anything is restored.
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(
            self.folder / "checkpoints", options=options, item_handlers=handlers
        )
        self.first_process = jax.process_index() == 0
        self.metrics_file = self.folder / "metrics.jsonl"
        self.stopped = False
        self.latest = self.manager.latest_step()
        self.board = None
        if self.first_process:
            self._drop_metrics_after(-1 if self.latest is None else self.latest)
            self.board = _board(
                self.folder / "tensorboard", None if self.latest is None else self.latest + 1
            )

    def restore(self, state: Any, data: Any = None) -> tuple[Any, dict[str, Any]]:
        """(state, notes) of the last checkpoint; `data` is moved to its position. There must be one (`latest`).

        data: an iterator of grain's, or None where the step alone says which data come next. state: arrays or
        jax.ShapeDtypeStruct, with the shardings to restore to, whatever they were when it was saved. Raises UserError,
        before any array is read, where the checkpoint is of another model or optimiser.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        self._check(abstract)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored = self.manager.restore(self.latest, args=args)
        if data is not None:
            data.set_state(restored["data"]["position"])
        return restored["state"], restored["data"]["notes"]

    def save(
        self, step: int, state: Any, data: Any = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint in the background; a half-written one is never taken for a whole one. notes: JSON."""
        if self.manager.latest_step() == step:
            return
        beside = {"position": None if data is None else data.get_state(), "notes": notes or {}}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(beside)
        )
        self.manager.save(step, args=args)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends one line of metrics, float32 to the last bit, and shows them to TensorBoard."""
        values = {k: float(f"{float(np.asarray(v)):.9g}") for k, v in metrics.items()}
        if not self.first_process:
            return
        with self.metrics_file.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def metrics(self) -> list[dict[str, float]]:
        """All lines of metrics so far."""
        return [json.loads(line) for line in read_lines(self.metrics_file)]

    def steps(self, first: int, last: int, describe: str) -> Iterator[int]:
        """first, first + 1, ..., last - 1 behind a progress bar, until a process is asked to end (SIGTERM)."""

        def stop(*_: Any) -> None:
            self.stopped = True

        before = signal.signal(signal.SIGTERM, stop)
        quiet = not self.first_process
        self.bar = tqdm(
            range(first, last),
            initial=first,
            total=last,
            desc=describe,
            dynamic_ncols=True,
            disable=quiet,
        )
        try:
            for step in self.bar:
                if jax.process_count() > 1:  # all of them must leave after the same step
                    self.stopped = bool(
                        multihost_utils.process_allgather(np.asarray(self.stopped)).any()
                    )
                yield step
                if self.stopped:
                    break
        finally:
            signal.signal(signal.SIGTERM, before)
            self.bar.close()

    def say(self, sentence: str) -> None:
        """Prints, once."""
        if self.first_process:
            print(sentence)

    def close(self) -> None:
        """Waits until what was saved is on the disk."""
        self.manager.wait_until_finished()
        self.manager.close()
        if self.board is not None:
            self.board.close()

    def _check(self, abstract: Any) -> None:
        saved = _shapes(self.manager.item_metadata(self.latest)["state"])
        wanted = _shapes(abstract)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                there, here = (tree.get(name, "missing") for tree in (saved, wanted))
                raise UserError(
                    f"{self.folder}: its checkpoint is of another model or optimiser, {name} is {there} there and "
                    f"{here} here; choose another out, or remove the folder"
                )

    def _drop_metrics_after(self, step: int) -> None:
        if self.metrics_file.exists():
            kept = [m for m in self.metrics() if m["step"] <= step]
            temporary = self.metrics_file.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(m) + "\n" for m in kept))
            temporary.replace(self.metrics_file)


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {path_name(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _board(folder: Path, purge_step: int | None) -> Any | None:
    """A writer of TensorBoard's events; None where tensorboardX is not installed, since metrics.jsonl has it all."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def export(
    folder: Path,
    params: Any,
    config: Any,
    tokenizer_dir: str | Path,
    made_by: dict[str, Any],
    dtype: str,
) -> None:
    """Writes `folder` in the Hugging Face format with what made it in provenance.json; replaces an earlier export.

    Of several processes none has all parameters: they write a converted checkpoint instead, each its shards.
    """
    if jax.process_index() == 0 and folder.exists():
        shutil.rmtree(folder)
    # A router's bias stays float32, whatever the rest is.
    like = abstract_params(build(config, param_dtype=jnp.dtype(dtype)))
    params = jax.jit(
        lambda tree: jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), tree, like)
    )(params)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")
        save_params(folder, params, config, tokenizer_dir, made_by)
        what = "converted; python -m convert.to_hf goes on to the Hugging Face format"
    else:
        write_hf(folder, params, config, tokenizer_dir)
        what = "in the Hugging Face format"
    if jax.process_index() == 0:
        (folder / "provenance.json").write_text(json.dumps(made_by, indent=2, default=str) + "\n")
        print(f"{folder}: the model {what}")


def run_program(main: Callable[[str, list[str]], None], usage: str) -> None:
    """`main(config path, overrides)` from the command line; a user's mistake is one sentence and exit status 2."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(f"usage: {usage}", file=sys.stderr)
        sys.exit(2)
    try:
        multihost.initialize_processes()
        multihost.enable_compilation_cache()
        main(sys.argv[1], sys.argv[2:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
