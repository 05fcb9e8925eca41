"""Tests of train.pretrain and train.self_generate on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from train import pretrain, self_generate
from xflow_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.d_model=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.mlp_hidden_size=16",
    "batch_size=4",
]
QUICK = ["steps=6", "save_every=2", "log_every=1", "evaluate_every=100", "evaluate_problems=4"]
QUICK += ["seed=3"]  # a resumed run must not fall back to another one
QUICK += ["export_dtype=float32"]  # so that runs can be compared to the last bit


def pretrain_small(out: Path, *overrides: str) -> None:
    quick = [f"out={out}", f"tokenizer={ROOT / 'xflow_jax' / 'tiny'}"]
    pretrain.main(str(ROOT / "configs/pretrain_tiny.toml"), [*quick, *SMALL, *QUICK, *overrides])


def generate_small(base: Path, *overrides: str) -> list[dict]:
    out = base / "responses.jsonl"
    base_overrides = [
        f"model={base / 'model/hf'}",
        f"out={out}",
        "limit=24",
        "steps=3",
        "batch_size=8",
        "temperature=0.7",
        "seed=2",
    ]
    self_generate.main(str(ROOT / "configs/self_generate_tiny.toml"), [*base_overrides, *overrides])
    return [json.loads(line) for line in out.read_text().splitlines()]


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]


def tensors(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "hf/model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    for name, value in tensors(a).items():
        np.testing.assert_array_equal(value, tensors(b)[name], err_msg=name)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    pretrain_small(folder / "model")
    generate_small(folder)
    return folder


def test_pretraining_stopped_and_resumed_equals_one_run(base, tmp_path, monkeypatch):
    # After a stop in the middle, the run saves and ends, and the next call continues.
    steps = pretrain.Run.steps

    def interrupted(run, first, last, describe):
        for step in steps(run, first, last, describe):
            run.stopped = step == 2
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Run, "steps", interrupted)
        pretrain_small(tmp_path / "run")
    assert not (tmp_path / "run/hf").exists()
    assert metrics(tmp_path / "run")[-1]["step"] == 3

    def killed(*_):
        raise KeyboardInterrupt

    # The last step is evaluated before it is saved, so a kill here loses no line of metrics.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "solve_rate", killed)
        pretrain_small(tmp_path / "run")
    pretrain_small(tmp_path / "run")
    assert_same_run(base / "model", tmp_path / "run")


def test_self_generation_resumes_and_drops_an_incomplete_line(base):
    out = base / "responses.jsonl"
    whole = out.read_text().splitlines(keepends=True)
    assert sorted(json.loads(line)["index"] for line in whole) == list(range(24))
    out.write_text("".join(whole[:9]) + whole[9][:20])
    rows = generate_small(base)
    by_index = {json.loads(line)["index"]: json.loads(line) for line in whole}
    assert {row["index"]: row for row in rows} == by_index


def test_self_generation_refuses_the_file_of_another_run(base):
    with pytest.raises(UserError, match="another configuration"):
        generate_small(base, "seed=5")


def test_self_generation_refuses_other_weights_and_prompts_of_the_same_name(base):
    """The name of a model, or of a file of prompts, does not describe what is in it."""
    about, out = base / "responses.about.json", base / "responses.jsonl"
    described, whole = about.read_text(), out.read_text()
    about.write_text(json.dumps(json.loads(described) | {"weights": "0" * 16}))
    with pytest.raises(UserError, match="was made with other weights than .* has now. Choose anot"):
        generate_small(base)
    older = {k: v for k, v in json.loads(described).items() if k != "weights"}
    about.write_text(json.dumps(older))  # of an older version, to which they are added
    generate_small(base)
    assert about.read_text() == described
    first, *rest = whole.splitlines(keepends=True)
    changed = json.loads(first) | {"prompt_ids": [1, 2]}
    out.write_text("".join([json.dumps(changed) + "\n", *rest]))
    with pytest.raises(UserError, match="responses.jsonl, line 1: the prompts have changed since"):
        generate_small(base)
    out.write_text(whole)


class NoMask:
    eos_token_id = 3

    def get_vocab(self):
        return {"a": 0}

    def convert_tokens_to_ids(self, token):
        return 0  # of unknown words


def test_a_tokenizer_without_a_mask_token_is_refused():
    config = pretrain.PretrainConfig("out", "folder")
    with pytest.raises(UserError, match="folder: the tokenizer has no token <|mdm_mask|>"):
        pretrain.make_model_config(config, NoMask())
