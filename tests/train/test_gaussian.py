"""Tests of train.gaussian on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.run_helpers import fate, metrics
from train import gaussian, pretrain
from train.pretrain_config import PretrainConfig
from xflow_jax.errors import UserError
from xflow_jax.evaluation import read_answers
from xflow_jax.tasks import get_task

ROOT = Path(__file__).parents[2]
SMALL = [
    *("model.d_model=8", "model.n_layers=1", "model.n_heads=2", "model.mlp_hidden_size=8"),
    *("batch_size=4", "steps=4", "save_every=2", "log_every=1", "evaluate_every=100"),
    *("answers=5", "passes=[2]", "seed=3"),
]


def run(out: Path, *overrides: str) -> None:
    places = [f"out={out}", f"tokenizer={ROOT / 'xflow_jax' / 'tiny'}"]
    gaussian.main(str(ROOT / "configs/gaussian_tiny.toml"), [*places, *SMALL, *overrides])


@pytest.mark.slow
def test_a_resumed_run_equals_a_straight_one(tmp_path):
    # The step is made once, since a compilation is the longest part of a run.
    made = {}
    make = gaussian.make_gaussian_step

    def kept(*arguments):
        return made.setdefault("step", make(*arguments))

    def stop(run):
        run.stopped = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian, "make_gaussian_step", kept)
        run(tmp_path / "whole")
        with fate(2, stop):
            run(tmp_path / "parts")
        assert not (tmp_path / "parts/answers").exists()
        assert metrics(tmp_path / "parts")[-1]["step"] == 3
        run(tmp_path / "parts")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    name = "answers/microcode_2.jsonl"
    assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    task = get_task("microcode")
    ids = [task.task_id(problem) for problem in task.problems(None, 5)]
    assert [i for i, _ in read_answers(tmp_path / "whole" / name, ids, ids)] == ids
    lines = (tmp_path / "whole" / name).read_text().splitlines()
    assert len({json.loads(line)["completion"] for line in lines}) > 1


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedule=cosine", "schedule"),
        ("schedule_rate=0", "schedule_rate is 0.0, but it must be positive"),
        ("answers=0", "answers is 0, but it must be at least 1"),
        ("passes=[]", "passes is [], but it must be one or more numbers from 1 on"),
        ("passes=[48, 0]", "passes is [48, 0], but it must be one or more numbers from 1 on"),
        ("block_length=16", "block_length has no use here"),
        ("model.block_size=16", "model.block_size is 16, but all positions are decoded together."),
        ("clean_steps=9", "clean_steps is 9, but there are no clean copies here. Leave it out."),
    ],
)
def test_bad_input_is_one_sentence_at_the_start(tmp_path, override, sentence):
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", override)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_start_of_another_shape_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"start: tiny-base has another shape than \[model\]"):
        run(tmp_path / "run", "start=tiny-base")


def test_no_curriculum_is_all_noise_from_the_first_step():
    config = PretrainConfig("out", "folder", curriculum_steps=0)
    assert pretrain.curriculum(config)(0) == 1
    config = PretrainConfig("out", "folder", curriculum_steps=10, first_sigma=0.3)
    assert [round(float(pretrain.curriculum(config)(step)), 3) for step in (0, 5, 10)] == [
        *(0.3, 0.65, 1.0)
    ]
