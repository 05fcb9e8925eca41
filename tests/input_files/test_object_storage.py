"""Places in object storage, on a server on loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.gcs_helpers import BUCKET, bucket_server, use_server
from tests.s3_helpers import s3_server
from xflow_jax.checkpoints import (
    append_text,
    close_text,
    exists,
    folder_lock,
    refuse_existing,
    write_atomic,
)
from xflow_jax.errors import UserError
from xflow_jax.input_files import (
    list_objects,
    object_sizes,
    open_regular,
    read_jsonl,
    read_range,
    read_text,
    to_path,
    write_object,
)

ROOT = Path(__file__).parents[2]
# Files of the package, of the system, of temporary folders, and of other libraries.
OWN = ("Path(__file__)", 'Path("/proc', 'Path(f"/proc', "Path(folder)", "open(os.devnull")
OWN += ('Path(os.environ.get("XDG_CACHE_HOME")', "Path(os.path.realpath(", "Path(frames[")
OWN += ("Path(snapshot_download(", "Path('/proc")


SERVERS = {"gs": bucket_server, "s3": s3_server}


@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def bucket(tmp_path_factory, request):
    """A bucket of each kind. Both have the same name."""
    with SERVERS[request.param](tmp_path_factory.mktemp("server")) as variables:
        use_server(variables, request.param)
        yield to_path(f"{request.param}://{BUCKET}")


def test_a_url_is_never_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (Path("gs://bucket/run"), "gs:/bucket/run", "s3:/bucket"):
        with pytest.raises(UserError, match="two slashes must follow"):
            to_path(name)
    with pytest.raises(UserError, match=r"hdfs://host/x: a place is on a disk, or begins with gs"):
        to_path("hdfs://host/x")
    with pytest.raises(UserError, match="a bucket must follow"):
        to_path("gs://")
    assert to_path("a:b/c") == Path("a:b/c")
    assert not list(tmp_path.iterdir())


def test_every_name_of_a_user_goes_through_to_path():
    """Path(...) is for files of the package, of the system, and of temporary folders."""
    own = {"xflow_jax/input_files/paths.py"}
    found = []
    for folder in ("xflow_jax", "train", "convert"):
        for file in (ROOT / folder).rglob("*.py"):
            name = str(file.relative_to(ROOT))
            if name in own or name.startswith("xflow_jax/sandbox/"):
                continue
            for number, line in enumerate(file.read_text().splitlines(), 1):
                calls = re.findall(r"(?<![\w.])(?:Path|open)\(.+", line)
                if any(not call.startswith(OWN) for call in calls):
                    found.append(f"{name}, line {number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_a_text_is_written_and_grows(bucket):
    file = bucket / "grow" / "metrics.jsonl"
    assert not exists(file)
    expected = []
    for i in range(5):
        append_text(file, json.dumps({"step": i}) + "\n")
        expected.append({"step": i})
        assert [value for _, value in read_jsonl(file)] == expected
    assert len(object_sizes(bucket / "grow")) == 5
    close_text(file)
    assert list(object_sizes(bucket / "grow")) == ["metrics.jsonl"]
    assert [value for _, value in read_jsonl(str(file))] == expected
    append_text(file, '{"step": 5}\n')
    write_atomic(file, '{"step": 0}\n')  # as a run that continues from an earlier step
    append_text(file, '{"step": 1}\n')
    assert read_text(file) == '{"step": 0}\n{"step": 1}\n'


def test_pieces_of_another_text_are_not_read(bucket):
    file = bucket / "stale" / "answers.jsonl"
    write_atomic(file, "one\n")
    append_text(file, "two\n")
    pieces = {name: read_text(bucket / "stale" / name) for name in object_sizes(bucket / "stale")}
    write_atomic(file, "another\n")
    for name, text in pieces.items():
        if name != file.name:
            write_object(bucket / "stale" / name, text.encode())
    assert read_text(file) == "another\n"


def test_many_pieces_become_one_object(bucket, monkeypatch):
    monkeypatch.setattr("xflow_jax.input_files.object_storage.MOST_PIECES", 3)
    file = bucket / "many" / "answers.jsonl"
    for i in range(12):
        append_text(file, f"{i}\n")
        assert len(object_sizes(bucket / "many")) <= 4
    assert read_text(file).split() == [str(i) for i in range(12)]


def test_a_range_is_read_in_parts(bucket, monkeypatch):
    monkeypatch.setattr("xflow_jax.input_files.object_storage.PART", 100)
    data = np.random.default_rng(0).bytes(1234)
    write_object(bucket / "range.bin", data)
    target = bytearray(1000)
    assert read_range(bucket / "range.bin", 200, memoryview(target)) == 1000
    assert bytes(target) == data[200:1200]
    assert read_range(bucket / "range.bin", 1200, memoryview(target)) < 1000
    assert list_objects(bucket)["range.bin"][0] == 1234


def test_a_missing_object_is_one_sentence(bucket):
    with pytest.raises(UserError, match=rf"{bucket}/none.jsonl: cannot be read: there is no such"):
        open_regular(bucket / "none.jsonl")
    other = bucket.with_name("no-such-bucket") / "x"
    with pytest.raises(UserError, match=rf"^{other}: cannot be written"):
        write_atomic(other, "text")


def test_a_second_run_is_refused_and_a_dead_one_taken_over(bucket, monkeypatch):
    monkeypatch.setattr("xflow_jax.checkpoints.object_lock.POLL", 0.05)
    monkeypatch.setattr("xflow_jax.checkpoints.object_lock.BEAT", 0.1)
    folder = bucket / "run"
    with folder_lock(folder), pytest.raises(UserError, match="process .* is writing it"):
        folder_lock(folder).acquire()
    assert not exists(folder / "run.lock")
    # A holder on another machine that counts, and then one that does not.
    with folder_lock(folder), monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "other")
        with pytest.raises(UserError, match="process .* is writing it"):
            folder_lock(folder).acquire()
    monkeypatch.setattr("xflow_jax.checkpoints.object_lock.STALE", 0.3)
    record = {"host": "other", "pid": 1, "started": "", "since": "", "token": "t", "count": 3}
    write_object(folder / "run.lock", json.dumps(record).encode())
    with folder_lock(folder) as lock:
        assert lock.inherited
    write_object(folder / "run.lock", b"mine")
    with pytest.raises(UserError, match="not the lock of a program"):
        folder_lock(folder).acquire()


def test_an_incomplete_directory_does_not_count_as_existing(bucket):
    place = bucket / "model"
    write_object(place / "model.safetensors", b"half")
    with pytest.raises(UserError, match="the destination exists"):
        refuse_existing(place)
    write_object(place.with_name("model.lock"), b"{}")  # of a program that was killed
    refuse_existing(place)
    write_object(place / "config.json", b"{}")
    with pytest.raises(UserError, match="the destination exists"):
        refuse_existing(place)
