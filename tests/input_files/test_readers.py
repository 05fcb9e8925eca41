"""Readers of text, JSON, jsonl and TOML: right values, and one sentence for each bad file."""

from __future__ import annotations

import gzip
import json
import os
import time

import pytest

from xflow_jax.errors import UserError
from xflow_jax.input_files import (
    MOST_BYTES,
    MOST_DEPTH,
    file_inside,
    parse_toml,
    read_json,
    read_json_object,
    read_jsonl,
    read_text,
    read_toml,
)


@pytest.fixture(params=["plain", "BOM"])
def bom(request) -> bytes:
    return {"plain": b"", "BOM": b"\xef\xbb\xbf"}[request.param]


def test_right_files(tmp_path, bom):
    file = tmp_path / "x"
    file.write_bytes(bom + b'{"a": [1, 2.5, "\\ud83d\\ude00"]}')
    assert read_json(file) == read_json_object(file) == {"a": [1, 2.5, "\U0001f600"]}
    file.write_bytes(bom + b"a.b = 1\n# a comment\n")
    assert read_toml(file) == {"a": {"b": 1}}
    lines = bom + b'\n{"a": 1}\n \n\r\n  2\n"\xe2\x80\xa8"'
    for data in (lines, lines + b"\n", gzip.compress(lines)):
        file.write_bytes(data)
        assert list(read_jsonl(file)) == [(2, {"a": 1}), (5, 2), (6, "\u2028")]
    file.write_bytes(bom)
    assert list(read_jsonl(file)) == [] and read_text(file) == ""


def test_lines_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("xflow_jax.input_files.readers._CHUNK", 3)
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\n\n[1, 2]\n\n\n"abcdefgh"\n3')
    assert list(read_jsonl(file)) == [(3, [1, 2]), (6, "abcdefgh"), (7, 3)]


