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

GOLDENS = Path(__file__).parents[1] / "goldens"
HF = json.loads((GOLDENS / "llada_tiny" / "config.json").read_text())
HF2 = json.loads((GOLDENS / "llada2_tiny" / "config.json").read_text())
ILLADA = json.loads((GOLDENS / "family" / "illada_tiny" / "config.json").read_text())


def refusal(changes, drop=(), hf=HF):
    hf = {k: v for k, v in (hf | changes).items() if k not in drop}
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


ROPE = {"rope_type": "default", "rope_theta": 7e5}


@pytest.mark.parametrize("hf", [HF, HF2], ids=["llada", "llada2"])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_the_rotary_base_may_be_in_a_dict(hf, place):
    """Version 5 of transformers writes it there, and the top level lacks it."""
    written = {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
    written[place] = ROPE
    config = model_config(written)
    assert config.rope_theta == 7e5 and config.to_hf() == written
    assert model_config(written | {"rope_theta": 700000}).rope_theta == 7e5
    again = model_config(dataclasses.replace(config, rope_theta=9.0).to_hf())
    assert again.rope_theta == 9.0
    sentence = refusal({"rope_theta": 5e5, place: ROPE}, hf=hf)
    assert "rope_theta is 500000.0, but another place of the file has 700000.0" in sentence
    for kind in ({"type": "linear", "factor": 2.0}, {"rope_type": "yarn"}, ROPE | {"factor": 2.0}):
        assert f"{place} is {json.dumps(kind)}, which is not implemented" in refusal(
            {place: kind}, ["rope_theta"], hf
        )
    for odd in ("default", {"full_attention": ROPE}, [ROPE]):
        assert f"{place} is {json.dumps(odd)}, which" in refusal({place: odd}, hf=hf)


def test_the_share_of_rotated_dims_may_be_in_a_dict():
    hf = {k: v for k, v in HF2.items() if k not in ("partial_rotary_factor", "rotary_dim")}
    rope = {"rope_parameters": ROPE | {"rope_theta": 600000, "partial_rotary_factor": 0.25}}
    assert model_config(hf | rope).rotary_dim == 8
    assert "partial_rotary_factor is 0.5, but another place of the file has 0.25" in refusal(
        rope, hf=HF2
    )
    assert "partial_rotary_factor is 0.25, which is not implemented" in refusal(
        rope, ["rope_theta"], HF
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_topk_prob", False),
        ("norm_head", True),
        ("norm_softmax", True),
        ("use_rmsnorm", False),
        ("router_dtype", "bf16"),
        ("moe_router_enable_expert_bias", False),
        ("score_function", "softmax"),
        ("use_qk_norm", False),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("num_nextn_predict_layers", 1),
        ("quantization_config", {"quant_method": "fp8"}),
        ("architectures", ["LLaDA2MoeModelLM", "Other"]),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_keys_of_llada2_that_other_engines_read_are_refused(key, value):
    assert f"{key} is {json.dumps(value)}, which is not implemented" in refusal(
        {key: value}, hf=HF2
    )


def test_llada_moe_is_no_llada():
    """It has the same model_type, and its own keys for the rest."""
    hf = json.loads((GOLDENS / "configs" / "llada_moe.json").read_text())
    for drop in ((), ("architectures",), ("model_type",)):
        shown = {k: v for k, v in hf.items() if k not in drop} | {"model_type": "llada"}
        config = model_config(shown)
        assert (config.family, config.num_experts, config.num_dense_layers) == ("lladamoe", 64, 0)
        assert (config.shared_mlp_dim, config.head_dim, config.mask_token_id) == (0, 128, None)
        assert config.to_hf() == shown
    assert model_config(hf | {"model_type": "lladamoe"}).family == "lladamoe"
    # One given as the other.
    assert 'It must be ["LLaDAMoEModelLM"]' in refusal({"architectures": ["LLaDAModelLM"]}, hf=hf)
    assert "qk_layernorm is true" in refusal(hf, ["architectures", "num_experts"])
    for changes in ({"architectures": ["LLaDAMoEModelLM"]}, {"num_experts": 64}):
        assert "d_model is a key of LLaDA-8B" in refusal(changes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"shared_expert_intermediate_size": -1},
            "-1, a placeholder. It must be null or",
        ),
        ({"moe_layer_freq": [1] * 15}, "a 0 or 1 for each of the 16 layers"),
        ({"moe_layer_freq": [1, 0] * 8}, "has a dense layer behind one with experts"),
        ({"moe_layer_freq": [0] + [1] * 15, "dense_intermediate_size": None}, "dense layers"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok is 65, but there are 64 experts"),
        ({"clip_qkv": -1.0}, "clip_qkv must be positive or null"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor 2.0 of 128 dims is 256"),
        ({"vocab_size": None}, "the key vocab_size is missing"),
    ],
)
def test_llada_moe_refusals(changes, sentence):
    hf = json.loads((GOLDENS / "configs" / "llada_moe.json").read_text())
    assert sentence in refusal(changes, hf=hf)


def test_dream_and_sdar():
    dream, sdar = (
        model_config(json.loads((GOLDENS / "family" / name / "config.json").read_text()))
        for name in ("dream_tiny", "sdar_tiny")
    )
    assert (dream.family, dream.logits_shift, dream.qkv_bias, dream.attn_out_bias) == (
        "dream",
        True,
        True,
        False,
    )
    assert (sdar.head_dim, sdar.default_block_length, sdar.is_block_causal, sdar.qk_norm) == (
        24,
        4,
        True,
        True,
    )
    fast = model_config(
        json.loads((GOLDENS / "family" / "fastdllm2_tiny" / "config.json").read_text())
    )
    assert (fast.logits_shift, fast.is_block_causal, fast.default_block_length) == (True, True, 8)
    assert (fast.qkv_bias, fast.given_mask_id, fast.eos_id) == (True, None, 301)
    assert "bd_size is 0, but it must be positive" in refusal({"bd_size": 0}, hf=fast.to_hf())
    for config in (dream, sdar):
        assert config.mask_id == 310
        hf = config.to_hf()
        assert "sliding_window" in refusal({"use_sliding_window": True}, hf=hf)
        assert "the key intermediate_size is missing" in refusal({}, ["intermediate_size"], hf=hf)
    assert "block_size is 0, but it must be positive" in refusal({"block_size": 0}, hf=sdar.to_hf())
    assert "the width of a head is 23" in refusal({"head_dim": 23}, hf=sdar.to_hf())


def test_models_of_another_kind_are_refused():
    assert refusal({"block_size": 32, "expert_capacity": 48}, hf=HF2) == (
        "dir/config.json: expert_capacity is 48, as in LLaDA2.2. Its router, which first chooses "
        "experts for a whole block of tokens, is missing here. LLaDA2.0 and LLaDA2.1 have another "
        "one."
    )
    for kind in ("diffusion_gemma", "diffusion_gemma_text"):
        assert "It is no masked diffusion model" in refusal({"model_type": kind})
    assert "layer_norm_eps is 1e-05, which is not impl" in refusal(
        {"layer_norm_eps": 1e-5}, hf=ILLADA
    )
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert "which is not implemented" in refusal({"rope_scaling": yarn}, hf=ILLADA)


def test_llada21_is_llada2():
    config = model_config(HF2 | {"model_type": "llada21_moe", "max_position_embeddings": 32768})
    assert (config.family, config.max_length) == ("llada2", 32768)
    assert config.to_hf()["model_type"] == "llada21_moe"


def test_every_key_of_the_released_files_has_a_meaning(caplog):
    """A key without one is named, and what transformers 5 renames has the same meaning."""
    newer = {"dtype": "bfloat16", "layer_types": ["full_attention"], "architectures": None}
    for hf in (HF, HF2, HF | newer, HF2 | newer):
        model_config(hf)
    assert not caplog.records
    model_config(HF2 | {"logit_softcap": 30.0, "sliding_windows": [4], "unused": None})
    model_config(HF2 | {"logit_softcap": 30.0, "sliding_windows": [4]})
    assert [record.getMessage() for record in caplog.records] == [
        "The model's config.json has unknown keys, which have no effect here: "
        "logit_softcap, sliding_windows."
    ]


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
        ({"eos_token_id": [481, "x"]}, 'eos_token_id is [481, "x"], but it must be an integer'),
        ({"n_layers": 0}, "n_layers is 0, but it must be positive"),
        ({"n_heads": 5}, "n_heads 5 does not divide d_model 64"),
        ({"n_heads": 64}, "d_model / n_heads is 1"),
        ({"n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4"),
        ({"multi_query_attention": True}, "multi_query_attention is true, but n_kv_heads is 4"),
        ({"mlp_hidden_size": 0}, "the MLP's width is 0"),
        ({"embedding_size": 500}, "embedding_size 500 is less than vocab_size 512"),
        ({"mask_token_id": 481}, "mask_token_id and eos_token_id are both 481"),
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
        ("optimizer.rate=true", "optimizer.rate is true, but it must be a number"),
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
