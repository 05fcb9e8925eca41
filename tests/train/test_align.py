"""Tests of train.align on a random model: resumed runs, meshes, adapters, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import TOY, eight, toy
from tests.run_helpers import (
    all_metrics,
    assert_close,
    assert_same,
    die,
    fate,
    metrics,
    metrics_before,
    tensors,
    terminate,
)
from train import align, loop
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.errors import UserError
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.training.alignment import AlignmentConfig
from xflow_jax.training.alignment_program import align_program
from xflow_jax.training.data import Responses

ROOT = Path(__file__).parents[2]
QUICK = [
    "prompt_length=6",
    "gen_length=8",
    "batch_size=8",
    "held_out=8",
    "chunk=16",
    "seed=3",
    "steps=6",
]
QUICK += [
    "save_every=2",
    "log_every=1",
    "optimizer.warmup_steps=1",
    "optimizer.rate=0.01",
    "only_passed=false",
]
QUICK += ["export_dtype=float32"]  # so that runs can be compared to the last bit


def write_responses(path: Path, rows: int = 40) -> Path:
    rng = np.random.default_rng(0)
    lines = [
        {
            "prompt_ids": rng.integers(0, 20, 1 + i % 5).tolist(),
            "response_ids": rng.integers(0, 20, 8).tolist(),
        }
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a model and its responses."""
    folder = tmp_path_factory.mktemp("align")
    about = {"provenance.json": '{"task": "microcode"}\n'}
    write_hf(folder / "model", toy().params, TOY, texts=about)
    write_responses(folder / "responses.jsonl")
    return folder


def overrides_of(base: Path, out: Path, *overrides: str) -> list[str]:
    return [
        f"model={base / 'model'}",
        f'data=["{base / "responses.jsonl"}"]',
        f"out={out}",
        *QUICK,
        *overrides,
    ]


