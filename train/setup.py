"""Parts that the training programs share: runs, export and the command line.

A run has checkpoints to resume from, metrics as jsonl, and stops cleanly at SIGTERM.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.typing import ArrayLike
from tqdm import tqdm

from xflow_jax.checkpoints import save_params, write_atomic, write_hf
from xflow_jax.errors import UserError
from xflow_jax.models import abstract_params, build
from xflow_jax.parallel import multihost, path_name
from xflow_jax.training import BatchIterator, read_lines
from xflow_jax.types import ModelConfig, Params, PyTree

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

State = TypeVar("State")


class Run:
    """A training run in its folder.

    It continues from the last checkpoint. The folder has checkpoints/ (state, position in the data,
    notes), metrics.jsonl and tensorboard/. Metrics after the last checkpoint are dropped, because
    their steps are repeated. With several processes, each writes its shards, and the first one
    everything else.

    Args:
        folder: the folder.
        keep: number of checkpoints that stay.

    Attributes:
        latest: step of the last checkpoint, or None.
        stopped: True after SIGTERM.
        bar: the progress bar, while `steps` runs.
    """

    bar: tqdm

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        # With named handlers, the shapes of a checkpoint are known before it is restored.
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(
            self.folder / "checkpoints", options=options, item_handlers=handlers
        )
        self.first_process = multihost.is_first_process()
        self.metrics_file = self.folder / "metrics.jsonl"
        self.stopped = False
        self.latest = self.manager.latest_step()
        self.tensorboard: SummaryWriter | None = None
        if self.first_process:
            self._drop_metrics_after(-1 if self.latest is None else self.latest)
            purge_step = None if self.latest is None else self.latest + 1
            self.tensorboard = _tensorboard_writer(self.folder / "tensorboard", purge_step)

    def restore(
        self, state: State, data: BatchIterator | None = None
    ) -> tuple[State, dict[str, Any]]:
        """Restores the last checkpoint (`latest`).

        Args:
            state: tree of arrays or jax.ShapeDtypeStruct with the shardings to restore to. They
                may differ from those of the checkpoint.
            data: iterator that is moved to its position, or None if the step alone determines the
                data.

        Returns:
            (state, notes).

        Raises:
            UserError: if the checkpoint is of another model or optimiser. No array is read then.
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
        self,
        step: int,
        state: PyTree,
        data: BatchIterator | None = None,
        notes: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a checkpoint in the background. An incomplete one is never restored.

        Args:
            step: number of the step.
            state: tree of arrays.
            data: iterator whose position is saved.
            notes: JSON values to save.
        """
        if self.manager.latest_step() == step:
            return
        beside = {"position": None if data is None else data.get_state(), "notes": notes or {}}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(beside)
        )
        self.manager.save(step, args=args)

    def log(self, step: int, metrics: Mapping[str, ArrayLike]) -> None:
        """Appends a line to metrics.jsonl, and writes the metrics for TensorBoard.

        Args:
            step: number of the step.
            metrics: scalars by name. Nine digits keep float32 exactly.
        """
        values = {k: float(f"{float(np.asarray(v)):.9g}") for k, v in metrics.items()}
        if not self.first_process:
            return
        with self.metrics_file.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def metrics(self) -> list[dict[str, float]]:
        """Returns all lines of metrics so far."""
        return [json.loads(line) for line in read_lines(self.metrics_file)]

    def steps(self, first: int, last: int, description: str) -> Iterator[int]:
        """Counts steps behind a progress bar, until SIGTERM reaches a process.

        Args:
            first: the first step.
            last: the end of the steps, itself not included.
            description: text in front of the bar.

        Yields:
            first, first + 1, ..., last - 1.
        """

        def stop(*_: object) -> None:
            self.stopped = True

        before = signal.signal(signal.SIGTERM, stop)
        self.bar = tqdm(
            range(first, last),
            initial=first,
            total=last,
            desc=description,
            dynamic_ncols=True,
            disable=not self.first_process,
        )
        try:
            for step in self.bar:
                if jax.process_count() > 1:  # all processes must leave after the same step
                    self.stopped = bool(
                        multihost_utils.process_allgather(np.asarray(self.stopped)).any()
                    )
                yield step
                if self.stopped:
                    break
        finally:
            signal.signal(signal.SIGTERM, before)
            self.bar.close()

    def close(self) -> None:
        """Waits until all checkpoints are on the disk."""
        self.manager.wait_until_finished()
        self.manager.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _check(self, abstract: PyTree) -> None:
        """Raises UserError unless the checkpoint has the shapes of the state."""
        saved = _shapes(self.manager.item_metadata(self.latest)["state"])
        wanted = _shapes(abstract)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                there, here = (tree.get(name, "missing") for tree in (saved, wanted))
                raise UserError(
                    f"{self.folder}: its checkpoint is of another model or optimiser. {name} is "
                    f"{there} there and {here} here. To start anew, choose another out or remove "
                    "the folder."
                )

    def _drop_metrics_after(self, step: int) -> None:
        """Removes the metrics of later steps from the file."""
        if self.metrics_file.exists():
            kept = [m for m in self.metrics() if m["step"] <= step]
            write_atomic(self.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))


def _shapes(tree: PyTree) -> dict[str, list[int]]:
    """Returns path -> shape of the leaves."""
    return {path_name(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _tensorboard_writer(folder: Path, purge_step: int | None) -> SummaryWriter | None:
    """Opens TensorBoard's event file. Returns None without tensorboardX."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:  # metrics.jsonl has the same metrics
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


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
    if multihost.is_first_process() and folder.exists():
        shutil.rmtree(folder)
    like = abstract_params(build(config, param_dtype=jnp.dtype(dtype)))
    params = jax.jit(lambda tree: jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like))(params)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")
        save_params(folder, params, config, tokenizer_dir, made_by)
        kind = "converted checkpoint. python -m convert.to_hf makes the Hugging Face format."
    else:
        write_hf(folder, params, config, tokenizer_dir)
        kind = "model in the Hugging Face format"
    if multihost.is_first_process():
        text = json.dumps(made_by, indent=2, default=str) + "\n"
        (folder / "provenance.json").write_text(text)
        print(f"{folder}: {kind}")


def run_program(main: Callable[[str, list[str]], None], usage: str) -> None:
    """Runs a program with the arguments of the command line.

    A UserError ends the program with a message on stderr and status 2.

    Args:
        main: function of the first argument, a configuration, and the rest, the overrides.
        usage: the form of the command, for a message if there is no configuration.
    """
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
