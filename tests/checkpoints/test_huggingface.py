"""Hugging Face format: weight tables in both directions, lazy reading in shards, bad input."""

import dataclasses
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from convert import from_hf
from tests.family_helpers import family_config
from tests.helpers import eight, read_arrays
from tests.hf_helpers import GOLDEN, GOLDEN2, PREFIX, Q2, TOY, edited, tensors_of
from tests.llada2_helpers import TINY2
from xflow_jax.checkpoints import huggingface, leaf_shards, safetensors_reader, weight_map
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.logical_axes import AXES, shardings
from xflow_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("family", weight_map.WEIGHT_TABLES)
def test_the_tables_list_the_parameters_of_the_shardings(family):
    for variant in weight_map.WEIGHT_TABLES[family].values():
        config = {"llada": TOY, "llada2": TINY2}.get(family)
        assert set(variant(config or family_config(family))) == set(AXES[family])


def test_the_mapping_names_every_tensor_of_the_golden_checkpoint():
    config = huggingface.read_hf_config(GOLDEN)
    mapping = weight_map.map_weights(config, abstract_params(build(config)))
    assert mapping.tensors == {name: shape for name, (_, shape, _) in tensors_of(GOLDEN).items()}


def test_biases_and_a_tied_head_have_their_tensors():
    names = set(weight_map.map_weights(TOY, abstract_params(build(TOY))).tensors)
    biased = dataclasses.replace(TOY, include_bias=True)
    more = set(weight_map.map_weights(biased, abstract_params(build(biased))).tensors)
    linears = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    wanted = {f"{PREFIX}blocks.{i}.{name}.bias" for i in range(2) for name in linears} | {
        PREFIX + "ff_out.bias"
    }
    assert more - names == wanted
    tied = dataclasses.replace(TOY, weight_tying=True)
    assert names - set(weight_map.map_weights(tied, abstract_params(build(tied))).tensors) == {
        PREFIX + "ff_out.weight"
    }


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="no tensors for the llada parameter blocks/q_porj"):
        weight_map.map_weights(
            TOY, {"blocks": {"q_porj": jax.ShapeDtypeStruct((2, 2), jnp.float32)}}
        )


def _single(config):
    leaf = weight_map.TensorSource
    return {
        "q": leaf("layers.{layer}.qkv.weight", transpose=True),
        "k": leaf("layers.{layer}.qkv.weight", transpose=True),
        "b": leaf("layers.{layer}.qkv.bias"),
        "o": leaf("layers.{layer}.out.weight", transpose=True),  # square, so no shape reveals it
        "up": leaf("layers.{layer}.experts.{expert}.up.weight", transpose=True, first_layer=1),
    }


def _stacked(config):
    return _single(config) | {
        "up": weight_map.TensorSource("layers.{layer}.up", transpose=True, first_layer=1)
    }


@pytest.fixture
def family(monkeypatch):
    """Makes a family with a fused matrix, and experts in separate tensors or stacked in one."""
    monkeypatch.setitem(
        weight_map.WEIGHT_TABLES, "made_up", {"single": _single, "stacked": _stacked}
    )

    @dataclasses.dataclass(frozen=True)
    class Config:
        family: str = "made_up"

    shapes = {"q": (2, 5, 6), "k": (2, 5, 3), "b": (2, 6), "o": (2, 5, 5)}
    shapes["up"] = (3, 4, 5, 7)
    return Config(), {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
    }


def test_fused_and_expert_tensors_split_and_stack(family, tmp_path):
    config, abstract = family
    rng = np.random.default_rng(0)
    for variant in ("single", "stacked"):
        mapping = weight_map.map_weights(config, abstract, variant=variant)
        tensors = {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in mapping.tensors.items()
        }
        assert mapping.tensors["layers.1.qkv.weight"] == (9, 5)
        assert weight_map.map_weights(config, abstract, names=tensors).variant == variant
        folder = tmp_path / variant
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        source = safetensors_reader.SafetensorsSource(folder)
        source.check(mapping)
        leaves = {
            name: safetensors_reader.read_hf_leaf(source, mapping.slices[name], x.shape, x.dtype)
            for name, x in abstract.items()
        }
        np.testing.assert_array_equal(leaves["q"][1], tensors["layers.1.qkv.weight"][:6].T)
        np.testing.assert_array_equal(leaves["k"][0], tensors["layers.0.qkv.weight"][6:].T)
        np.testing.assert_array_equal(leaves["o"][1], tensors["layers.1.out.weight"].T)
        expert = (
            tensors["layers.2.experts.3.up.weight"]
            if variant == "single"
            else tensors["layers.2.up"][3]
        )
        np.testing.assert_array_equal(leaves["up"][1, 3], expert.T)
        # Back again: a group holds the parameters that are needed at one time.
        groups = sorted(sorted(group) for group in mapping.groups())
        assert groups == [["b"], ["k", "q"], ["o"], ["up"]]
        for name, shape in mapping.tensors.items():
            again = np.full(shape, np.nan, np.float32)
            for path, pieces in mapping.slices.items():
                for piece in pieces:
                    if piece.tensor == name:
                        leaf_shards.copy_cast(
                            np.asarray(leaves[path])[piece.index], piece.view(again)
                        )
            np.testing.assert_array_equal(again, tensors[name])


