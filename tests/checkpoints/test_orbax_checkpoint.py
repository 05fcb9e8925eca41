"""Converted checkpoints: equal parameters on any mesh and in any dtype, complete or refused."""

import dataclasses
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import eight
from tests.hf_helpers import GOLDEN, TOY, random_params
from xflow_jax.checkpoints import atomic_write, orbax_writer
from xflow_jax.checkpoints.checksums import CHECKSUM_FILE
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.checkpoints.orbax_checkpoint import load_params, read_record
from xflow_jax.checkpoints.orbax_writer import save_params
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.models.logical_axes import shardings
from xflow_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def params():
    return random_params(TOY)


@pytest.fixture
def saved(tmp_path, params):
    save_params(tmp_path / "saved", params, TOY, GOLDEN, {"made by": "hand"})
    return tmp_path / "saved"


def test_what_is_saved_is_loaded(saved, params):
    lm = load(saved)
    chex.assert_trees_all_equal(lm.params, params)
    assert lm.config.to_hf() == TOY.to_hf() and lm.tokenizer is not None
    assert read_record(saved).provenance == {"made by": "hand"}
    assert [file.name for file in saved.parent.iterdir()] == ["saved"]
    assert all(not x.committed for x in jax.tree.leaves(lm.params)), (
        "free to go wherever they are used"
    )


def test_dtype_is_cast_on_the_way_in(saved, params):
    config, half = load_params(saved, jnp.dtype("bfloat16"))
    chex.assert_trees_all_equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    save_params(saved.parent / "half", half, config)
    _, wide = load_params(saved.parent / "half", jnp.dtype("float32"))
    chex.assert_trees_all_equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), half))


@pytest.mark.slow
@eight
@pytest.mark.parametrize(("first", "then"), [(None, "1,8,1"), ("2,2,2", "1,4,2"), ("1,8,1", None)])
def test_any_mesh_to_any_other(tmp_path, params, first, then):
    if first is not None:
        params = jax.device_put(params, shardings(params, make_mesh(first), "llada"))
    save_params(tmp_path / "saved", params, TOY)
    for dtype in ("float32", "bfloat16"):
        lm = load(tmp_path / "saved", dtype, then)
        cast = jax.tree.map(lambda x, dtype=dtype: np.asarray(x).astype(dtype), params)
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, lm.params), cast)
        if then is not None:
            wanted = shardings(lm.params, make_mesh(then), "llada")
            assert jax.tree.map(lambda x: x.sharding, lm.params) == wanted


@eight
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mesh", [None, "1,8,1"])
def test_values_that_are_not_finite_are_refused(tmp_path, params, mesh, value, monkeypatch):
    scale = np.ones(32, np.float32)
    scale[-1] = value
    bad = params | {"ln_f": {"scale": jnp.asarray(scale)}}
    for write in (save_params, write_hf):
        with pytest.raises(UserError, match="ln_f.* holds NaN or infinity"):
            write(tmp_path / "saved", bad, TOY)
        assert not any("saved" in file.name for file in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(orbax_writer, "is_finite", lambda _: True)
        save_params(tmp_path / "saved", bad, TOY)
    with pytest.raises(UserError) as error:
        load(tmp_path / "saved", "bfloat16" if mesh is None else "float32", mesh)
    dtype = "bfloat16" if mesh is None else "float32"
    assert str(error.value) == (
        f"{tmp_path / 'saved'}: ln_f/scale holds NaN or infinity in {dtype}. "
        "The weights are damaged, or too large for this dtype."
    )


def test_what_is_not_the_configurations_is_not_saved(tmp_path, params):
    wrong = params | {"ln_f": {"scale": jnp.ones(31)}}
    less = {name: leaf for name, leaf in params.items() if name != "ln_f"}
    for tree in (wrong, less, params | {"more": jnp.ones(2)}):
        with pytest.raises(
            ValueError,
            match="not the parameters of this configuration: (ln_f/scale|more) is missing",
        ):
            save_params(tmp_path / "saved", tree, TOY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [save_params, write_hf])
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ('{"eos_token_id": 1}', True),
        ('{"eos_token_id": [3, 1]}', True),
        ('{"eos_token_id": 481}', False),
        ('{"mask_token_id": 5}', False),
        ("{", False),
    ],
)
def test_options_of_another_models_generation_are_not_copied(
    tmp_path, params, write, options, kept
):
    companions = tmp_path / "companions"
    companions.mkdir()
    (companions / "generation_config.json").write_text(options)
    (companions / "merges.txt").touch()
    write(tmp_path / "saved", params, TOY, companions)
    chex.assert_trees_all_equal(load(tmp_path / "saved").params, params)
    assert (tmp_path / "saved" / "generation_config.json").exists() == kept
    assert (tmp_path / "saved" / "merges.txt").exists()


def test_nothing_is_written_over(saved, params):
    before = {file: file.stat().st_mtime_ns for file in saved.rglob("*")}
    with pytest.raises(
        UserError, match=f"^{saved}: the destination exists. Choose another one, or delete it.$"
    ):
        save_params(saved, params, TOY)
    assert {file: file.stat().st_mtime_ns for file in saved.rglob("*")} == before


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_save_that_fails_leaves_nothing(tmp_path, params, monkeypatch, error):
    plain = orbax_writer.PartialCheckpoint.write

    def write(self, path, leaf):
        with atomic_write.disk_errors(self.path):
            if path == "ln_f/scale":
                raise error
            plain(self, path, leaf)

    monkeypatch.setattr(orbax_writer.PartialCheckpoint, "write", write)
    kind, sentence = (
        (KeyboardInterrupt, None)
        if isinstance(error, KeyboardInterrupt)
        else (UserError, "disk is full$")
    )
    with pytest.raises(kind, match=sentence):
        save_params(tmp_path / "saved", params, TOY)
    assert not list(tmp_path.iterdir())


