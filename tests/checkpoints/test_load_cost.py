"""Memory and time that a converted checkpoint of 1 GB takes to load, from a disk and a bucket.

`pytest tests/checkpoints/test_load_cost.py -m slow -s` prints the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.gcs_helpers import BUCKET, bucket_server, use_server
from xflow_jax.checkpoints import CHECKSUM_FILE, save_params, write_checksums
from xflow_jax.checkpoints.checksums import list_files
from xflow_jax.input_files import to_path, upload, write_object
from xflow_jax.models import LLaDAConfig, abstract_params, build

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
    # aiohttp prefers files for the upload of large objects.
    pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"),
]
MODEL = LLaDAConfig(
    d_model=2048,
    n_layers=8,
    n_heads=16,
    vocab_size=32000,
    mlp_hidden_size=5632,
    mask_token_id=39,
    eos_token_id=1,
)
# Prints (bytes of the parameters, highest memory before and after a load, CPU seconds of each load
# without and with checksums).
LOAD = """
import json, os, re, sys, time
import jax
from xflow_jax.lm import load
jax.devices()

def highest():  # ru_maxrss is at least that of the parent
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])

before, times = highest(), {"0": [], "1": []}
for number in range(1 + 2 * int(sys.argv[2])):
    if number:
        os.environ["XFLOW_VERIFY"] = str(number % 2)
    start = time.process_time(), time.perf_counter()
    lm = load(sys.argv[1], dtype="bfloat16")
    jax.block_until_ready(lm.params)
    took = time.process_time() - start[0], time.perf_counter() - start[1]
    size = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    after = highest() if number == 0 else after
    if number:
        times[str(number % 2)].append(took)
    del lm
print(json.dumps([size, before, after, times]))
"""


def measure(place: object, loads: int = 0) -> list:
    command = [sys.executable, "-c", LOAD, str(place), str(loads)]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment.pop("XFLOW_VERIFY", None)
    run = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A checkpoint of random bits, which hardly compress."""
    folder, rng = tmp_path_factory.mktemp("model") / "converted", np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        bits = np.frombuffer(rng.bytes(2 * x.size), np.uint16) & 0xBFFF  # no NaN and no infinity
        return jnp.asarray(bits.view(jnp.bfloat16).reshape(x.shape))

    save_params(folder, jax.tree.map(draw, abstract_params(build(MODEL))), MODEL)
    return folder


@pytest.fixture
def in_bucket(converted, tmp_path) -> Iterator[str]:
    """A copy of the checkpoint in a bucket, as if it had been written there."""
    with bucket_server(tmp_path) as variables:
        use_server(variables)
        place = to_path(f"gs://{BUCKET}/large")
        for file in list_files(converted):
            upload(file, place / str(file.relative_to(converted)))
        for item in {file.parts[len(converted.parts)] for file in converted.glob("*/*")}:
            write_object(place / item / "commit_success.txt", b"committed")
        write_object(place / "commit_success.txt", b"committed")
        write_checksums(place, CHECKSUM_FILE)
        yield str(place)


def test_a_load_holds_the_model_and_little_else(converted, in_bucket):
    for kind, place in (("disk", converted), ("bucket", in_bucket)):
        size, before, after, _ = measure(place)
        print(f"{kind}: {size / 1e9:.2f} GB of parameters, {(after - before) / 1e9:.2f} GB more")
        assert size > 1e9
        assert after - before < size + 1e9, kind  # libraries, and parts of a few parameters


def test_checksums_take_little_of_a_load(converted):
    times = measure(converted, loads=3)[3]
    ratios = {}
    for number, name in enumerate(("CPU", "wall")):
        without, verified = (np.array(times[key])[:, number] for key in ("0", "1"))
        ratios[name] = np.median(verified / without)
        print(
            f"{name} seconds of a load: {np.median(without):.2f} without checksums, "
            f"{np.median(verified):.2f} with them, ratio {ratios[name]:.3f}"
        )
    assert ratios["CPU"] < 1.2  # the wall time of a busy machine is that of others
