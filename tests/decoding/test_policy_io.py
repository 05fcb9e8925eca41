"""Files of policies: round trips, messages about bad ones, and the bundled one."""

from __future__ import annotations

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers import GOLDENS
from xflow_jax.decoding.entry_policy import init_entry_policy
from xflow_jax.decoding.policy import Policy, features
from xflow_jax.decoding.policy_io import BUNDLED, load_policy, read_policy, save_policy
from xflow_jax.errors import UserError

FILE = GOLDENS / "flow" / "policy.safetensors"
RANGES = {"a_min": "0.00390625", "a_max": "1.0", "kappa_min": "2.0", "kappa_max": "50.0"}


@pytest.fixture(scope="module")
def policy():
    return load_policy(FILE)


def test_equal_policies_have_equal_bytes(policy, tmp_path):
    entries = {f"entry_{i}": i for i in range(9)}
    written = []
    for number in range(4):
        file = tmp_path / f"{number}.safetensors"
        save_policy(file, policy, **dict(reversed(entries.items()) if number % 2 else entries))
        written.append(file.read_bytes())
    assert len(set(written)) == 1


def test_a_policy_that_cannot_be_written_is_one_sentence(policy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x.safetensors: cannot be written: "):
        save_policy(tmp_path / "file" / "x.safetensors", policy)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: cannot be written: Is a directory"):
        save_policy(tmp_path / "folder", policy)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_round_trip(policy, tmp_path):
    policy = Policy(policy.params, a_min=1 / 64, a_max=0.5, kappa_min=3.0, kappa_max=9.0)
    file = tmp_path / "deep" / "p.safetensors"
    save_policy(file, policy, made_by="a test", switches="early_exit=true")
    again, switches = read_policy(file)
    assert switches == "early_exit=true"
    assert jax.tree.structure(again) == jax.tree.structure(policy)  # the ranges are a part of it
    for ours, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(policy), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["p.safetensors"]


def test_bfloat16_files_are_read(policy, tmp_path):
    from safetensors.flax import save_file as save_flax

    file = tmp_path / "p.safetensors"
    save_flax({k: v.astype(jnp.bfloat16) for k, v in policy.params.items()}, file, RANGES)
    again = load_policy(file)
    assert again.params["w1"].dtype == jnp.float32
    np.testing.assert_allclose(again.params["w1"], policy.params["w1"], rtol=1e-2)


BAD = {
    "lacks the tensors b1, w2": (lambda t: t.pop("b1") is t.pop("w2"), {}),
    "w_mu has shape [63, 1], not [64, 1]": (lambda t: t.update(w_mu=t["w_mu"][:-1]), {}),
    "w1 has shape [64, 7], not [8, 64]": (lambda t: t.update(w1=np.zeros((64, 7), np.float32)), {}),
    "w1 has shape [64, 8], not [8, 64]": (lambda t: t.update(w1=t["w1"].T.copy()), {}),
    "b_mu has shape [0], not [1]": (lambda t: t.update(b_mu=np.zeros((0,), np.float32)), {}),
    "b2 holds numbers that are not finite": (lambda t: t["b2"].__setitem__(3, np.nan), {}),
    "its metadata lack a_max, kappa_min": (lambda t: None, {"a_max": None, "kappa_min": None}),
    "in the metadata must be numbers": (lambda t: None, {"a_min": "small"}),
    "must be 0 < a_min < a_max <= 4, a_min < 1": (lambda t: None, {"a_min": "2"}),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_contents(message, tmp_path):
    change, metadata = BAD[message]
    tensors = load_file(FILE)
    change(tensors)
    metadata = {k: v for k, v in (RANGES | metadata).items() if v is not None}
    save_file(tensors, tmp_path / "p.safetensors", metadata)
    with pytest.raises(UserError) as error:
        load_policy(tmp_path / "p.safetensors")
    assert message in str(error.value) and "p.safetensors" in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_policy(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(FILE.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_policy(tmp_path / "cut.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_policy(tmp_path / "empty.safetensors")


def test_flipped_bits_are_noticed(policy, tmp_path):
    """20 of 20, in the tensors and in the metadata."""
    file, rng = tmp_path / "p.safetensors", random.Random(0)
    save_policy(file, policy, switches="early_exit=true")
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [rng.randrange(header, len(whole)) for _ in range(12)]
    places += [rng.randrange(8, header) for _ in range(4)]
    places += [whole.index(b"early_exit") + i for i in range(4)]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        with pytest.raises(UserError):
            read_policy(file)
    data[place:] = whole[place:]
    file.write_bytes(data)
    assert read_policy(file)[1] == "early_exit=true"
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="its checksum is wrong, so it is damaged. Copy it again."):
        load_policy(file)


def test_the_bundled_policy():
    """Its steps grow with the confidence. The metadata name its making, but no path."""
    policy = load_policy("tiny")
    c = jnp.array([0.5, 0.9, 0.95, 0.99])
    top = jnp.stack([c, (1 - c) / 2, (1 - c) / 4, (1 - c) / 8], axis=-1)
    a = policy.expected_step(features(top, jnp.zeros(4), 0.5))
    assert a[0] < 0.2 and a[3] > 0.9
    metadata = safe_open(BUNDLED, "numpy").metadata()
    assert "crc32" in metadata
    assert json.loads(metadata["made_by"])["config"]["model"] == "tiny-aligned"
    assert str(BUNDLED.parents[2]) not in str(metadata)


def test_entry_policies_have_files_of_their_own(tmp_path):
    policy, file = init_entry_policy(jax.random.key(0), 8, 0.7, 0.5), tmp_path / "p.safetensors"
    save_policy(file, policy, switches="reedit=always")
    again, switches = read_policy(file)
    assert switches == "reedit=always" and jax.tree.structure(again) == jax.tree.structure(policy)
    for ours, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(policy), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    tensors = load_file(file)
    for change, metadata, sentence in (
        ({}, {"above": "1.0"}, "above is 1.0, but it must be above 0 and below 1"),
        ({}, {"temperature": "0"}, "temperature is 0.0, but it must be above 0"),
        ({"alike": np.zeros(3, np.float32)}, {}, r"alike has shape \[3\], not \[4\]"),
        ({"b_in": np.zeros(7, np.float32)}, {}, "b_in has 7 numbers, no multiple of 4"),
    ):
        save_file(tensors | change, file, {"above": "0.7", "temperature": "0.5"} | metadata)
        with pytest.raises(UserError, match=sentence):
            load_policy(file)
    save_file({k: v for k, v in tensors.items() if k != "sink"}, file)
    with pytest.raises(UserError, match="lacks the tensors sink"):
        load_policy(file)
