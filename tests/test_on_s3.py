"""Models on s3://, on a server on loopback: load, convert to a disk, and export back."""

from __future__ import annotations

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from convert.from_hf import convert
from convert.to_hf import convert as convert_back
from tests.gcs_helpers import BUCKET, use_server
from tests.hf_helpers import GOLDEN, TOY, random_params
from tests.s3_helpers import s3_server
from xflow_jax.checkpoints import CONFIG_FILE, write_hf
from xflow_jax.errors import UserError
from xflow_jax.input_files import (
    delete_object,
    object_sizes,
    read_bytes,
    to_path,
    write_object,
)
from xflow_jax.lm import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("server")) as variables:
        use_server(variables, "s3")
        yield to_path(f"s3://{BUCKET}")


@pytest.fixture(scope="module")
def model(bucket):
    """A model in the Hugging Face format in the bucket, in several files."""
    write_hf(bucket / "hf", random_params(TOY), TOY, GOLDEN, max_shard_size=40_000)
    return bucket / "hf"


def assert_parameters(place) -> None:
    found = flatten_dict(load(str(place)).params, sep="/")
    for name, value in flatten_dict(random_params(TOY), sep="/").items():
        np.testing.assert_array_equal(found[name], value, name)


def test_a_model_is_read_converted_and_written(bucket, model, tmp_path):
    assert len([name for name in object_sizes(model) if name.endswith(".safetensors")]) > 1
    assert_parameters(model)
    convert(str(model), tmp_path / "converted")
    assert_parameters(tmp_path / "converted")
    convert_back(tmp_path / "converted", str(bucket / "back"))
    assert_parameters(bucket / "back")
    assert read_bytes(bucket / "back" / CONFIG_FILE) == read_bytes(model / CONFIG_FILE)


def test_a_converted_checkpoint_is_refused(bucket, model):
    with pytest.raises(UserError, match="converted checkpoints and runs are on a disk or on gs://"):
        convert(str(model), str(bucket / "converted"))
    assert not object_sizes(bucket / "converted")


def test_damage_is_one_sentence_that_names_the_object(model):
    name = max(n for n in object_sizes(model) if n.endswith(".safetensors"))
    file, whole = model / name, read_bytes(model / name)
    flipped = bytearray(whole)
    flipped[-9] ^= 4
    for data in (bytes(flipped), whole[:-7], None):
        if data is None:
            delete_object(file)
        else:
            write_object(file, data)
        with pytest.raises(UserError) as error:
            load(str(model))
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        write_object(file, whole)
    assert_parameters(model)
