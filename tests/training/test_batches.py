"""Tests of batches: their order, their position, and their place on devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import eight
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.parallel.partitioning import batch_sharding
from xflow_jax.training.batches import (
    BatchIterator,
    Example,
    batch_iterator,
    local_rows,
    place_batch,
    shuffled_batches,
)

ROOT = Path(__file__).parents[2]


class Numbers:
    """40 examples that are their own number."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Example:
        return {"response": np.full(3, index, np.int32)}


def global_batch(rows: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "prompt": rng.integers(0, 50, (rows, 6)).astype(np.int32),
        "prompt_mask": rng.random((rows, 6)) < 0.5,
        "response": rng.integers(0, 50, (rows, 8)).astype(np.int32),
    }


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_restored_position_gives_the_same_batches(shuffled):
    def start() -> BatchIterator:
        return shuffled_batches(Numbers(), 4, seed=1) if shuffled else batch_iterator(Numbers(), 4)

    straight, before, after = start(), start(), start()
    batches = [next(straight) for _ in range(6)]
    for _ in range(3):
        next(before)
    after.set_state(before.get_state())
    for wanted in batches[3:]:
        ours = next(after)
        assert ours.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(ours[name], value)


@pytest.mark.slow
def test_processes_change_neither_the_batches_nor_the_position():
    straight, parallel = batch_iterator(Numbers(), 4), batch_iterator(Numbers(), 4, workers=2)
    for _ in range(5):
        np.testing.assert_array_equal(next(parallel)["response"], next(straight)["response"])
    assert parallel.get_state() == straight.get_state()
    parallel.set_state({**straight.get_state(), "next_index": 1})
    assert next(parallel)["response"][0, 0] == 4


KILLED_PROCESS = """
import os, signal, numpy as np
from xflow_jax.errors import UserError
from xflow_jax.training import batch_iterator

class Source:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index >= 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"response": np.full(3, index)}

if __name__ == "__main__":
    try:
        list(batch_iterator(Source(), 4, workers=2))
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_program_with_a_sentence(tmp_path):
    """The other process does not keep it alive."""
    script = tmp_path / "script.py"
    script.write_text(KILLED_PROCESS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "ended, or could not start" in done.stdout, done.stderr


def test_the_order_of_an_epoch_depends_on_the_seed():
    def epoch(seed: int) -> list[bytes]:
        batches = shuffled_batches(Numbers(), 4, seed)
        return [row.tobytes() for _ in range(10) for row in next(batches)["response"]]

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert first == again != other and sorted(first) == sorted(other)


@eight
@pytest.mark.parametrize("mesh", ["1,1,1", "1,8,1", "2,2,2", "1,1,8"])
def test_a_placed_batch_is_the_batch(mesh):
    batch, sharding = global_batch(), batch_sharding(make_mesh(mesh))
    placed = place_batch(batch, sharding, 16)
    assert local_rows(sharding, 16).tolist() == list(range(16))
    for name, x in batch.items():
        assert placed[name].dtype == x.dtype and placed[name].sharding == sharding
        np.testing.assert_array_equal(placed[name], x)


# Every device of each process gets its rows of the global batch.
PLACE_OWN_ROWS = """
import jax
import numpy as np
from jax.sharding import Mesh

from xflow_jax.parallel import MESH_AXES, batch_sharding, make_mesh, multihost
from xflow_jax.training import local_rows, place_batch

multihost.initialize_processes()
# Interleaved: neighbouring rows are on different processes.
devices = sorted(jax.devices(), key=lambda device: (device.id % 4, device.process_index))
meshes = [make_mesh(spec) for spec in ("1,8,1", "2,2,2", "1,1,8")]
meshes.append(Mesh(np.array(devices).reshape(1, 8, 1), MESH_AXES))
batch = {"response": np.arange(16 * 3, dtype=np.int32).reshape(16, 3), "mask": np.arange(16) < 5}
for mesh in meshes:
    sharding = batch_sharding(mesh)
    rows = local_rows(sharding, 16)
    placed = place_batch({name: x[rows] for name, x in batch.items()}, sharding, 16)
    for name, x in placed.items():
        assert x.shape == batch[name].shape and x.sharding == sharding
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, batch[name][shard.index])
"""


@pytest.mark.slow
def test_two_processes_place_their_own_rows():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PLACE_OWN_ROWS],
            cwd=ROOT,
            env=os.environ | told | {"JAX_PROCESS_ID": str(i)},
        )
        for i in range(2)
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
