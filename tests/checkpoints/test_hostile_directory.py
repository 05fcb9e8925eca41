"""Directories made to do harm: names, links, sizes and pipes. Each is one quick sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convert import from_hf
from tests.helpers import GOLDENS
from xflow_jax.errors import UserError
from xflow_jax.lm import load

GOLDEN = GOLDENS / "llada_tiny"
INDEX = "model.safetensors.index.json"
TWO = "model-00002-of-00002.safetensors"

Change = Callable[[Path], object]


def names(*files: object) -> Change:
    """Writes an index that names these files."""
    index = {"weight_map": {f"t{i}": file for i, file in enumerate(files)}}
    return lambda folder: (folder / INDEX).write_text(json.dumps(index))


def config(**keys: object) -> Change:
    def change(folder: Path) -> None:
        changed = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(changed))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def header(content: object) -> Change:
    """Writes a safetensors file with this header."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / TWO).write_bytes(
        struct.pack("<Q", len(data)) + data + b"0" * 64
    )


def replace(name: str, make: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def link(name: str, target: str) -> Change:
    return replace(name, lambda file: file.symlink_to(target))


def entry(**keys: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **keys}}


NO_FILE = "is not the name of a file beside it"
DAMAGED = "not a safetensors file, or damaged"
LEAVES = "it is a link that leaves the folder of the model"
BAD: dict[str, tuple[Change, str]] = {
    "index: ..": (names(".."), NO_FILE),
    "index: .": (names("."), NO_FILE),
    "index: empty": (names(""), NO_FILE),
    "index: absolute": (names("/etc/passwd"), NO_FILE),
    "index: a number": (names(3), NO_FILE),
    "index: numbers and names": (names("a.safetensors", 3, None, ["x"]), ""),
    "index: NUL": (names("a\0b"), ""),
    "index: surrogates": (names("\ud800"), "half of a surrogate pair"),
    "index: escapes": (names("\x1b[2J/x"), r"\x1b[2J/x"),
    "index: a long name": (names("a" * 5000), ""),
    "index: a folder": (lambda f: [names("d")(f), (f / "d").mkdir()], "it is a folder"),
    "index: no names": (names(), "weight_map"),
    "index: a list": (text(INDEX, '{"weight_map": ["a"]}'), "weight_map"),
    "index: deep": (text(INDEX, "[" * 100_000), "nested deeper"),
    "index: a key twice": (text(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), "twice"),
    "index: a pipe": (replace(INDEX, os.mkfifo), "it is a pipe"),
    "config: a pipe": (replace("config.json", os.mkfifo), "it is a pipe"),
    "config: a folder": (replace("config.json", Path.mkdir), "it is a folder"),
    "config: deep": (text("config.json", '{"a":' * 100_000), "nested deeper"),
    "config: digits": (text("config.json", '{"n_layers": ' + "9" * 5000 + "}"), "many digits"),
    "config: a list": (text("config.json", "[1]"), "model_type is null"),
    "config: model_type a list": (config(model_type=[]), "model_type is []"),
    "config: layers": (config(n_layers=10**8), "the number of layers is more than 10000"),
    "config: layers of 4000 digits": (config(n_layers=10**4000), "n_layers is 1000"),
    "config: heads": (config(n_heads=2**40, d_model=2**41), "the number of heads is more than"),
    "config: width": (config(d_model=2**40), "the width of"),
    "config: MLP": (config(mlp_hidden_size=10**15), "the width of the MLP is more than"),
    "config: vocabulary": (config(vocab_size=10**12, embedding_size=10**12), "the vocabulary"),
    "config: positions": (config(max_sequence_length=10**15), "the number of positions"),
    "config: infinite": (config(rope_theta=float("inf")), "rope_theta is"),
    "config: not a number": (config(rms_norm_eps=float("nan")), "rms_norm_eps is"),
    "config: too large a number": (config(rope_theta=10**400), "rope_theta is"),
    "weights: a pipe": (replace(TWO, os.mkfifo), "it is a pipe"),
    "weights: a folder": (replace(TWO, Path.mkdir), "it is a folder"),
    "header: deep": (header(b"[" * 100_000), DAMAGED),
    "header: a number": (header(3), DAMAGED),
    "header: not UTF-8": (header(b'{"\xff": 1}'), DAMAGED),
    "header: a tensor is a number": (header({"x": 3}), DAMAGED),
    "header: a dtype is a list": (header(entry(dtype=["F32"])), "has the dtype"),
    "header: a negative shape": (header(entry(shape=[-2, -2])), DAMAGED),
    "header: a shape of texts": (header(entry(shape=["a"])), DAMAGED),
    "header: a shape that overflows": (header(entry(shape=[2**62, 4])), DAMAGED),
    "header: a huge shape": (header(entry(shape=[2**90])), DAMAGED),
    "header: three offsets": (header(entry(data_offsets=[0, 1, 2])), DAMAGED),
    "header: offsets behind the end": (
        header(entry(data_offsets=[2**40, 2**40 + 16])),
        "truncated: it has",
    ),
    "header: negative offsets": (header(entry(data_offsets=[-16, 0])), DAMAGED),
    "header: fractions": (header(entry(data_offsets=[0.0, 16.0])), DAMAGED),
    "link: config": (link("config.json", "/etc/passwd"), LEAVES),
    "link: index": (link(INDEX, "/etc/passwd"), LEAVES),
    "link: weights": (link(TWO, "/etc/passwd"), LEAVES),
    "link: a device": (link(TWO, "/dev/zero"), LEAVES),
    "link: tokenizer": (link("tokenizer.json", "/etc/passwd"), LEAVES),
    "link: a loop": (link("config.json", "config.json"), ""),
}


