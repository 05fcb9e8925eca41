"""Tests of train.sft on a random model: resumed runs, meshes, adapters, data, bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from tests.helpers import eight, tiny_lm
from tests.run_helpers import assert_close, assert_same, die, fate, metrics, tensors, terminate
from train import loop, sft
from train.prompts import read_dialogues
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.errors import UserError
from xflow_jax.lm import BUNDLED
from xflow_jax.models.presets import PRESETS
from xflow_jax.parallel.mesh import MESH_AXES
from xflow_jax.toml_config import load_toml
from xflow_jax.training.program import check_batch
from xflow_jax.training.sft_program import check_canvas, sft_program

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
QUICK = ["lengths=[16,24]", "batch_size=8", "held_out=8", "limit=0", "steps=6", "seed=3"]
QUICK += ["save_every=2", "log_every=1", "optimizer.warmup_steps=1", "optimizer.rate=0.01"]
QUICK += ["group_by_length=true"]  # so that both lengths occur
QUICK += ["export_dtype=float32"]  # so that runs can be compared to the last bit
USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


def write_pairs(path: Path, rows: int = 48) -> Path:
    lines = [
        {"prompt": "Square them."[: 6 + i % 7], "response": "return sum(xs)"[: 3 + i % 12]}
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a model and pairs."""
    folder, lm = tmp_path_factory.mktemp("sft"), tiny_lm()
    write_hf(folder / "model", lm.params, lm.config, BUNDLED["tiny"])
    write_pairs(folder / "pairs.jsonl")
    return folder


