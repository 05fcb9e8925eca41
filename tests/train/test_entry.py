"""Tests of train.entry on a small random model: results, resumed runs, bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.run_helpers import metrics
from tests.train.test_grpo import assert_same_run, write_model
from train import entry
from xflow_jax.decoding.policy_io import read_policy
from xflow_jax.errors import UserError

ROOT = Path(__file__).parents[2]
QUICK = ["problems=4", "batch_size=4", "budget=1/16", "width=8", "steps=4", "states=12"]
QUICK += ["log_every=1", "save_every=1", "seed=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("entry") / "model")


def train(model: Path, out: Path, *overrides: str) -> None:
    options = [f"model={model}", f"out={out}", *QUICK, *overrides]
    entry.main(str(ROOT / "configs/entry_latin_square.toml"), options)


@pytest.mark.slow
def test_a_run_stopped_and_resumed_equals_one_run(model, tmp_path, monkeypatch):
    train(model, tmp_path / "straight")
    policy, switches = read_policy(tmp_path / "straight" / "policy.safetensors")
    assert policy.above == 0.9 and switches == "early_exit=true,reedit_margin=none"
    rows = metrics(tmp_path / "straight")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == pytest.approx(rows[0]["confidence_loss"], rel=1e-3)
    steps = entry.Run.steps

    def interrupted(run, first, last, describe):
        for step in steps(run, first, last, describe):
            run.stopped = step == 1
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(entry.Run, "steps", interrupted)
        train(model, tmp_path / "run")
    assert not (tmp_path / "run/policy.safetensors").exists()
    train(model, tmp_path / "run")
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_batches_hold_complete_decodes():
    decode = np.repeat([3, 5, 6, 9], [2, 3, 4, 1])
    states = {"decode": decode, "features": np.arange(10.0)[:, None]}
    for seed in range(5):
        batch = entry.draw_batch(states, 8, np.random.default_rng(seed))
        used = batch["features"][:, 0].astype(int)
        kept = used[: np.flatnonzero(used)[-1] + 1]
        for number in np.unique(decode[kept]):
            assert set(np.flatnonzero(decode == number)) <= set(kept)
        assert len(batch["decode"]) == 8
        changes = np.flatnonzero(np.diff(decode[kept])) + 1
        np.testing.assert_array_equal(
            np.flatnonzero(np.diff(batch["decode"][: len(kept)])) + 1, changes
        )
    with pytest.raises(UserError, match="states is 2, less than those of one decode"):
        entry.draw_batch({"decode": np.zeros(3, int)}, 2, np.random.default_rng(0))


def test_few_training_requests_are_refused(model, tmp_path, monkeypatch):
    task = entry.get_task("latin-square")
    few = dataclasses.replace(task, training=lambda file, count: task.training(file, 3))
    monkeypatch.setattr(entry, "get_task", lambda *_: few)
    with pytest.raises(
        UserError, match="latin-square has 3 training requests, which do not fill a"
    ):
        train(model, tmp_path / "run")


def test_a_batch_must_hold_the_longest_decode(model, tmp_path):
    with pytest.raises(UserError, match=r"states is 1, less than .*, which has \d+\. Raise it"):
        train(model, tmp_path / "run", "states=1")


@pytest.mark.slow
def test_targets_need_a_right_answer(model, tmp_path):
    with pytest.raises(UserError, match="no answer is right, so there is nothing to learn from"):
        train(model, tmp_path / "run", "labels=target", "target_rule=threshold:tau=0.1")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("problems=3", "problems is 3, which does not fill a batch of 4"),
        ("thresholds=[0.9,0.2]", "the smaller one first"),
        ("rate=-1", "rate is -1.0, but it must be positive"),
        ("clip=0", "clip is 0.0, but it must be positive"),
        ("labels=target target_rule=flwo", "there is no rule 'flwo', did you mean flow?"),
        ("width=6", "width is 6, but it must be a multiple of 4"),
        ("labels=words", "labels is"),
        ("above=1.0", "above is 1.0"),
        ("switches=reedit=disagreement", "an entry policy needs reedit=always"),
        ("protocol=['gen_len=3']", "gen_len"),
    ],
)
def test_bad_input_is_one_sentence_before_any_step(model, tmp_path, override, sentence):
    with pytest.raises(UserError, match=sentence):
        train(model, tmp_path / "run", *override.split())
    assert not (tmp_path / "run").exists()
