"""Checksums: every flipped bit is noticed, and nothing else is."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.hf_helpers import GOLDEN, TOY, random_params
from xflow_jax.checkpoints import checksums
from xflow_jax.checkpoints.checksums import (
    CHECKSUM_FILE,
    find_damage,
    first_damage,
    write_checksums,
)
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.checkpoints.orbax_checkpoint import ORBAX_METADATA
from xflow_jax.checkpoints.orbax_writer import save_params
from xflow_jax.errors import UserError
from xflow_jax.lm import load, read_model_config


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """The same model as a converted checkpoint, and in the Hugging Face format in several files."""
    folder, params = tmp_path_factory.mktemp("models"), random_params(TOY)
    save_params(folder / "converted", params, TOY, GOLDEN)
    write_hf(folder / "hf", params, TOY, GOLDEN, max_shard_size=40_000)
    return {name: folder / name for name in ("converted", "hf")}


def flip(file: Path, place: int) -> None:
    """Flips one bit of a file."""
    data = bytearray(file.read_bytes())
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["converted", "hf"])
def test_flipped_bits_are_noticed(directories, kind):
    """20 of 20, in any file of the weights."""
    folder, rng = directories[kind], random.Random(0)
    files = sorted(folder / name for name in json.loads((folder / CHECKSUM_FILE).read_text()))
    assert len(files) > (10 if kind == "converted" else 1)
    # In proportion to the sizes, as a bad disk would.
    for file in rng.choices(files, [file.stat().st_size for file in files], k=20):
        place = rng.randrange(8 * file.stat().st_size)
        flip(file, place)
        with pytest.raises(UserError) as error:
            load(folder)
        flip(file, place)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    load(folder)


def test_the_sentence_of_each_format(directories):
    state = "the file has another checksum than when it was written"
    file = max(directories["converted"].rglob("d/*"), key=lambda file: file.stat().st_size)
    flip(file, 999)
    sentence = f"{file}: {state}. Copy or convert the checkpoint again."
    for read in (load, read_model_config):  # small files are compared even for the latter
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
            read(directories["converted"])
    flip(file, 999)
    file = max(directories["hf"].glob("*.safetensors"))
    flip(file, 8 * file.stat().st_size - 1)
    sentence = f"{file}: {state}. Copy it again. "
    sentence += "If it was replaced on purpose, delete files.json beside it."
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        load(directories["hf"])
    flip(file, 8 * file.stat().st_size - 1)


def test_a_marker_without_data_names_a_missing_file(directories, tmp_path):
    for name in (CHECKSUM_FILE, ORBAX_METADATA):
        shutil.copy(directories["converted"] / name, tmp_path)
    sentence = f"^{tmp_path}/.+: the file is missing. Copy or convert the checkpoint again.$"
    with pytest.raises(UserError, match=sentence):
        load(tmp_path)


def test_large_files_can_be_left_out(directories, monkeypatch):
    """XFLOW_VERIFY=0 does so. Programs that read no parameters leave them out by themselves."""
    monkeypatch.setattr(checksums, "SMALL", 0)
    converted, hf = directories["converted"], directories["hf"]
    changed = [max(converted.rglob("d/*"), key=lambda file: file.stat().st_size)]
    changed += [max(hf.glob("*.safetensors"))]
    places = [8 * file.stat().st_size - 3 for file in changed]
    for file, place in zip(changed, places, strict=True):
        flip(file, place)
    read_model_config(converted)
    for folder in (converted, hf):
        with pytest.raises(UserError, match="another checksum"):
            load(folder)
    monkeypatch.setenv("XFLOW_VERIFY", "0")
    load(hf)
    monkeypatch.setenv("XFLOW_VERIFY", "1")
    for file, place in zip(changed, places, strict=True):
        flip(file, place)


def test_sizes_alone_are_those_of_an_older_checkpoint(directories):
    file = directories["converted"] / CHECKSUM_FILE
    whole = file.read_text()
    sizes = {name: size for name, (size, _) in json.loads(whole).items()}
    file.write_text(json.dumps(sizes))
    load(directories["converted"])
    file.write_text(whole)


def test_the_kinds_of_checksums(tmp_path):
    """A record names its kind. The CRC-32 of older records is compared as well."""
    file = tmp_path / "a"
    file.write_bytes(b"123456789")
    write_checksums(tmp_path, CHECKSUM_FILE)
    record = tmp_path / CHECKSUM_FILE
    assert json.loads(record.read_text()) == {"a": [9, "crc32c:4waSgw=="]}
    for kind in ("crc32c:4waSgw==", "cbf43926"):
        record.write_text(json.dumps({"a": [9, kind]}))
        assert find_damage(tmp_path, CHECKSUM_FILE) is None
        flip(file, 11)
        damage = "a has another checksum than when it was written"
        assert find_damage(tmp_path, CHECKSUM_FILE) == damage
        flip(file, 11)


def test_without_google_crc32c(tmp_path, monkeypatch):
    """New records have CRC-32, and of those with CRC-32C the sizes count alone."""
    file, record = tmp_path / "a", tmp_path / CHECKSUM_FILE
    file.write_bytes(b"123456789")
    monkeypatch.setattr(checksums, "google_crc32c", None)
    write_checksums(tmp_path, CHECKSUM_FILE)
    assert json.loads(record.read_text()) == {"a": [9, "cbf43926"]}
    flip(file, 11)
    assert find_damage(tmp_path, CHECKSUM_FILE) is not None
    record.write_text(json.dumps({"a": [9, "crc32c:4waSgw=="]}))
    assert find_damage(tmp_path, CHECKSUM_FILE) is None
    file.write_bytes(b"1234")
    assert find_damage(tmp_path, CHECKSUM_FILE) is not None


@pytest.mark.parametrize("content", ["[1]", '{"NAME": {"a": 1}}', "{}"])
def test_a_file_of_this_name_by_another_program(directories, content):
    file = directories["hf"] / CHECKSUM_FILE
    whole = file.read_text()
    file.write_text(content.replace("NAME", min(directories["hf"].glob("*.safetensors")).name))
    load(directories["hf"])
    file.write_text(whole)


def test_any_directory(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("a", "b", "part/c"):
        (tmp_path / name).write_text(name * 100)
    assert find_damage(tmp_path, CHECKSUM_FILE) is None  # there is nothing to compare
    write_checksums(tmp_path, CHECKSUM_FILE, without=["b"])
    assert json.loads((tmp_path / CHECKSUM_FILE).read_text()).keys() == {"a", "part/c"}
    (tmp_path / "b").write_text("changed")
    assert find_damage(tmp_path, CHECKSUM_FILE) is None
    flip(tmp_path / "part" / "c", 7)
    assert (
        find_damage(tmp_path, CHECKSUM_FILE)
        == "part/c has another checksum than when it was written"
    )
    (tmp_path / "a").write_text("a")
    assert find_damage(tmp_path, CHECKSUM_FILE) == "a has 1 bytes, not 100"
    (tmp_path / "a").unlink()
    assert find_damage(tmp_path, CHECKSUM_FILE) == "a is missing"
    (tmp_path / CHECKSUM_FILE).write_text("{")
    assert find_damage(tmp_path, CHECKSUM_FILE) == "files.json is damaged"


def test_several_processes_share_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "SMALL", 2)
    for name in "abcd":
        (tmp_path / name).write_text(name)
    (tmp_path / "large").write_text("large")
    (tmp_path / "larger").write_text("larger")
    write_checksums(tmp_path, CHECKSUM_FILE)
    listed = json.loads((tmp_path / CHECKSUM_FILE).read_text())
    read = []
    plain = checksums.file_checksum
    monkeypatch.setattr(
        checksums,
        "file_checksum",
        lambda path, kind: read.append(path.name) or plain(path, kind),
    )
    monkeypatch.setattr(checksums.jax, "process_count", lambda: 2)
    for index, mine in enumerate(["large", "larger"]):
        read.clear()
        monkeypatch.setattr(checksums.jax, "process_index", lambda index=index: index)
        assert first_damage(tmp_path, listed, large=True, shared=True) is None
        assert sorted(read) == ["a", "b", "c", "d", mine]
    read.clear()
    assert find_damage(tmp_path, CHECKSUM_FILE) is None and len(read) == 6  # of one process alone