@eight
@pytest.mark.parametrize("spec", ["1,8,1", "1,1,4", "2,2,2"])
def test_shards_are_read_without_the_complete_parameter(spec, monkeypatch):
    config = huggingface.read_hf_config(GOLDEN)
    abstract = abstract_params(build(config))
    source, mapping = (
        safetensors_reader.SafetensorsSource(GOLDEN),
        weight_map.map_weights(config, abstract),
    )
    reads = []
    plain = safetensors_reader.SafetensorsSource.read
    monkeypatch.setattr(
        safetensors_reader.SafetensorsSource,
        "read",
        lambda self, name: reads.append(name) or plain(self, name),
    )
    where = flatten_dict(shardings(abstract, make_mesh(spec), "llada"), sep="/")
    for path, x in flatten_dict(abstract, sep="/").items():
        leaf = safetensors_reader.read_hf_leaf(
            source, mapping.slices[path], x.shape, jnp.bfloat16, where[path]
        )
        assert leaf.sharding == where[path]
        complete = safetensors_reader.read_hf_leaf(
            source, mapping.slices[path], x.shape, jnp.bfloat16
        )
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(complete))
    assert sorted(reads) == sorted([*mapping.tensors] * 2), (
        "each tensor once for the shards, once for the complete parameter"
    )


# Bad input: one message each, and nothing written


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return change


def tensors(edit):
    def change(folder):
        shutil.rmtree(folder)
        edited(folder, edit)

    return change


def config(drop=(), **keys):
    def change(folder):
        changed = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(
            json.dumps({key: x for key, x in changed.items() if key not in drop})
        )

    return change


def double(folder):
    """Adds a tensor of the first file to the second one."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    name = PREFIX + "blocks.0.ff_norm.weight"
    save_file(load_file(folder / second) | {name: load_file(folder / first)[name]}, folder / second)


def header(edit):
    """Changes the pairs (name, entry) of the second file's header."""

    def change(folder):
        data = (folder / TWO).read_bytes()
        length = int.from_bytes(data[:8], "little")
        pairs = edit(list(json.loads(data[8 : 8 + length]).items()))
        text = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs) + "}"
        raw = text.encode() + b" " * (-len(text) % 8)
        (folder / TWO).write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])

    return change


def overlap(pairs):
    """Gives two tensors of one shape the same bytes, as aliases in the file of a stranger."""
    first, second, *_ = (i for i, (name, _) in enumerate(pairs) if "_norm.weight" in name)
    pairs[second][1]["data_offsets"] = list(pairs[first][1]["data_offsets"])
    return pairs


def append(data):
    return lambda folder: (folder / TWO).write_bytes((folder / TWO).read_bytes() + data)


