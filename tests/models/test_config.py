"""Configurations: reading, writing, and the message for each mistake."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from xflow_jax.errors import UserError
from xflow_jax.models.config import LLaDAConfig, model_config
from xflow_jax.models.presets import PRESETS
from xflow_jax.toml_config import load_toml

HF = json.loads((Path(__file__).parents[1] / "goldens" / "llada_tiny" / "config.json").read_text())


def refusal(changes, drop=()):
    hf = {k: v for k, v in (HF | changes).items() if k not in drop}
    with pytest.raises(UserError) as error:
        model_config(hf, "dir/config.json")
    sentence = str(error.value)
    assert sentence.startswith("dir/config.json: ") and "\n" not in sentence
    return sentence


def test_llada_config():
    config = model_config(HF)
    assert (config.family, config.hidden_size, config.num_layers, config.max_length) == (
        "llada",
        64,
        3,
        4096,
    )
    assert (config.mask_id, config.eos_id, config.pad_id) == (490, 481, 481)
    assert (config.vocab_size, config.vocab_rows, config.num_kv_heads, config.mlp_dim) == (
        512,
        520,
        4,
        160,
    )
    assert hash(config) == hash(model_config(dict(HF)))


def test_nulls_and_defaults():
    config = model_config(
        HF
        | {
            "embedding_size": None,
            "mlp_hidden_size": None,
            "pad_token_id": None,
            "n_kv_heads": None,
        }
    )
    assert (config.vocab_rows, config.mlp_dim, config.pad_id, config.num_kv_heads) == (
        512,
        256,
        481,
        4,
    )
    assert model_config(HF | {"n_kv_heads": None, "multi_query_attention": True}).num_kv_heads == 1
    assert model_config(HF | {"rope_theta": 500000}).rope_theta == 500000.0


@pytest.mark.parametrize(
    "changes", [{}, {"rope_theta": 500000, "n_kv_heads": None}, {"ours": {"a": [1, 2]}}]
)
def test_round_trip_keeps_every_key(changes):
    hf = HF | changes
    config = model_config(hf)
    assert json.dumps(config.to_hf()) == json.dumps(hf)
    assert dataclasses.replace(config, n_layers=2).to_hf() == hf | {"n_layers": 2}


def test_a_new_configuration_is_readable():
    config = LLaDAConfig(
        d_model=32, n_layers=1, n_heads=2, vocab_size=9, mask_token_id=8, eos_token_id=0
    )
    hf = config.to_hf()
    assert hf["model_type"] == "llada" and hf["block_type"] == "llama" and hf["rope"] is True
    assert dataclasses.replace(model_config(json.loads(json.dumps(hf))), hf="") == config


def test_preset_is_the_released_model():
    config = PRESETS["llada-8b"]
    assert (config.d_model, config.n_layers, config.n_heads, config.num_kv_heads) == (
        4096,
        32,
        32,
        32,
    )
    assert (config.mlp_dim, config.vocab_rows, config.rope_theta) == (12288, 126464, 500000.0)
    assert (config.mask_id, config.eos_id, config.pad_id) == (126336, 126081, 126081)
    assert model_config(config.to_hf()).d_model == 4096


@pytest.mark.parametrize(
    "key, value, right",
    [
        ("alibi", True, "false"),
        ("block_type", "sequential", '"llama"'),
        ("block_group_size", 2, "1"),
        ("layer_norm_type", "default", '"rms"'),
        ("layer_norm_with_affine", False, "true"),
        ("bias_for_layer_norm", True, "false or null"),
        ("attention_layer_norm", True, "false"),
        ("scale_logits", True, "false"),
        ("input_emb_norm", True, "false"),
        ("activation_type", "gelu", '"silu"'),
        ("rope", False, "true"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "null"),
        ("clip_qkv", 8.0, "null"),
        ("model_type", "llama", '"llada"'),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key, value, right):
    sentence = refusal({key: value})
    assert f"{key} is {json.dumps(value)}, which is not implemented. It must be {right}" in sentence


def test_norm_biases_are_refused_where_null_would_inherit_them():
    assert "bias_for_layer_norm is null" in refusal(
        {"include_bias": True, "bias_for_layer_norm": None}
    )
    assert model_config(HF | {"include_bias": True}).include_bias


@pytest.mark.parametrize(
    "key", ["mask_token_id", "eos_token_id", "d_model", "n_layers", "n_heads", "vocab_size"]
)
def test_missing_keys(key):
    assert refusal({}, drop=[key]) == f"dir/config.json: the key {key} is missing"
    assert refusal({key: None}) == f"dir/config.json: the key {key} is missing"


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"d_model": "64"}, 'd_model is "64", but it must be an integer'),
        ({"d_model": True}, "d_model is true, but it must be an integer"),
        ({"weight_tying": 1}, "weight_tying is 1, but it must be true or false"),
        ({"eos_token_id": [481]}, "eos_token_id is [481], but it must be an integer"),
        ({"n_layers": 0}, "n_layers is 0, but it must be positive"),
        ({"n_heads": 5}, "n_heads 5 does not divide d_model 64"),
        ({"n_heads": 64}, "d_model / n_heads is 1"),
        ({"n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4"),
        ({"multi_query_attention": True}, "multi_query_attention is true, but n_kv_heads is 4"),
        ({"mlp_hidden_size": 0}, "the MLP's width is 0"),
        ({"embedding_size": 500}, "embedding_size 500 is less than vocab_size 512"),
        ({"mask_token_id": 520}, "mask_token_id is 520, but the ids go from 0 to 519"),
    ],
)
def test_impossible_values(changes, part):
    assert part in refusal(changes)


def test_a_config_that_is_no_object():
    with pytest.raises(UserError, match="x.json: model_type is null"):
        model_config([], "x.json")
    with pytest.raises(UserError, match="x.json: a configuration is a JSON object"):
        LLaDAConfig.from_hf([], "x.json")


@dataclass(frozen=True)
class Optimizer:
    rate: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    kind: Literal["adam", "muon"] = "adam"


@dataclass(frozen=True)
class Run:
    out: str
    steps: int
    optimizer: Optimizer = Optimizer()
    resume: bool = False
    data: Path | None = None
    limit: int | None = 3

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, but it must be positive")


TOML = """# a comment
out = "runs/a"
steps = 10
[optimizer]
rate = 1
betas = [0.5, 1]
"""


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


def test_toml(toml):
    run = load_toml(toml, Run)
    assert run == Run("runs/a", 10, Optimizer(1.0, (0.5, 1.0)))
    assert isinstance(run.optimizer.rate, float)


def test_overrides(toml):
    text = "out=3 steps=20 optimizer.rate=3e-4 optimizer.kind=muon resume=true "
    text += "data=a/b.jsonl limit=none"
    run = load_toml(toml, Run, text.split())
    assert run == Run("3", 20, Optimizer(3e-4, (0.5, 1.0), "muon"), True, Path("a/b.jsonl"), None)
    assert load_toml(toml, Run, ["out=runs/a=b", "steps=1", "steps=2"]).steps == 2
    assert load_toml(toml, Run, ['out="quoted"', "optimizer.betas=[0.1]"]).optimizer.betas == (0.1,)


@pytest.mark.parametrize(
    "override, part",
    [
        ("stepz=3", "there is no key stepz. Did you mean steps?"),
        ("optimizer.raet=3", "there is no key optimizer.raet. Did you mean optimizer.rate?"),
        ("qqq=3", "there is no key qqq. Known keys are out, steps, optimizer"),
        ("steps", "it must look like key=value"),
        ("=3", "it must look like key=value"),
        ("steps=many", 'steps is "many", but it must be an integer'),
        ("steps=1.5", "steps is 1.5, but it must be an integer"),
        ("steps=true", "steps is true, but it must be an integer"),
        ("resume=1", "resume is 1, but it must be true or false"),
        ("steps=none", 'steps is "none", but it must be an integer'),
        ("optimizer.kind=sgd", 'optimizer.kind is "sgd", but it must be one of "adam", "muon"'),
        ("optimizer=3", "optimizer is 3, but it must be a table"),
        ("out.x=3", "out is a value and has no parts"),
        ("limit=x", 'limit is "x", but it must be an integer or null'),
        ("optimizer.betas=0.9", "optimizer.betas is 0.9, but it must be a list of a number"),
    ],
)
def test_mistakes_in_overrides(toml, override, part):
    with pytest.raises(UserError) as error:
        load_toml(toml, Run, [override])
    assert str(error.value).startswith(f"override '{override}': ") and part in str(error.value)


@pytest.mark.parametrize(
    "text, part",
    [
        ("out = 3\nsteps = 1", "out is 3, but it must be a string"),
        ("out = 'a'", "the key steps is missing"),
        (
            "out = 'a'\nsteps = 1\n[optimiser]\nrate = 1",
            "there is no key optimiser. Did you mean optimizer?",
        ),
        ("out = 'a'\nsteps = 0", "steps is 0, but it must be positive"),
        ("out = ", "not valid TOML"),
        ("optimizer = 1", "optimizer is 1, but it must be a table"),
    ],
)
def test_mistakes_in_files(tmp_path, text, part):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_toml(path, Run)
    assert str(error.value).startswith(f"{path}: ") and part in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_toml(tmp_path / "none.toml", Run)


def test_a_value_in_the_file_where_an_override_wants_a_table(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("out = 'a'\nsteps = 1\noptimizer = 1")
    with pytest.raises(UserError, match="optimizer is not a table in the file"):
        load_toml(path, Run, ["optimizer.rate=1"])