def test_a_last_line_that_a_crash_cut_off(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": 2')
    assert list(read_jsonl(file, cut_end=True)) == [(1, {"a": 1})]
    with pytest.raises(UserError, match=r"x.jsonl, line 2 is no JSON: .* at column 8"):
        list(read_jsonl(file))
    file.write_bytes(b'{"a": 1\n{"a": 2')  # the first line is complete, and damaged
    with pytest.raises(UserError, match="line 1 is no JSON"):
        list(read_jsonl(file, cut_end=True))


DEEP = b"[" * 200_000
BAD_JSON = {
    "empty": (b"", "it is empty"),
    "blanks": (b" \n", "it is empty"),
    "cut": (b'{"a": [1, ', "Expecting value at column 11"),
    "too deep to parse": (DEEP, "nested deeper than"),
    "too deep to use": (b"[" * 500 + b"]" * 500, "nested deeper than"),
    "objects inside each other": (b'{"a":' * 150 + b"1" + b"}" * 150, "nested deeper than"),
    "digits": (b"1" * 5000, "a number of too many digits"),
    "NUL": (b'{"a": \x00}', "Expecting value"),
    "not UTF-8": (b'{"a": "\xff"}', "is not UTF-8 text"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
    "key twice": (b'{"a": 1, "b": 2, "a": 3}', 'the key "a" is there twice'),
    "surrogate": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "surrogate in a key": (b'{"\\udc00": 1}', "half of a surrogate pair"),
}


@pytest.mark.parametrize(("data", "sentence"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(tmp_path, data, sentence):
    file = tmp_path / "x.json"
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"^{file}") as caught:
        read_json(file)
    assert sentence in str(caught.value)
    if not data.strip():
        return
    file.write_bytes(b"1\n" + data.replace(b"\n", b" ") + b"\n")
    with pytest.raises(UserError, match=f"^{file}, line 2 is n") as caught:
        list(read_jsonl(file))
    assert sentence in str(caught.value)


def test_the_deepest_json(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("[" * MOST_DEPTH + "]" * MOST_DEPTH)
    assert read_json(file)
    file.write_text("[" + "[1, 2], " * 500 + "[]]")  # many brackets, but flat
    assert len(read_json(file)) == 501
    file.write_text("3")
    with pytest.raises(UserError, match="must hold a JSON object"):
        read_json_object(file)


BAD_TOML = {
    "syntax": ("out = ", "Invalid value"),
    "deep": ("a = " + "[" * 100_000, "nested deeper than"),
    "deep enough to parse": ("a = " + "[" * 150 + "]" * 150, "nested deeper than"),
    "digits": ("a = " + "1" * 5000, "a number of too many digits"),
    "dots": ("a" + ".a" * 100_000 + " = 1", "a key has more than 64 dots"),
    "dots in a table": ("x = {" + "a" + ' . "a"' * 100_000 + " = 1}", "more than 64 dots"),
    "dots in a header": ("[a" + ".a" * 100_000 + "]", "more than 64 dots"),
    "key twice": ("a = 1\na = 2", "Cannot overwrite a value"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD_TOML.values(), ids=BAD_TOML)
def test_bad_toml(tmp_path, text, sentence):
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{file}: not valid TOML: ") as caught:
        read_toml(file)
    assert sentence in str(caught.value)


def test_numbers_with_dots_are_no_long_key():
    assert parse_toml(f'a = "{"." * 500}"\nb = [{"1.5, " * 500}]', "x")


def test_no_reader_waits_for_a_pipe_or_a_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    places = [(pipe, "a pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")]
    places += [(tmp_path / "none", "No such file"), (f"{pipe}/x", "Not a directory")]
    places += [("a\0b", "no file can have this name"), ("\ud800", "no file can have this name")]
    for path, sentence in places:
        for reader in (read_json, read_toml, read_text, lambda path: list(read_jsonl(path))):
            began = time.monotonic()
            with pytest.raises(UserError, match="cannot be read: ") as caught:
                reader(path)
            assert sentence in str(caught.value) and time.monotonic() - began < 60


def test_large_files(tmp_path):
    file = tmp_path / "x"
    with file.open("wb") as f:
        f.truncate(2**40)  # takes no space on the disk
    for reader in (read_json, read_toml):
        with pytest.raises(UserError, match=f"it has more than {MOST_BYTES} bytes"):
            reader(file)
    with pytest.raises(UserError, match=f"line 1 has more than {MOST_BYTES} bytes"):
        list(read_jsonl(file))


@pytest.mark.parametrize("filler", [b"\n", b"\0", b" ", b" \n"])
def test_a_gzip_bomb(tmp_path, monkeypatch, filler):
    monkeypatch.setattr("xflow_jax.input_files.readers.MOST_BYTES", 2**22)
    file = tmp_path / "x.jsonl.gz"
    block = filler * (2**24 // len(filler))
    with gzip.open(file, "wb", compresslevel=9) as f:
        for _ in range(4):
            f.write(block)
    began = time.process_time()  # other processes do not count
    with pytest.raises(UserError, match="cannot be read: "):
        list(read_jsonl(file))
    assert time.process_time() - began < 5


def test_broken_gzip(tmp_path):
    file = tmp_path / "x.jsonl.gz"
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for data in (b"\x1f\x8bnonsense", whole[:-9], whole[:20] + b"\xff" * 20 + whole[40:]):
        file.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read: "):
            list(read_jsonl(file))


def test_links_stay_inside(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.write_text(json.dumps(3))
    (model / "real.json").write_text("1")
    (model / "inside.json").symlink_to("real.json")
    (model / "outside.json").symlink_to(other)
    (model / "loop.json").symlink_to("loop.json")
    (model / "chain.json").symlink_to("outside.json")
    (tmp_path / "link").symlink_to(model)
    for folder in (model, tmp_path / "link"):
        for name in ("real.json", "inside.json", "missing.json"):
            assert file_inside(folder, name) == folder / name
        for name in ("outside.json", "chain.json"):
            with pytest.raises(UserError, match=f"{name}: it is a link that leaves the folder"):
                file_inside(folder, name)
        with pytest.raises(UserError, match="cannot be read: "):
            read_json(file_inside(folder, "loop.json"))


def test_links_of_the_cache_of_the_hub(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text("1")
    (repository / "secret").write_text("2")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "bad.json").symlink_to("../../secret")
    assert read_json(file_inside(snapshot, "config.json")) == 1
    with pytest.raises(UserError, match="a link that leaves"):
        file_inside(snapshot, "bad.json")