TWO = "model-00002-of-00002.safetensors"
BAD = {
    "tensors overlap": (
        header(overlap),
        "{dir}/" + TWO + f": the tensors {PREFIX}blocks.0.attn_norm.weight and "
        f"{PREFIX}blocks.1.attn_norm.weight overlap. Fetch it again.",
    ),
    "a tensor twice in a header": (
        header(lambda pairs: [*pairs, pairs[-1]]),
        "{dir}/" + TWO + ": not a safetensors file, or damaged. Fetch it again.",
    ),
    "bytes of no tensor": (
        append(b"more"),
        "{dir}/" + TWO + ": its last 4 bytes belong to no tensor. Fetch it again.",
    ),
    "NaN": (
        tensors(lambda t: t.update({Q2: np.full_like(t[Q2], np.nan)})),
        f"{{dir}}/model.safetensors: the tensor {Q2} holds NaN or infinity. "
        "Fetch it again, or train the model again.",
    ),
    "infinity in float16": (
        tensors(lambda t: t.update({Q2: np.full((64, 64), -np.inf, np.float16)})),
        f"{{dir}}/model.safetensors: the tensor {Q2} holds NaN or infinity. ",
    ),
    "two sets of weights": (
        lambda folder: shutil.copyfile(folder / TWO, folder / "model.safetensors"),
        "{dir}: it has both model.safetensors and model.safetensors.index.json, which names other "
        "files. Remove the one that is out of date.",
    ),
    "no config": (remove("config.json"), "{dir}: there is no config.json"),
    "config not JSON": (
        write("config.json", b"{"),
        "{dir}/config.json: not valid JSON: Expecting property name",
    ),
    "no model_type": (
        config(drop=["model_type"]),
        "{dir}/config.json: model_type is null, which is not implemented",
    ),
    "unknown model_type": (
        config(model_type="bert"),
        '{dir}/config.json: model_type is "bert", which is not implemented. It must be "llada"',
    ),
    "no mask id": (
        config(drop=["mask_token_id"]),
        "{dir}/config.json: the key mask_token_id is missing",
    ),
    "another end token": (
        write("generation_config.json", b'{"eos_token_id": [3, 4]}'),
        "{dir}/generation_config.json: eos_token_id is [3, 4], but that of config.json is 481. "
        "Correct one of the files.",
    ),
    "another mask token": (
        write("generation_config.json", b'{"eos_token_id": [3, 481], "mask_token_id": 5}'),
        "{dir}/generation_config.json: mask_token_id is 5, but that of config.json is 490. ",
    ),
    "missing file": (
        remove(TWO),
        "{dir}/" + TWO + ": the file is missing, but model.safetensors.index.json names it",
    ),
    "no weights": (
        lambda folder: [file.unlink() for file in folder.glob("model*")],
        "{dir}: there is neither model.safetensors nor model.safetensors.index.json",
    ),
    "weights of torch": (
        lambda folder: [
            (folder / "pytorch_model.bin").touch(),
            *(file.unlink() for file in folder.glob("model*")),
        ],
        "{dir}: there is neither model.safetensors nor model.safetensors.index.json. "
        "pytorch_model.bin must be saved as safetensors first.",
    ),
    "index not JSON": (
        write("model.safetensors.index.json", b"[]"),
        "{dir}/model.safetensors.index.json: not a JSON object with a weight_map of tensors "
        "to files",
    ),
    "index outside": (
        write("model.safetensors.index.json", b'{"weight_map": {"x": "../x.safetensors"}}'),
        "{dir}/model.safetensors.index.json: '../x.safetensors' is not the name of a file "
        "beside it",
    ),
    "truncated": (
        cut(TWO, 100_000),
        "{dir}/" + TWO + ": truncated: it has 100000 bytes of 241168. Fetch it again.",
    ),
    "truncated in the header": (
        cut(TWO, 50),
        "{dir}/" + TWO + ": truncated inside its header: 50 bytes. Fetch it again.",
    ),
    "empty": (
        cut(TWO, 0),
        "{dir}/" + TWO + ": not a safetensors file, or damaged. Fetch it again.",
    ),
    "noise": (
        write(TWO, b"noise" * 99),
        "{dir}/" + TWO + ": not a safetensors file, or damaged. Fetch it again.",
    ),
    "bad header": (
        write(TWO, (9).to_bytes(8, "little") + b'{"a": {} }'),
        "{dir}/" + TWO + ": not a safetensors file, or damaged. Fetch it again.",
    ),
    "pointer": (
        write(TWO, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "{dir}/"
        + TWO
        + ": a Git LFS pointer, not the weights themselves. Fetch them with git lfs pull.",
    ),
    "a tensor twice": (
        double,
        "{dir}/" + TWO + f": the tensor {PREFIX}blocks.0.ff_norm.weight is already in "
        "model-00001-of-00002.safetensors",
    ),
    "tensor missing": (
        tensors(lambda t: t.pop(Q2)),
        f"{{dir}}: the tensor {Q2} is missing, but a llada model of this config.json has it",
    ),
    "layer missing": (
        config(n_layers=4),
        f"{{dir}}: the tensor {PREFIX}blocks.3.attn_norm.weight (and 8 more) is missing, "
        "but a llada model of this config.json has it",
    ),
    "tensor extra": (
        tensors(lambda t: t.update({PREFIX + "wpe.weight": t[Q2]})),
        f"{{dir}}/model.safetensors: the tensor {PREFIX}wpe.weight is no part of "
        "a llada model of this config.json",
    ),
    "tensor of a wrong shape": (
        tensors(lambda t: t.update({Q2: t[Q2][:63].copy()})),
        f"{{dir}}/model.safetensors: the tensor {Q2} has the shape [63, 64], "
        "but a llada model of this config.json has [64, 64] there",
    ),
    "tensor of a wrong dtype": (
        tensors(lambda t: t.update({Q2: np.zeros((64, 64), np.int8)})),
        f"{{dir}}/model.safetensors: the tensor {Q2} has the dtype I8, "
        "but it must be one of F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case):
    change, sentence = BAD[case]
    folder = shutil.copytree(GOLDEN, tmp_path / "source")
    change(folder)
    for read in (load, lambda path: from_hf.convert(path, tmp_path / "orbax")):
        with pytest.raises(UserError, match="^" + re.escape(sentence.format(dir=folder))) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("golden", "names"),
    [(GOLDEN, ("ids_3", "logits_3")), (GOLDEN2, ("full_ids_0", "full_logits_0"))],
    ids=["llada", "llada2"],
)
def test_the_rotary_base_of_transformers_5_gives_the_same_logits(tmp_path, golden, names):
    """With the default base in its place they differ by up to 16."""
    theta = json.loads((golden / "config.json").read_text())["rope_theta"]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    drop = ("rope_theta", "rope_scaling")
    lm = load(edited(tmp_path / "source", config=rope, drop=drop, golden=golden))
    arrays = read_arrays(golden / "golden.npz")
    ids, logits = (arrays[name] for name in names)
    np.testing.assert_allclose(lm.logits(ids), logits, atol=5e-4)


def test_values_that_are_too_large_for_bfloat16(tmp_path):
    """The largest float32 rounds to infinity."""
    largest = np.full((64, 64), np.finfo(np.float32).max)
    edited(tmp_path / "source", lambda t: t.update({Q2: largest}))
    sentence = "source: values of .* are too large for bfloat16. Choose float32."
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "source", "bfloat16")
    with pytest.raises(UserError, match=sentence):
        from_hf.convert(tmp_path / "source", tmp_path / "orbax", "bfloat16")


def test_no_such_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    unreachable = "there is no such directory here, and the hub cannot be reached"
    cases = {
        str(tmp_path / "nowhere"): "nowhere: there is no such directory",
        "./nowhere": "nowhere: there is no such directory",
        "file": "file: this is a file. Name the directory that holds config.json.",
        "nobody/nothing": f"nobody/nothing: {unreachable}",
        "nothing": f"nothing: {unreachable}",
    }
    for path, sentence in cases.items():
        for read in (load, lambda path: from_hf.convert(path, "orbax")):
            with pytest.raises(UserError, match=re.escape(sentence) + "$"):
                read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_name_of_the_hub(monkeypatch, tmp_path):
    """The directory that the hub's library returns is read, and its errors become messages."""
    from huggingface_hub import errors

    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **kw: asked.append((name, kw)) or str(GOLDEN),
    )
    assert load("GSAI-ML/LLaDA-8B-Base").config == huggingface.read_hf_config(GOLDEN)
    ((name, options),) = asked
    assert name == "GSAI-ML/LLaDA-8B-Base"
    assert {"*.safetensors", "files.json"} <= set(options["allow_patterns"])
    response = types.SimpleNamespace(headers={}, request=None)
    for error, sentence in {
        errors.RepositoryNotFoundError(
            "404", response=response
        ): "the hub has no public model of this name",
        errors.GatedRepoError(
            "403", response=response
        ): "the hub requires a login and acceptance of its terms",
        errors.LocalEntryNotFoundError("offline"): "the hub cannot be reached",
        TimeoutError("late"): "the hub's answer was TimeoutError",
    }.items():

        def fail(*args, error=error, **kw):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(
            UserError, match=f"^a/b: there is no such directory here, and {sentence}$"
        ):
            load("a/b")


@eight
def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="the mesh axis tensor of 3 does not divide"):
        from_hf.convert(GOLDEN, tmp_path / "orbax", mesh="1,1,3")
    assert not list(tmp_path.iterdir())