@pytest.mark.parametrize(("change", "sentence"), BAD.values(), ids=BAD)
def test_one_sentence_and_nothing_written(tmp_path, change, sentence):
    folder = shutil.copytree(GOLDEN, tmp_path / "source")
    change(folder)
    for read in (load, lambda path: from_hf.convert(path, tmp_path / "orbax")):
        began = time.process_time()  # other processes do not count
        with pytest.raises(UserError) as caught:
            read(folder)
        assert sentence in str(caught.value) and str(caught.value).isprintable()
        assert time.process_time() - began < 5
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["modeling_llada.py", "merges.txt", "generation_config.json"])
def test_no_file_of_the_system_gets_into_a_checkpoint(tmp_path, name):
    folder = shutil.copytree(GOLDEN, tmp_path / "source")
    secret = tmp_path / "secret"
    secret.write_text("password")
    link(name, str(secret))(folder)
    with pytest.raises(UserError, match=f"{name}: {LEAVES}"):
        from_hf.convert(folder, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()


def test_the_cache_of_the_hub_loads(tmp_path):
    """Every file of a snapshot is a link to a file of the folder `blobs`."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = shutil.copytree(GOLDEN, tmp_path / "models--owner--name" / "blobs")
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    lm = load(snapshot)
    assert lm.tokenizer is not None and lm.config == load(GOLDEN).config
    from_hf.convert(snapshot, tmp_path / "orbax")
    assert not any(file.is_symlink() for file in (tmp_path / "orbax").rglob("*"))


def test_names_of_models_that_cannot_be():
    for value in (None, 3, ["tiny"], {}):
        with pytest.raises(UserError, match="the model must be a path or a name, not "):
            load(value)
    for name in ("x" * 5000, "a\0b", "~nosuchuser/x", "/etc/passwd/x", "\ud800"):
        with pytest.raises(UserError):
            load(name)
    for name in ("tinny", "tiny-bas", "tin"):
        with pytest.raises(UserError, match="there is no model '.*'. Did you mean tiny"):
            load(name)
