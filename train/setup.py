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
from tqdm import tqdm

from xflow_jax.config import UserError
from xflow_jax.hf import find_directory
from xflow_jax.hf_write import write_hf
from xflow_jax.lm import BUNDLED


class Run:
    """A run in its folder: `checkpoints/` (parameters, optimiser and data position) and `metrics.jsonl`.

    A folder that already holds checkpoints is continued; metrics written after its last checkpoint are dropped, since
    the steps that made them are done again.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)
        self.metrics_file = self.folder / "metrics.jsonl"
        self.stopped = False

    def restore(self, state: Any, data: Any = None) -> Any:
        """`state` and the position of `data` as the last checkpoint has them; as given where there is none.

        data: an iterator of grain's, or None where the step alone says which data come next.
        """
        step = self.manager.latest_step()
        self._drop_metrics_after(step or 0)
        if step is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = {"state": ocp.args.StandardRestore(abstract)}
        if data is not None:
            args["data"] = ocp.args.JsonRestore()
        restored = self.manager.restore(step, args=ocp.args.Composite(**args))
        if data is not None:
            data.set_state(restored["data"])
        return restored["state"]

    def save(self, step: int, state: Any, data: Any = None) -> None:
        """Writes a checkpoint in the background; a half-written one is never taken for a whole one."""
        if self.manager.latest_step() == step:
            return
        args = {"state": ocp.args.StandardSave(state)}
        if data is not None:
            args["data"] = ocp.args.JsonSave(data.get_state())
        self.manager.save(step, args=ocp.args.Composite(**args))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends one line of metrics."""
        values = {k: round(float(np.asarray(v)), 6) for k, v in metrics.items()}
        with self.metrics_file.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """All lines of metrics so far."""
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    def steps(self, first: int, last: int, describe: str) -> Iterator[int]:
        """first, first + 1, ..., last - 1 behind a progress bar, until the process is asked to end."""

        def stop(*_: Any) -> None:
            self.stopped = True

        before = signal.signal(signal.SIGTERM, stop)
        self.bar = tqdm(range(first, last), initial=first, total=last, desc=describe, dynamic_ncols=True)
        try:
            for step in self.bar:
                yield step
                if self.stopped:
                    break
        finally:
            signal.signal(signal.SIGTERM, before)
            self.bar.close()

    def close(self) -> None:
        """Waits until what was saved is on the disk."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _drop_metrics_after(self, step: int) -> None:
        if self.metrics_file.exists():
            kept = [m for m in self.metrics() if m["step"] <= step]
            temporary = self.metrics_file.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(m) + "\n" for m in kept))
            temporary.replace(self.metrics_file)


def tokenizer_folder(model: str) -> Path:
    """Where the tokenizer of a model lies that was loaded by this name."""
    return BUNDLED.get(model) or find_directory(model)


def export(
    folder: Path, params: Any, config: Any, tokenizer_dir: str | Path, made_by: dict[str, Any], dtype: str
) -> None:
    """Writes `folder` in the Hugging Face format with what made it in provenance.json; replaces an earlier export."""
    if folder.exists():
        shutil.rmtree(folder)
    write_hf(folder, params, config, tokenizer_dir, dtype=jnp.dtype(dtype))
    (folder / "provenance.json").write_text(json.dumps(made_by, indent=2, default=str) + "\n")
    print(f"{folder}: the model in the Hugging Face format")


def run_program(main: Callable[[str, list[str]], None], usage: str) -> None:
    """`main(config path, overrides)` from the command line; a user's mistake is one sentence and exit status 2."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(f"usage: {usage}", file=sys.stderr)
        sys.exit(2)
    try:
        main(sys.argv[1], sys.argv[2:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
