"""Batches of a random-access source: order, position, and place on devices.

grain reads the batches. It is imported only if a run needs them.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding

from xflow_jax.errors import UserError, require
from xflow_jax.training.state import Batch

# "prompt" int32 [P], "prompt_mask" bool [P] and "response" int32 [N], or a batch of them.
Example: TypeAlias = dict[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """Examples with random access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class BatchIterator(Protocol):
    """Iterator over batches whose position can be saved, as grain's."""

    def __iter__(self) -> Iterator[Example]: ...
    def __next__(self) -> Example: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def batch_iterator(source: Source, batch_size: int, workers: int = 0) -> BatchIterator:
    """Iterates over a source in batches, in order.

    A thread reads ahead. If making examples takes longer than an update, processes can make them.
    Their number changes neither the batches nor the saved position.

    Args:
        source: the examples.
        batch_size: B, examples of a batch.
        workers: processes that make the batches, or 0 for none but this one.

    Returns:
        An iterator over batches.
    """
    import grain

    if not workers:
        dataset = grain.MapDataset.source(source).batch(batch_size, drop_remainder=True)
        return iter(dataset.to_iter_dataset(read_options()))
    batches = WorkerBatches(source, batch_size, workers)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


class WorkerBatches:
    """The batches of a source, made by processes.

    Args:
        source: the examples.
        batch_size: B, examples of a batch.
        workers: number of processes.
    """

    def __init__(self, source: Source, batch_size: int, workers: int):
        import cloudpickle  # a task holds functions that pickle does not know

        self.count = len(source) // batch_size
        work = cloudpickle.dumps((source, batch_size))
        self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _keep_source, (work,))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        """Waits for a batch of a process.

        Raises:
            UserError: if a process ended.
        """
        try:
            return self.pool.submit(_make_batch, index).result()
        except BrokenProcessPool:
            for process in active_children():  # the pool would wait for them without an end
                process.kill()
            raise UserError(
                "a process that makes batches ended, or could not start. If the system killed it "
                "for lack of memory, use fewer workers."
            ) from None


_kept: list[tuple[Source, int]] = []  # of a process that makes batches


def _keep_source(work: bytes) -> None:
    """Begins a process that makes batches.

    It ends with the main process, however that ends.
    """
    jax.config.update("jax_platforms", "cpu")  # accelerators are the main process's
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process still saves
        signal.signal(number, signal.SIG_IGN)
    main = parent_process()
    assert main is not None

    def end_with_main() -> None:
        main.join()
        os._exit(1)

    threading.Thread(target=end_with_main, daemon=True).start()
    _kept.append(pickle.loads(work))


def _make_batch(index: int) -> Example:
    ((source, batch_size),) = _kept
    first = index * batch_size
    return stack_examples([source[i] for i in range(first, first + batch_size)])


def shuffled_batches(
    source: Source, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> BatchIterator:
    """Iterates over endless shuffled epochs of a source in batches.

    A thread reads ahead. Every process goes through the same batches. So the position is the same
    in all of them, and stays valid if the number of processes changes.

    Args:
        source: the examples.
        batch_size: B, examples of a batch.
        seed: seed of the order.
        rows: rows of each batch to read (`local_rows`), or None for all.

    Returns:
        An iterator over batches.

    Raises:
        UserError: if the source has less than a batch.
    """
    import grain

    require(
        len(source) >= batch_size,
        f"{len(source)} examples do not fill a batch of {batch_size}. "
        "Use more examples or a smaller batch_size.",
    )
    wanted = np.arange(batch_size) if rows is None else rows

    def read(indices: np.ndarray) -> Example:
        return stack_examples([source[int(i)] for i in indices[wanted]])

    order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
    dataset = order.batch(batch_size, drop_remainder=True).map(read)
    return iter(dataset.to_iter_dataset(read_options()))


def read_options() -> object:
    """Returns grain's options for reading ahead by one thread."""
    import grain

    return grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


def stack_examples(examples: Sequence[Example]) -> Example:
    """Stacks examples of equal shapes to a batch."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def local_rows(sharding: Sharding, batch_size: int) -> np.ndarray:
    """Finds the rows of a batch on the devices of this process.

    Args:
        sharding: sharding of the batch.
        batch_size: B, rows of the global batch.

    Returns:
        Row numbers in ascending order, an int array.
    """
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def place_batch(batch: Example, sharding: Sharding, batch_size: int) -> Batch:
    """Moves this process's rows of a batch to its devices.

    Args:
        batch: the rows of `local_rows`, arrays [rows, ...].
        sharding: sharding of the global batch.
        batch_size: B, rows of the global batch.

    Returns:
        Global arrays [B, ...] with the sharding.
    """
    shapes = {name: (batch_size, *x.shape[1:]) for name, x in batch.items()}
    return jax.make_array_from_process_local_data(sharding, batch, shapes)