def test_the_partial_checkpoint_of_a_killed_save_is_replaced(saved, params):
    half = saved.with_name("again.partial")
    shutil.copytree(saved, half)
    (half / CHECKSUM_FILE).unlink()
    other = jax.tree.map(lambda x: x + 1, params)
    save_params(saved.with_name("again"), other, TOY)
    chex.assert_trees_all_equal(load(saved.with_name("again")).params, other)
    assert not half.exists()


def test_another_directory_of_the_partial_name_is_not_deleted(tmp_path, params):
    (tmp_path / "saved.partial").mkdir()
    (tmp_path / "saved.partial" / "diary").touch()
    with pytest.raises(
        UserError, match="saved.partial: not a converted checkpoint of this version"
    ):
        save_params(tmp_path / "saved", params, TOY)
    assert (tmp_path / "saved.partial" / "diary").exists()


def largest(folder):
    return max(
        (file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )


def test_a_damaged_checkpoint_is_refused(saved):
    item = saved / "blocks.ff_out.kernel"
    file = largest(item)
    content = file.read_bytes()
    file.write_bytes(content[:100])
    sentence = (
        f"{file}: the file has 100 bytes, not {len(content)}. Copy or convert the checkpoint again."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        load(saved)
    file.unlink()
    with pytest.raises(
        UserError, match=f"^{file}: the file is missing. Copy or convert the checkpoint again.$"
    ):
        load(saved)
    file.write_bytes(bytes(len(content)))
    sentence = f"{file}: the file has another checksum than when it was written. "
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}Copy or convert the checkpoint ag"):
        load(saved)
    listed = json.loads((saved / CHECKSUM_FILE).read_text())
    sizes = {name: size for name, (size, _) in listed.items()}
    (saved / CHECKSUM_FILE).write_text(json.dumps(sizes))  # of an older checkpoint
    with pytest.raises(
        UserError, match=f"^{item}: cannot be read .*. Convert the checkpoint again.$"
    ):
        load(saved)


def test_an_incomplete_checkpoint_is_refused(saved):
    (saved / CHECKSUM_FILE).unlink()
    with pytest.raises(
        UserError,
        match=f"^{saved}: an incomplete checkpoint. Run the program that makes it to its end.$",
    ):
        load(saved)


def changed(folder, **keys):
    """Changes the record of a checkpoint, and its size in files.json."""
    file = folder / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"] |= keys
    file.write_text(json.dumps(metadata))
    sizes = json.loads((folder / CHECKSUM_FILE).read_text())
    sizes["_CHECKPOINT_METADATA"] = file.stat().st_size
    (folder / CHECKSUM_FILE).write_text(json.dumps(sizes))


def test_a_record_that_is_not_ours_is_refused(saved):
    changed(saved, config=TOY.to_hf() | {"n_layers": 3})
    with pytest.raises(
        UserError,
        match=f"^{saved}: not the parameters of this configuration: .*. Convert the checkp",
    ):
        load(saved)
    changed(saved, config=TOY.to_hf() | {"model_type": "bert"})
    with pytest.raises(
        UserError, match=f'^{saved}: model_type is "bert", which is not implemented'
    ):
        load(saved)
    changed(saved, format="something else")
    with pytest.raises(
        UserError,
        match=f"^{saved}: not a converted checkpoint of this version. Make one with python -m conv",
    ):
        load(saved)


PROCESS = """
import sys
import jax

rank, port, source, target = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import numpy as np
from xflow_jax.checkpoints import save_params
from xflow_jax.lm import load

lm = load(source, mesh="1,2,2")
assert {d.process_index for d in lm.params["wte"]["embedding"].sharding.device_set} == {0, 1}
save_params(target, lm.params, lm.config)
again, wanted = load(target, mesh="1,4,1"), load(source, mesh="1,4,1")
for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(wanted.params), strict=True):
    for mine, right in zip(x.addressable_shards, y.addressable_shards, strict=True):
        np.testing.assert_array_equal(mine.data, right.data)
np.asarray(again.logits([[1, 2, 3]]))
print("done")
"""


@pytest.mark.slow
def test_two_processes_read_and_write_their_own_shards(tmp_path, saved, params):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (tmp_path / "saved.partial").mkdir()
    shutil.copytree(saved, tmp_path / "target.partial")  # as a killed run leaves it
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROCESS,
                str(rank),
                str(port),
                str(saved),
                str(tmp_path / "target"),
            ],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [run.communicate(timeout=300)[0].splitlines()[-1] for run in runs] == ["done", "done"]
    chex.assert_trees_all_equal(load(tmp_path / "target").params, params)


def test_a_leaf_has_to_be_the_recorded_one(tmp_path, params):
    leaves = {"ln_f/scale": jnp.ones(32)}
    partial = orbax_writer.PartialCheckpoint(
        tmp_path / "saved", orbax_writer.make_record(TOY, None, leaves)
    )
    with pytest.raises(ValueError, match="ln_f/scale is .*, but the record says"):
        partial.write("ln_f/scale", jnp.ones(32, jnp.bfloat16))
    with pytest.raises(ValueError, match="ln_f/scale was never written"):
        partial.finish()
    assert not (tmp_path / "saved").exists()


def test_record_round_trip(saved):
    record = read_record(saved)
    assert dataclasses.asdict(record)["leaves"]["blocks/q_proj/kernel"] == ["float32", 2, 32, 32]
    assert record.variant is None and record.dtypes is None
