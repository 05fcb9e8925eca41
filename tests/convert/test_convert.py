"""Conversion in both directions: every bit, little memory, complete or not at all."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import from_hf, to_hf, verify
from tests.family_helpers import directory as golden_directory
from tests.family_helpers import golden_arrays, golden_lm
from tests.helpers import eight
from tests.hf_helpers import GOLDEN, PREFIX, Q2, TOY, edited, random_params, tensors_of
from tests.kill_helpers import write_record
from xflow_jax.checkpoints import destination_lock, orbax_writer, read_record
from xflow_jax.checkpoints.hf_export import parse_size, write_hf
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.models.factory import abstract_params, build

# Both directions


@pytest.mark.parametrize("mesh", [None, pytest.param("1,8,1", marks=eight)])
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_round_trip_bit_for_bit(tmp_path, dtype, mesh):
    from_hf.convert(GOLDEN, tmp_path / "orbax", dtype, mesh)
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(GOLDEN)
    config = json.loads((GOLDEN / "config.json").read_text())
    assert list(json.loads((tmp_path / "hf" / "config.json").read_text()).items()) == list(
        config.items()
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (GOLDEN / name).exists():
            assert (tmp_path / "hf" / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_round_trip_of_mixed_dtypes_and_of_a_chat_template(tmp_path):
    def mix(tensors):
        tensors[Q2] = tensors[Q2].astype(np.float32) / 3
        tensors[PREFIX + "ln_f.weight"] = (
            np.random.default_rng(0).normal(size=64).astype(np.float16)
        )
        tensors[PREFIX + "blocks.0.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    source = edited(tmp_path / "mixed", mix)
    template = b"{{ messages[0]['content'] }}\n"
    (source / "chat_template.jinja").write_bytes(template)
    from_hf.convert(source, tmp_path / "orbax")
    record = read_record(tmp_path / "orbax")
    assert record.leaves["blocks/q_proj/kernel"][0] == "float32", "the widest of its layers"
    assert record.leaves["blocks/k_proj/kernel"][0] == "bfloat16"
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf", max_shard_size=90_000)
    wanted = tensors_of(source)
    del wanted[PREFIX + "blocks.0.rotary_emb.inv_freq"]
    assert tensors_of(tmp_path / "hf") == wanted
    assert (tmp_path / "hf" / "chat_template.jinja").read_bytes() == template


@pytest.mark.parametrize(
    "changes",
    [
        {"include_bias": True},
        {"weight_tying": True, "embedding_size": 48},
        {"n_kv_heads": 2, "include_qkv_bias": True},
    ],
)
def test_every_shape_of_model_travels(tmp_path, changes):
    config = dataclasses.replace(TOY, **changes)
    params = random_params(config)
    write_hf(tmp_path / "hf", params, config)
    from_hf.convert(tmp_path / "hf", tmp_path / "orbax")
    for directory in (tmp_path / "hf", tmp_path / "orbax"):
        jax.tree.map(np.testing.assert_array_equal, load(directory).params, params)
        assert load(directory).config.to_hf() == config.to_hf()


def test_files_of_at_most_a_size(tmp_path):
    from_hf.convert(GOLDEN, tmp_path / "orbax")
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf", max_shard_size=100_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert index["metadata"]["total_size"] == sum(
        len(data) for _, _, data in tensors_of(GOLDEN).values()
    )
    for file in files:
        names = set(load_file(tmp_path / "hf" / file))
        assert names == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(len(tensors_of(GOLDEN)[name][2]) for name in names) <= 100_000


def test_other_dtypes_on_request(tmp_path):
    wide = edited(
        tmp_path / "wide",
        lambda t: t.update({name: x.astype(np.float32) / 3 for name, x in t.items()}),
    )
    from_hf.convert(wide, tmp_path / "narrow", "bfloat16")
    to_hf.convert(tmp_path / "narrow", tmp_path / "hf")
    rounded = {
        name: x.astype(ml_dtypes.bfloat16)
        for name, x in load_file(wide / "model.safetensors").items()
    }
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(
        ours[name].dtype == x.dtype and ours[name].tobytes() == x.tobytes()
        for name, x in rounded.items()
    )
    to_hf.convert(tmp_path / "narrow", tmp_path / "float32", "float32")
    assert {x.dtype for x in load_file(tmp_path / "float32" / "model.safetensors").values()} == {
        np.dtype("float32")
    }


def test_the_record_says_where_it_comes_from(tmp_path):
    from_hf.convert(GOLDEN, tmp_path / "orbax")
    record = read_record(tmp_path / "orbax")
    assert record.config == json.loads((GOLDEN / "config.json").read_text())
    files = [*GOLDEN.glob("*.safetensors"), GOLDEN / "config.json"]
    assert record.provenance == {
        "source": "llada_tiny",
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "dtype": "keep",
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("4GiB", 2**32), ("1.5kB", 1500), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5TB", "five"])
def test_sizes_that_are_none(text):
    with pytest.raises(
        UserError, match=re.escape(f"size {text!r} must be a positive number of bytes, like 5GB")
    ):
        parse_size(text)


# Stopped and continued


class Stop(BaseException):
    """Stands for a kill of the program."""


def stop_at(monkeypatch, count, error=Stop):
    """Makes the write after `count` ones raise. Returns the list of the written paths."""
    written = []
    plain = orbax_writer.PartialCheckpoint.write

    def write(self, path, leaf):
        if len(written) == count:
            # Orbax leaves such a directory when it is killed.
            (self.partial / "blocks.half.orbax-checkpoint-tmp").mkdir()
            raise error
        plain(self, path, leaf)
        written.append(path)

    monkeypatch.setattr(orbax_writer.PartialCheckpoint, "write", write)
    return written


def test_a_stopped_conversion_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        first = stop_at(patch, 4)
        with pytest.raises(Stop):
            from_hf.convert(GOLDEN, tmp_path / "orbax")
    assert [file.name for file in tmp_path.iterdir()] == ["orbax.partial"]
    with pytest.raises(
        UserError, match="orbax: it is not complete yet. See orbax.partial beside it."
    ):
        load(tmp_path / "orbax")
    for half in (
        tmp_path / "orbax.partial",
        shutil.copytree(tmp_path / "orbax.partial", tmp_path / "renamed"),
    ):
        with pytest.raises(
            UserError, match="an incomplete checkpoint. Run the program that makes it to its end."
        ):
            load(half)
    shutil.rmtree(tmp_path / "renamed")
    with monkeypatch.context() as patch:
        second = stop_at(patch, -1)
        from_hf.convert(GOLDEN, tmp_path / "orbax")
    assert len(first) == 4 and not set(first) & set(second)
    assert set(first) | set(second) == set(read_record(tmp_path / "orbax").leaves)
    assert [file.name for file in tmp_path.iterdir()] == ["orbax"]
    assert not list((tmp_path / "orbax").glob("*tmp*"))
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(GOLDEN)


def test_only_the_same_conversion_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stop):
            from_hf.convert(GOLDEN, tmp_path / "orbax")
    other = edited(tmp_path / "llada_tiny", lambda tensors: tensors[Q2].__imul__(2))
    sentence = (
        f"{tmp_path}/orbax.partial: begun from another source or with other options. Delete it, "
        f"or choose another destination than {tmp_path}/orbax."
    )
    for source, dtype in ((other, "keep"), (GOLDEN, "float32")):
        with pytest.raises(UserError, match=re.escape(sentence)):
            from_hf.convert(source, tmp_path / "orbax", dtype)
    from_hf.convert(GOLDEN, tmp_path / "orbax")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 536 bytes to file 14: No space left "
            "[os_error_code='28']"
        ),
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, error):
    class Full:
        saves = 0

        def save(self, *args, **kw):
            Full.saves += 1
            if Full.saves > 3:
                raise error
            return plain(self, *args, **kw)

    plain = orbax_writer.ocp.Checkpointer.save
    with monkeypatch.context() as patch:
        patch.setattr(orbax_writer.ocp.Checkpointer, "save", Full.save)
        note = (
            ". The parameters written so far are kept, and the same command continues from there."
        )
        with pytest.raises(UserError, match=f"^{tmp_path}/orbax: the disk is full{note}$"):
            from_hf.convert(GOLDEN, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
    from_hf.convert(GOLDEN, tmp_path / "orbax")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xflow_jax.checkpoints.hf_export._tensors", full)
    with pytest.raises(UserError, match=f"^{tmp_path}/hf: the disk is full$"):
        to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    assert [file.name for file in tmp_path.iterdir()] == ["orbax"]


def test_two_programs_never_write_one_destination(tmp_path):
    from_hf.convert(GOLDEN, tmp_path / "source")
    with destination_lock(tmp_path / "orbax"), destination_lock(tmp_path / "hf"):
        for convert, source, name in (
            (from_hf.convert, GOLDEN, "orbax"),
            (to_hf.convert, tmp_path / "source", "hf"),
        ):
            with pytest.raises(UserError, match=f"{name}: process {os.getpid()} on .* is writing"):
                convert(source, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_what_killed_conversions_left_is_no_obstacle(tmp_path):
    """A kill while from_hf began its first directory, and one while to_hf wrote a tensor."""
    (tmp_path / "orbax.partial.orbax-checkpoint-tmp" / "config").mkdir(parents=True)
    write_record(tmp_path / "orbax.lock")
    from_hf.convert(GOLDEN, tmp_path / "orbax")
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "model.safetensors").write_bytes(b"half")
    write_record(tmp_path / "hf.lock")
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(GOLDEN)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "orbax"]


# As commands


def program(monkeypatch, module, *arguments):
    """Runs `python -m module` in this process. Returns the exit status."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, module, raising=False)
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_commands(tmp_path, monkeypatch, capsys):
    orbax, back = tmp_path / "orbax", tmp_path / "hf"
    assert program(monkeypatch, "convert.from_hf", GOLDEN, orbax, "--dtype", "bfloat16") == 0
    out, err = capsys.readouterr()
    assert out == f"{GOLDEN} -> {orbax}\n" and "hashing: 100%" in err and "converting: 100%" in err
    assert program(monkeypatch, "convert.to_hf", orbax, back, "--max-shard-size", "1MB") == 0
    out, err = capsys.readouterr()
    assert out == f"{orbax} -> {back}\n" and "writing: 100%" in err
    assert tensors_of(back) == tensors_of(GOLDEN)
    mistakes = {
        (
            "convert.from_hf",
            GOLDEN,
            orbax,
        ): f"{orbax}: the destination exists. Choose another one, or delete it.",
        ("convert.from_hf", orbax, tmp_path / "x"): (
            f"{orbax}: already converted. Load it, or convert it back with python -m convert.to_hf."
        ),
        (
            "convert.to_hf",
            orbax,
            back,
        ): f"{back}: the destination exists. Choose another one, or delete it.",
        ("convert.to_hf", GOLDEN, tmp_path / "x"): (
            f"{GOLDEN}: not a converted checkpoint. Make one with python -m convert.from_hf."
        ),
        ("convert.to_hf", tmp_path / "no", tmp_path / "x"): (
            f"{tmp_path}/no: there is no such directory. Make one with python -m convert.from_hf."
        ),
        ("convert.to_hf", orbax, tmp_path / "x", "--max-shard-size", "much"): (
            "size 'much' must be a positive number of bytes, like 5GB, 500MB or 4GiB"
        ),
        ("convert.from_hf", GOLDEN, tmp_path / "x", "--mesh", "8"): (
            "mesh '8' must be three positive sizes, of data, fsdp, tensor, like 1,8,1"
        ),
    }
    for command, sentence in mistakes.items():
        assert program(monkeypatch, *command) == 2
        assert capsys.readouterr() == ("", f"error: {sentence}\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "orbax"]


def test_an_interrupted_command_says_so(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 1, KeyboardInterrupt)
    assert program(monkeypatch, "convert.from_hf", GOLDEN, tmp_path / "orbax") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


# Comparison with the original


def test_verify_needs_torch_trust_and_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert program(monkeypatch, "convert.verify", GOLDEN) == 2
    sentence = (
        "convert.verify runs the original PyTorch code, but torch is not installed: "
        "pip install -e '.[convert]'"
    )
    assert capsys.readouterr() == ("", f"error: {sentence}\n")
    monkeypatch.setitem(sys.modules, "torch", object())
    assert program(monkeypatch, "convert.verify", GOLDEN) == 2
    sentence = (
        "its modelling code would be run. Read it, and pass --trust-remote-code if you trust it."
    )
    assert capsys.readouterr() == ("", f"error: {GOLDEN}: {sentence}\n")
    plain = edited(tmp_path / "plain", drop=["auto_map"])
    assert program(monkeypatch, "convert.verify", plain, "--trust-remote-code") == 2
    sentence = "no auto_map names the original's code, so there is nothing to run"
    assert capsys.readouterr() == ("", f"error: {plain}/config.json: {sentence}\n")


def test_verify_distinguishes_equal_from_different_models():
    """Uses our own model as the original, because the tests have no torch."""
    lm = load(GOLDEN)
    same = verify.verify(GOLDEN, lambda cases: [np.asarray(lm.logits(ids)) for ids in cases])
    assert [d.agreement for d in same] == [1, 1] and max(d.largest for d in same) == 0
    noise = np.random.default_rng(0)
    off = verify.verify(
        GOLDEN, lambda cases: [x + noise.normal(size=x.shape) for x in map(lm.logits, cases)]
    )
    assert (
        min(d.relative for d in off) > 100 * verify.TOLERANCE and max(d.agreement for d in off) < 1
    )
    with pytest.raises(
        UserError, match=re.escape("the original's logits are [1, 32, 512], ours [1, 32, 520]")
    ):
        verify.verify(
            GOLDEN, lambda cases: [np.asarray(lm.logits(ids))[..., :512] for ids in cases]
        )


@pytest.mark.slow
def test_verify_compares_under_block_causal_attention():
    name = "sdar_tiny"
    lm, golden, size = (
        golden_lm(name),
        golden_arrays(name),
        int(golden_arrays(name)["block_size_0"]),
    )
    np.testing.assert_array_equal(
        verify.block_mask(golden["block_allowed_0"].shape[0], size)[0, 0],
        golden["block_allowed_0"],
    )

    def original(cases):
        return [np.asarray(lm.logits(ids, block_length=size)) for ids in cases]

    found = verify.verify(golden_directory(name), original, block_length=size)
    assert max(d.largest for d in found) == 0
    full = verify.verify(golden_directory(name), original)
    assert min(d.relative for d in full) > verify.TOLERANCE


def test_verify_passes_blocks_as_the_code_takes_them():
    def of_sdar(input_ids, attention_mask=None, **_): ...
    def of_fast_dllm_v2(input_ids, attention_mask=None, block_size=32, **_): ...

    assert verify.block_options(of_sdar, 6, None) == {}
    assert verify.block_options(of_fast_dllm_v2, 6, 4) == {"block_size": 4}
    (mask,) = verify.block_options(of_sdar, 6, 4).values()
    np.testing.assert_array_equal(mask, verify.block_mask(6, 4))
    # Each input crosses the end of a block, however long it is.
    config = golden_lm("fastdllm2_tiny").config
    assert [ids.shape for ids in verify.inputs(config, 32)] == [(1, 64), (2, 49)]
    assert [ids.shape for ids in verify.inputs(config)] == [(1, 32), (2, 17)]


# Memory

MEASURE = """
import sys
import jax

jax.devices()
from convert import from_hf, to_hf

def memory(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

before = memory("VmRSS")
program, *arguments = sys.argv[1:]
{"from_hf": from_hf, "to_hf": to_hf}[program].convert(*arguments)
print(memory("VmHWM") - before)
"""


def peak(*arguments):
    """Returns the bytes that a conversion adds to the memory in use before it."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_of_a_gigabyte(tmp_path):
    """Needs at most three times the largest parameter, and 3.5 times on the way back."""
    config = dataclasses.replace(
        TOY, d_model=1024, n_layers=22, mlp_hidden_size=4096, vocab_size=65536
    )
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(2**27, np.float32).astype(ml_dtypes.bfloat16)

    def random(x):
        size = int(np.prod(x.shape))
        return pool[(start := rng.integers(0, pool.size - size)) : start + size].reshape(x.shape)

    params = jax.tree.map(random, abstract_params(build(config)))
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    assert sum(sizes) > 1e9
    write_hf(tmp_path / "hf", params, config, max_shard_size=4 * 10**8)
    used = {
        name: peak("from_hf", tmp_path / "hf", tmp_path / name, *rest) / max(sizes)
        for name, *rest in (("one", "keep"), ("eight", "keep", "1,8,1"), ("int8", "int8"))
    }
    used["back"] = peak("to_hf", tmp_path / "one", tmp_path / "back") / max(sizes)
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "hf")
    print({name: round(times, 2) for name, times in used.items()})
    assert used["one"] < 3 and used["eight"] < 3 and used["back"] < 3.5
    assert used["int8"] < 3
