"""The mask token of a model whose config.json does not name it."""

import json
import shutil

import pytest

from convert import from_hf, to_hf, verify
from tests.family_helpers import directory
from xflow_jax.errors import UserError
from xflow_jax.lm import load, read_model_config


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(directory("illada_tiny"), tmp_path / "illada")


def tokenizer(folder, name="<[MASK]>", token=5, file="tokenizer.json"):
    if file == "tokenizer.json":
        content = {"added_tokens": [{"id": 3, "content": "<pad>"}, {"id": token, "content": name}]}
    elif file == "added_tokens.json":
        content = {"<pad>": 3, name: token}
    else:
        content = {
            "added_tokens_decoder": {"3": {"content": "<pad>"}, str(token): {"content": name}}
        }
    (folder / file).write_text(json.dumps(content))


def read(folder):
    return read_model_config(folder)[1]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_the_tokenizer_names_it(folder, file):
    tokenizer(folder, file=file)
    assert read(folder).mask_id == 5
    assert verify.inputs(read(folder))


def test_the_generation_settings_name_it(folder):
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": 5}))
    assert read(folder).mask_id == 5


def test_it_is_never_guessed(folder):
    """Neither unk nor the name of another family will do."""
    tokenizer(folder, name="<|mdm_mask|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<pad>"}))
    with pytest.raises(UserError) as error:
        _ = read(folder).mask_id
    assert str(error.value) == (
        "the model's configuration has no mask_token_id, and no tokenizer beside it <[MASK]>. "
        "Give --mask-id ID, or mask_id=ID to xflow_jax.load."
    )


def test_two_files_that_differ_are_refused(folder):
    tokenizer(folder, file="tokenizer_config.json")
    tokenizer(folder, token=6, file="added_tokens.json")
    with pytest.raises(UserError, match="5 in tokenizer_config.json and 6 in added_tokens.json"):
        read(folder)
    assert load(folder, mask_id=7).config.mask_id == 7


def test_the_user_comes_first(folder):
    """Also before config.json. A wrong value gets one sentence."""
    assert load(folder, mask_id=9).config.mask_id == 9
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 8}))
    assert read(folder).mask_id == 8 and load(folder, mask_id=9).config.mask_id == 9
    for wrong, sentence in (
        (320, "mask_token_id is 320, but the ids go from 0 to 319"),
        (300, "mask_token_id and eos_token_id are both 300"),
        ("5", "mask_id must be a token id"),
    ):
        with pytest.raises(UserError, match=sentence):
            load(folder, mask_id=wrong)


def test_a_conversion_keeps_what_was_given(folder, tmp_path):
    from_hf.convert(folder, tmp_path / "given", mask_id=5)
    assert load(tmp_path / "given").config.mask_id == 5
    to_hf.convert(tmp_path / "given", tmp_path / "hf")
    assert read(tmp_path / "hf").mask_id == 5
    tokenizer(folder, file="added_tokens.json")
    from_hf.convert(folder, tmp_path / "found")
    assert load(tmp_path / "found").config.mask_id == 5
    to_hf.convert(tmp_path / "found", tmp_path / "same")
    assert "mask_token_id" not in json.loads((tmp_path / "same" / "config.json").read_text())


def test_a_copy_of_the_tied_head_must_be_one(folder):
    from safetensors.numpy import load_file, save_file

    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = file.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table}, file)
    load(folder)
    save_file({**tensors, "lm_head.weight": 2 * table}, file)
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load(folder)