def run(base: Path, out: Path, *overrides: str) -> Path:
    files = [f"model={base / 'model'}", f'data=["{base / "pairs.jsonl"}"]', f"out={out}"]
    sft.main(str(CONFIGS / "sft_tiny.toml"), [*files, *QUICK, *overrides])
    return out


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Shares compiled programs between runs with the same configuration and mesh."""
    made = {}

    def kept(model_config, config, mesh):
        own = dataclasses.replace(config, out="", save_every=1)
        if (own, mesh) not in made:
            made[own, mesh] = sft_program(model_config, config, mesh)
        return made[own, mesh]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "sft_program", kept)
        yield made


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory, programs) -> Path:
    out = run(base, tmp_path_factory.mktemp("straight") / "run")
    (program,) = programs.values()
    assert program.step._cache_size() == 2  # one compilation for each length
    return out


def test_a_run(base, straight):
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]
    assert {"loss", "masked_nll", "text_nll", "grad_norm", "held_out_text_nll"} <= rows[1].keys()
    about = json.loads((straight / "hf/provenance.json").read_text())
    assert about["command"] == "python -m train.sft" and about["config"]["lengths"] == [16, 24]
    assert (straight / "hf/tokenizer.json").exists()
    before, after = tensors(base / "model", ""), tensors(straight)
    assert {name for name in before if np.all(before[name] == after[name])} == set()


def test_crashes_and_sigterm_change_nothing(base, straight, tmp_path):
    out = tmp_path / "run"
    with fate(3, die), pytest.raises(KeyboardInterrupt):
        run(base, out)
    with fate(3, terminate):
        run(base, out)
    assert metrics(out)[-1]["step"] == 4 and not (out / "hf").exists()
    run(base, out)
    assert_same(straight, out)


@eight
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2,2,2", "1,8,1", "1,4,2"])
def test_a_mesh_changes_nothing(base, straight, tmp_path, mesh):
    assert_close(straight, run(base, tmp_path / "run", f"mesh={mesh}"))


@pytest.mark.slow
def test_a_mesh_may_change_on_the_way(base, straight, tmp_path):
    with fate(2, terminate):
        run(base, tmp_path / "run", "mesh=2,2,2")
    assert metrics(tmp_path / "run")[-1]["step"] == 3
    assert_close(straight, run(base, tmp_path / "run", "mesh=1,1,1"))


@pytest.mark.slow
def test_adapters_learn_by_the_same_program(base, tmp_path):
    lora = ["tune=lora", "lora.rank=2", "accumulate=2", "optimizer.rate=0.05"]
    whole = run(base, tmp_path / "whole", *lora)
    with fate(3, die), pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "parts", *lora)
    assert_same(whole, run(base, tmp_path / "parts", *lora))
    assert metrics(whole)[-1]["held_out_loss"] < metrics(whole)[0]["held_out_loss"]
    before, after = tensors(base / "model", ""), tensors(whole)
    changed = {name for name in before if np.any(before[name] != after[name])}
    assert changed and all(
        ".blocks." in name and not name.endswith("norm.weight") for name in changed
    )


def test_conversations_of_files(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [
        {"messages": [USER, ANSWER, USER, ANSWER]},
        {"prompt": "Why?", "response": "Because."},
        {"prompt": [USER, ANSWER, USER], "response": "Because."},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    table = pyarrow.table({"messages": [[USER, ANSWER]]})
    parquet.write_table(table, tmp_path / "b.parquet")
    found = [messages for _, messages in read_dialogues(str(tmp_path))]
    assert found == [[USER, ANSWER] * 2, [USER, ANSWER], [USER, ANSWER] * 2, [USER, ANSWER]]


def test_long_responses_are_left_out_and_tasks_are_endless(base, tmp_path, capsys):
    config = load_toml(
        CONFIGS / "sft_tiny.toml",
        sft.SFTRunConfig,
        [f"model={base / 'model'}", "limit=12", "lengths=[48,64]"],
    )
    directory, model_config = sft.read_model_config(config.model)
    tokenizer = sft.load_tokenizer(directory)
    pairs = sft.read_pairs(config, tokenizer, model_config)
    assert 0 < len(pairs) < 12
    told = f"{12 - len(pairs)} of 12 responses need more than 64 tokens with their prompts"
    assert told in capsys.readouterr().out
    again = sft.read_pairs(dataclasses.replace(config, task_seed=2), tokenizer, model_config)
    assert {tuple(pair.prompt) for pair in pairs}.isdisjoint(tuple(p.prompt) for p in again)


@pytest.mark.parametrize(
    ("preset", "override", "grouped"),
    [
        ("llada-8b", "none", False),
        ("llada-8b", "true", True),
        ("llada2.1-mini", "none", True),
        ("llada2.1-mini", "false", False),
    ],
)
def test_only_block_causal_models_have_batches_of_similar_lengths(preset, override, grouped):
    """The EOS tokens of a row end with its block there, so its length tells nothing."""
    overrides = [f"group_by_length={override}"]
    config = load_toml(CONFIGS / "sft_llada2_1_mini.toml", sft.SFTRunConfig, overrides)
    block_length = 32 if PRESETS[preset].is_block_causal else 0
    config = dataclasses.replace(config, block_length=block_length)
    canvas = sft.make_canvas(config, PRESETS[preset])
    assert (canvas.group_by_length, canvas.block_length) == (grouped, block_length)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lengths=[8]", "none of its 48 responses fits lengths, of which the longest is 8. With"),
        ("lengths=[64,256]", "the 256 of lengths exceeds the model's 128 positions"),
        ("lengths=[24,16]", "lengths are [24, 16], but they must be ascending"),
        ("block_length=4", "block_length is 4, but the model attends to all positions"),
        ("held_out=4", "held_out 4 must be at least one batch of 8 and leave one of the 48"),
        ("held_out=48", "held_out 48 must be at least one batch of 8 and leave one of the 48"),
        ("mesh=1,3,1", "batch_size 8 in 1 parts does not divide over the 3 devices"),
        ("turns=all", 'turns is "all", but it must be one of "last", "each"'),
        ("lenghts=[8]", "Did you mean lengths?"),
        ('data=["microcode"]', "limit is 0, but microcode's training set has no end"),
        ("data=[]", "data is empty. Name files, data sets or tasks"),
        ('data=["mbpp"]', "the task mbpp has no endless training set"),
        ('data=["none.jsonl"]', "none.jsonl: there is no such file"),
        ("tune=lora", "LoRA target 'wte' is no matrix"),
    ],
)
def test_a_bad_configuration_is_one_sentence_before_any_device_work(
    base, tmp_path, monkeypatch, override, sentence
):
    monkeypatch.setattr(loop, "load", lambda *_, **__: pytest.fail("the parameters were read"))
    with pytest.raises(UserError) as error:
        run(base, tmp_path / "out", override, 'lora.targets=["wte"]')
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (None, "a.jsonl: no conversations in it"),
        ({"text": "a"}, "line 1 has neither `messages` nor `prompt`"),
        ({"messages": []}, "line 1 has neither `messages` nor `prompt`"),
        ({"messages": [USER, ANSWER, USER]}, "line 1: its last message is not the assistant's"),
        ({"messages": [ANSWER]}, "line 1: its messages hold no request"),
        ({"messages": [USER, {"role": "assistant"}]}, "must have a role and a content, both text"),
        ({"prompt": "a"}, "line 1 has a `prompt`, but no text under `response`"),
    ],
)
def test_bad_conversations(tmp_path, record, sentence):
    file = tmp_path / "a.jsonl"
    file.write_text("" if record is None else json.dumps(record) + "\n")
    with pytest.raises(UserError) as error:
        list(read_dialogues(str(file)))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_a_chat_template(base, tmp_path):
    lm = tiny_lm()
    write_hf(tmp_path / "model", lm.params, lm.config, BUNDLED["tiny"])
    file = tmp_path / "model/tokenizer_config.json"
    about = json.loads(file.read_text())
    del about["chat_template"]
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match="no chat template, which makes prompts of messages"):
        run(base, tmp_path / "out", f"model={tmp_path / 'model'}")
    (tmp_path / "model/tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json, which fine-tuning needs"):
        run(base, tmp_path / "out", f"model={tmp_path / 'model'}")


@pytest.mark.parametrize(
    ("name", "preset", "chips"),
    [
        ("llada_8b", "llada-8b", 64),
        ("illada_8b", "illada-8b", 64),
        ("dream_7b", "dream-7b", 64),
        ("llada2_1_mini", "llada2.1-mini", 16),
    ],
)
def test_large_runs_fit_their_model_and_their_pod(name, preset, chips):
    config = load_toml(CONFIGS / f"sft_{name}.toml", sft.SFTRunConfig)
    check_canvas(PRESETS[preset], config)
    mesh = AbstractMesh(tuple(map(int, config.mesh.split(","))), MESH_AXES)
    check_batch(config, mesh)
    data, fsdp, tensor = mesh.shape.values()
    assert data * fsdp * tensor == chips
