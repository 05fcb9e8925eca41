"""Checkpoints of a training state, with checksums of their files."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from xflow_jax.checkpoints import (
    CHECKSUM_FILE,
    ORBAX_METADATA,
    delete_directory,
    exists,
    find_damage,
    make_directory,
    move_directory,
    quiet_orbax,
    release_tasks,
    write_checksums,
)
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.input_files import is_cloud
from xflow_jax.parallel import multihost, path_name
from xflow_jax.types import PyTree

State = TypeVar("State")

ANEW = "To start anew, choose another out or remove the folder."
NOTE = ". The same command continues from the last checkpoint."


class StateStore:
    """Checkpoints in a folder, numbered by steps.

    A damaged one is moved to damaged/ beside the folder, and the one before it is restored. With
    several processes, each writes its shards. All of them make the same calls. It is a context
    manager.

    Args:
        folder: the folder, which is made.
        keep: number of checkpoints that stay.
        on_written: called in the first process with the seconds that a checkpoint took.

    Attributes:
        latest: step of the last checkpoint that is whole, or None.

    Raises:
        UserError: if there are checkpoints and none of them is whole, or for errors of the disk.
    """

    def __init__(
        self, folder: Path, keep: int, on_written: Callable[[float], None] = lambda seconds: None
    ):
        self.folder, self._on_written = folder, on_written
        self._started = 0.0
        self._saving: int | None = None
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(quiet_orbax())
        with disk_errors(folder):
            make_directory(folder)  # Orbax would accept a file in its place
            multihost.broadcast_from_first(self._remove_damaged)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
            )
            # With named handlers, the shapes of a checkpoint are known before it is restored.
            handlers = {
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            }
            self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)
        self.latest = self._manager.latest_step()

    def restore(
        self, state: State, seed: int, frozen: str | None = None
    ) -> tuple[State, dict[str, Any]]:
        """Restores the last checkpoint (`latest`).

        Args:
            state: tree of arrays or jax.ShapeDtypeStruct with the shardings to restore to. They
                may differ from those of the checkpoint.
            seed: seed of the run.
            frozen: fingerprint of the weights that the run does not change, or None.

        Returns:
            (state, the JSON values that were saved with it).

        Raises:
            UserError: if the checkpoint is of another model, optimiser, seed or frozen weights. No
                array is read then. Also if neither it nor an earlier one can be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        while True:
            try:
                self._check_shapes(abstract)
                beside = self._read(data=ocp.args.JsonRestore())["data"]
                self._check_same("seed. It", beside.get("seed", seed), seed)
                if frozen is not None:
                    saved = beside.get("frozen") or frozen  # older checkpoints have none
                    self._check_same("model. The fingerprint of its weights", saved, frozen)
                return self._read(state=ocp.args.StandardRestore(abstract))["state"], beside
            except UserError:
                raise
            except Exception as error:  # Orbax and tensorstore raise bare Exceptions
                if (self.folder / str(self.latest) / CHECKSUM_FILE).exists():  # it is whole
                    raise
                self._fall_back(f"it cannot be read ({type(error).__name__})")

    def save(self, step: int, state: PyTree, beside: Mapping[str, object]) -> bool:
        """Writes a checkpoint in the background. An incomplete one is never restored.

        Args:
            step: number of the step.
            state: tree of arrays.
            beside: JSON values to save with it.

        Returns:
            False if there is a checkpoint of the step.

        Raises:
            UserError: if this or the checkpoint before it cannot be written.
        """
        if self._manager.latest_step() == step:
            return False
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(beside))
        )
        with disk_errors(self.folder, NOTE):
            self._manager.wait_until_finished()
            self._saving, self._started = step, time.perf_counter()
            self._manager.save(step, args=args)
        return True

    def wait(self) -> None:
        """Waits until all checkpoints are on the disk.

        Raises:
            UserError: if one cannot be written.
        """
        with disk_errors(self.folder, NOTE):
            self._manager.wait_until_finished()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends all writing. `save` and `wait` raise the errors, not this."""
        with self._stack:
            with contextlib.suppress(Exception):
                self._manager.close()
            if isinstance(error, UserError):
                release_tasks(error)

    def _read(self, **items: ocp.args.CheckpointArgs) -> dict[str, Any]:
        return self._manager.restore(self.latest, args=ocp.args.Composite(**items))

    def _add_checksums(self) -> None:
        """Writes the checksums into a checkpoint before it gets its name."""
        if multihost.is_first_process():
            pattern = f"{self._saving}.orbax-checkpoint-tmp*"
            if is_cloud(self.folder):  # it has its name, and its last file follows
                pattern = f"{self._saving}"
            for directory in self.folder.glob(pattern):
                write_checksums(directory, CHECKSUM_FILE, [ORBAX_METADATA])
            self._on_written(time.perf_counter() - self._started)

    def _remove_damaged(self) -> None:
        """Moves damaged checkpoints away that are newer than the newest whole one."""
        steps = [int(d.name) for d in self.folder.glob("*") if d.name.isdigit()]
        damages = {}
        for step in sorted(steps, reverse=True):
            damage = find_damage(self.folder / str(step), CHECKSUM_FILE)
            if damage is None:
                break
            damages[step] = damage
        if damages and len(damages) == len(steps):
            self._refuse_damaged(max(damages), damages[max(damages)])
        for step, damage in damages.items():
            self._set_aside(step, damage)

    def _fall_back(self, damage: str) -> None:
        """Moves away the last checkpoint, which cannot be read."""
        assert self.latest is not None
        if len(self._manager.all_steps()) < 2 or jax.process_count() > 1:
            self._refuse_damaged(self.latest, damage)
        self._set_aside(self.latest, damage)
        self._manager.reload()
        self.latest = self._manager.latest_step()

    def _set_aside(self, step: int, damage: str) -> None:
        """Moves a damaged checkpoint away, with a warning."""
        directory = self.folder / str(step)
        aside = self.folder.with_name("damaged") / str(step)
        if exists(aside):
            delete_directory(aside)
        make_directory(aside.parent)
        move_directory(directory, aside)
        print(
            f"warning: {directory}: {damage}. It was moved to {aside}, and the run continues from "
            "the checkpoint before it.",
            file=sys.stderr,
        )

    def _refuse_damaged(self, step: int, damage: str) -> None:
        raise UserError(
            f"{self.folder / str(step)}: {damage}. No other checkpoint is whole. {ANEW}"
        )

    def _check_shapes(self, abstract: PyTree) -> None:
        """Raises UserError unless the checkpoint has the shapes of the state."""
        saved = _shapes(self._manager.item_metadata(self.latest)["state"])
        wanted = _shapes(abstract)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                there, here = (tree.get(name, "missing") for tree in (saved, wanted))
                raise UserError(
                    f"{self.folder.parent}: its checkpoint is of another model, optimiser or set "
                    f"of rules. {name} is {there} there and {here} here. {ANEW}"
                )

    def _check_same(self, what: str, saved: object, wanted: object) -> None:
        """Raises UserError unless two values of a run are equal."""
        if saved != wanted:
            raise UserError(
                f"{self.folder.parent}: its checkpoint is of another {what} is {saved} there and "
                f"{wanted} here. {ANEW}"
            )


def _shapes(tree: PyTree) -> dict[str, list[int]]:
    """Returns path -> shape of the leaves."""
    return {path_name(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