def run(base: Path, out: Path, *overrides: str) -> Path:
    align.main(str(ROOT / "configs/align_tiny.toml"), overrides_of(base, out, *overrides))
    return out


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Shares compiled programs between runs with the same configuration and mesh."""
    made = {}

    def kept(model_config, config, mesh):
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(AlignmentConfig)}
        if config.optimizer.schedule == "constant":
            fields["steps"] = 1000  # a constant schedule does not use it
        own = AlignmentConfig(**fields)
        if (own, mesh) not in made:
            made[own, mesh] = align_program(model_config, own, mesh)
        return made[own, mesh]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "align_program", kept)
        yield made


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory, programs) -> Path:
    out = run(base, tmp_path_factory.mktemp("straight") / "run")
    (program,) = programs.values()
    assert program.step._cache_size() == 1  # one compilation serves the run
    return out


def test_a_run(base, straight):
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]
    assert {row["frozen_masked_nll"] for row in rows} == {rows[0]["held_out_masked_nll"]}
    assert (straight / "alignment.png").stat().st_size > 10_000
    before, after = load_file(base / "model/model.safetensors"), tensors(straight)
    changed = {name for name in before if np.any(before[name] != after[name])}
    assert changed == before.keys() - {"model.transformer.wte.weight"}
    about = json.loads((straight / "hf/provenance.json").read_text())
    assert about["config"]["steps"] == 6 and about["tasks"] == ["microcode"]
    assert len(list((straight / "checkpoints").glob("[0-9]*"))) == 2  # older ones are deleted


def test_tensorboard_shows_the_metrics(straight):
    pytest.importorskip("tensorboardX")
    (file,) = (straight / "tensorboard").glob("events*")
    assert all(name in file.read_bytes() for name in (b"loss", b"tokens_per_second", b"goodput"))


def test_lines_have_the_times_of_their_steps(straight):
    assert "seconds_per_step" not in all_metrics(straight)[1], "the first step compiles"
    rows = all_metrics(straight)[2:]
    for row in rows:
        tokens = row["tokens_per_second"] * row["seconds_per_step"]
        assert tokens == pytest.approx(8 * (6 + 8), rel=1e-6)
        assert 0 < row["goodput"] < 1 and "model_flops_share" not in row  # CPUs have no peak here
    assert any(row.get("checkpoint_seconds", 0) > 0 for row in rows)
    assert any(row.get("checkpoint_write_seconds", 0) > 0 for row in rows)
    times = json.loads((straight / "times.json").read_text())
    assert times["starts"] == 1 and times["ended"] > times["began"]
    assert list(times["steps"]) == ["2", "4", "6"]


def test_crashes_and_sigterm_change_nothing(base, straight, tmp_path):
    out = tmp_path / "run"
    with fate(3, die), pytest.raises(KeyboardInterrupt):
        run(base, out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.')  # an incomplete line
    assert metrics_before(out) == [
        0,
        1,
        2,
        3,
    ]  # the third step is logged, but only the second is saved
    with fate(3, terminate):
        run(base, out)
    assert metrics(out)[-1]["step"] == 4 and not (out / "hf").exists()
    run(base, out)
    assert_same(straight, out)


@pytest.mark.slow
def test_a_run_that_dies_before_its_first_checkpoint_begins_anew(base, straight, tmp_path):
    with fate(1, die), pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "run")
    assert_same(straight, run(base, tmp_path / "run"))


@eight
@pytest.mark.parametrize("mesh", ["1,8,1", "1,4,2", "2,2,2"])
@pytest.mark.slow
def test_a_mesh_changes_nothing_and_may_change_on_the_way(base, straight, tmp_path, mesh):
    assert_close(straight, run(base, tmp_path / "whole", f"mesh={mesh}"))
    with fate(2, terminate):
        run(base, tmp_path / "parts", f"mesh={mesh}")
    assert metrics(tmp_path / "parts")[-1]["step"] == 3
    assert_close(straight, run(base, tmp_path / "parts", "mesh=1,1,1"))


TRAJECTORY = [
    "states=trajectory",
    "clean_nll=0",
    'trajectory.rules=["flow:reedit=always,jump=0.2..0.9","masked"]',
    "trajectory.passes=3",
]


@pytest.fixture(scope="module")
def live(base, tmp_path_factory) -> Path:
    """A run on the states of live decodes."""
    return run(base, tmp_path_factory.mktemp("live") / "run", *TRAJECTORY)


@pytest.mark.slow
def test_live_decodes_continue_where_a_run_stopped(base, live, tmp_path):
    rows = metrics(live)
    assert {"state_nll", "masked_nll", "right", "ended"} <= rows[1].keys()
    assert rows[-1]["held_out_masked_nll"] != rows[0]["held_out_masked_nll"]
    with fate(3, die), pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "run", *TRAJECTORY)
    assert_same(live, run(base, tmp_path / "run", *TRAJECTORY))
    with pytest.raises(UserError, match="of another model, optimiser or set of rules"):
        run(base, tmp_path / "run", "steps=8")  # it has no live decodes


@eight
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1,4,1", "2,2,2"])
def test_live_decodes_on_a_mesh(base, live, tmp_path, mesh):
    assert_close(live, run(base, tmp_path / "whole", *TRAJECTORY, f"mesh={mesh}"))
    with fate(2, terminate):
        run(base, tmp_path / "parts", *TRAJECTORY, f"mesh={mesh}")
    assert_close(live, run(base, tmp_path / "parts", *TRAJECTORY, "mesh=1,1,1"))


@pytest.mark.slow
def test_adapters_learn_by_the_same_program(base, tmp_path):
    lora = [
        "tune=lora",
        "lora.rank=2",
        "accumulate=2",
        "optimizer.schedule=constant",
        "optimizer.rate=0.05",
    ]
    whole = run(base, tmp_path / "whole", *lora)
    run(base, tmp_path / "parts", *lora, "steps=2")
    assert_same(whole, run(base, tmp_path / "parts", *lora))
    assert metrics(whole)[-1]["held_out_loss"] < metrics(whole)[0]["held_out_loss"]
    before, after = load_file(base / "model/model.safetensors"), tensors(whole)
    changed = {name for name in before if np.any(before[name] != after[name])}
    assert changed and all(
        ".blocks." in name and not name.endswith("norm.weight") for name in changed
    )


@eight
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in ({"tune": "lora"}, {"states": "trajectory"})
        ),
    ],
    ids=str,
)
def test_the_abstract_arguments_are_those_that_run(options):
    """The planner lowers the program that trains: same shapes, dtypes and shardings."""
    config = AlignmentConfig(prompt_length=6, gen_length=8, batch_size=8, **options)
    program = align_program(TOY, config, make_mesh("1,4,2"))
    with program.scope():
        state, base = program.begin(jax.tree.map(jnp.copy, toy("1,4,2").params))
    for real, abstract in zip(
        (state, base), (program.arguments[0], program.arguments[3]), strict=True
    ):
        chex.assert_trees_all_equal_shapes_and_dtypes(real, abstract)
        same = jax.tree.map(
            lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim), real, abstract
        )
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("storage", ["kahan", "stochastic"])
@pytest.mark.slow
def test_parameters_that_stay_in_bfloat16(base, tmp_path, storage):
    kept = [
        "dtype=bfloat16",
        f"storage={storage}",
        "optimizer.rate=0.002",
        "optimizer.schedule=constant",
        "steps=4",
    ]
    whole = run(base, tmp_path / "whole", *kept)
    assert metrics(whole)[-1]["held_out_loss"] < metrics(whole)[0]["held_out_loss"]
    run(base, tmp_path / "parts", *kept, "steps=2")
    assert_same(whole, run(base, tmp_path / "parts", *kept))


def test_a_checkpoint_of_another_model_or_optimiser_is_refused(base, straight):
    with pytest.raises(
        UserError, match="of another model, optimiser or set of rules. .* choose another out"
    ):
        run(base, straight, "optimizer.name=adafactor", "steps=7")


def test_only_the_first_lines_are_read_where_asked(base):
    everything, first = (
        Responses([base / "responses.jsonl"], TOY, 6, 8, limit=limit) for limit in (0, 12)
    )
    assert len(everything) == 40 and len(first) == 12
    np.testing.assert_array_equal(first[11]["response"], everything[11]["response"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "optimizer.name=lion",
            'optimizer.name is "lion", but it must be one of "adamw", "adafactor"',
        ),
        ("optimizer.rate=0", "optimizer.rate is 0.0, but it must be positive"),
        ("storage=kahan", 'storage is "kahan", which is for dtype = "bfloat16" and tune = "all"'),
        ("accumulate=3", "accumulate 3 does not divide batch_size 8"),
        ("gen_length=200", "exceed the model's 128 positions"),
        ("mesh=1,3,1", "batch_size 8 in 1 parts does not divide over the 3 devices"),
        ("mesh=1,3", "must be three positive sizes"),
        ("held_out=4", "held_out 4 must be at least one batch of 8"),
        ("tune=lora", "LoRA target 'wte' is no matrix"),
        ("save_every=0", "save_every is 0, but it must be at least 1"),
        ("limit=-1", "limit is -1, but it must not be negative"),
        (
            'data=["microcode"] limit=0',
            "limit is 0, but microcode's training set has no end. Set a limit.",
        ),
        ('data=["microcode"] limit=8', "has no tokenizer.json, which microcode needs"),
        ("clean_nll=-0.1", "clean_nll is -0.1, but it must not be negative"),
        (
            'states=trajectory clean_nll=0 trajectory.rules=["flwo"]',
            "there is no rule 'flwo', did you mean flow?",
        ),
        (
            "states=trajectory clean_nll=0 trajectory.block_lengths=[0,3]",
            "the 3 of trajectory.block_lengths does not divide gen_length 8",
        ),
        (
            'states=trajectory clean_nll=0 trajectory.rules=["mask:schedule=eps"]',
            "the rule mask:schedule=eps has times of its own, which live decodes have not",
        ),
        (
            'states=trajectory clean_nll=0 trajectory.rules=["mask:threshold=0.9,sub_block=3"]',
            "sub_block 3 must divide the block of 8 tokens",
        ),
        (
            "states=trajectory clean_nll=0 block_length=4",
            "the model attends to all positions. Leave it out. Decodes of trajectories have "
            "trajectory.block_lengths.",
        ),
        ("states=trajectory", 'clean_nll is 0.1, but states = "trajectory" has the cross-entropy'),
        (
            "block_length=4",
            "block_length is 4, but the model attends to all positions. Leave it out",
        ),
        (
            "states=trajectory clean_nll=0 mesh=1,8,1",
            "batch_size 8 in 2 parts does not divide over the 8 devices",
        ),
    ],
)
def test_a_bad_configuration_is_one_sentence_before_any_device_work(
    base, tmp_path, monkeypatch, override, sentence
):
    monkeypatch.setattr(loop, "load", lambda *_, **__: pytest.fail("the parameters were read"))
    with pytest.raises(UserError) as error:
        run(base, tmp_path / "out", *override.split(), 'lora.targets=["wte"]')
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "no responses in it"),
        ("{not json\n", "responses.jsonl, line 1 is no JSON"),
        ('{"prompt_ids": [1]}\n', "line 1 has no list of integers under 'response_ids'"),
        (
            '{"prompt_ids": [1], "response_ids": [24]}\n',
            "response_ids holds 24, but the vocabulary has ids 0 to 23",
        ),
        (
            json.dumps({"prompt_ids": [1], "response_ids": [1] * 9}),
            "line 1: 9 response_ids, but the run allows 8",
        ),
    ],
)
def test_bad_responses_are_one_sentence_before_any_device_work(
    base, tmp_path, monkeypatch, line, sentence
):
    monkeypatch.setattr(loop, "load", lambda *_, **__: pytest.fail("the parameters were read"))
    data = tmp_path / "responses.jsonl"
    data.write_text(line)
    with pytest.raises(UserError) as error:
        run(base, tmp_path / "out", f'data=["{data}"]')
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_killed_at_random_ends_as_the_uninterrupted_one(base, tmp_path):
    steps = ["steps=30", "save_every=3"]
    straight = run(base, tmp_path / "straight", *steps)
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "train.align",
        "configs/align_tiny.toml",
        *overrides_of(base, out, *steps),
    ]
    chance, killed = random.Random(), []
    while True:
        process = subprocess.Popen(command, cwd=ROOT)
        target = chance.randrange(1, 29) if len(killed) < 2 else None
        while process.poll() is None:
            time.sleep(0.01)
            file = out / "metrics.jsonl"
            # The first line is step 0. A finished step has a line.
            if target and file.exists() and len(file.read_text().splitlines()) > target:
                process.send_signal(signal.SIGKILL)
                killed.append(target)
                break
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert_same(straight, out)


@pytest.mark.slow
def test_two_processes_train_as_one(base, straight, tmp_path):
    """Each reads its own rows and writes its own shards. The export is a converted checkpoint."""
    out, devices = tmp_path / "run", "--xla_force_host_platform_device_count=2"
    command = [
        sys.executable,
        "-m",
        "train.align",
        "configs/align_tiny.toml",
        *overrides_of(base, out, "mesh=1,2,2"),
    ]
    told = {
        "JAX_COORDINATOR_ADDRESS": "localhost:12741",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
    }
    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | told | {"JAX_PROCESS_ID": str(i), "XLA_FLAGS": devices},
        )
        for i in range(2)
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert_close(straight, out)
    from flax.traverse_util import flatten_dict

    from xflow_jax.lm import load

    wanted, ours = (
        flatten_dict(load(folder).params, sep="/") for folder in (straight / "hf", out / "model")
    )
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5, err_msg=name)
