"""Tests of train.grpo on a small random model: results, resumed runs, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import eight
from tests.run_helpers import all_metrics, metrics
from train import grpo, grpo_sampler
from train.grpo_sampler import Sampler, make_score, parse_flow
from train.pretrain import make_model_config
from train.pretrain_config import ModelShape, PretrainConfig
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.decoding.entry_policy import init_entry_policy
from xflow_jax.decoding.policy import features, fit_policy, init_policy
from xflow_jax.decoding.policy_io import load_policy
from xflow_jax.errors import UserError
from xflow_jax.evaluation import make_cells
from xflow_jax.lm import load
from xflow_jax.models.factory import build, init_params
from xflow_jax.sandbox.pool import run_many
from xflow_jax.tasks import get_task
from xflow_jax.tokenizer import load_tokenizer
from xflow_jax.toml_config import load_toml
from xflow_jax.training.rollout import Rollout

ROOT = Path(__file__).parents[2]
TINY = ROOT / "xflow_jax" / "tiny"
QUICK = [
    "problems=8",
    "solved_only=false",
    "prompts_per_step=2",
    "group_size=4",
    "steps=4",
    "budget=1/16",
]
QUICK += [
    "failed_by=",
    "policy.init=fresh",
    "policy.a_max=1",
    "switches=",
    "epochs=1",
    "scale_rewards=group",
]
QUICK += ["seed=4"]  # a resumed run must not fall back to another one
QUICK += ["save_every=1", "evaluate_every=100", "evaluate_problems=4", "batch_size=4", "rate=1e-2"]


def write_model(folder: Path) -> Path:
    """Writes a small random model with the tokenizer of the bundled one."""
    shape = ModelShape(d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=16)
    config = make_model_config(
        PretrainConfig(out="", tokenizer="", model=shape), load_tokenizer(TINY)
    )
    params = jax.tree.map(lambda x: 20 * x, init_params(build(config), jax.random.key(0)))
    write_hf(folder, params, config, TINY)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("grpo") / "model")


def overrides_of(model: Path, out: Path, *overrides: str) -> list[str]:
    return [f"model={model}", f"out={out}", f"solved={out.parent / 'solved'}", *QUICK, *overrides]


def train(model: Path, out: Path, *overrides: str) -> None:
    grpo.main(str(ROOT / "configs/grpo_tiny.toml"), overrides_of(model, out, *overrides))


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    assert_same_policy(a, b)


def assert_same_policy(a: Path, b: Path) -> None:
    ours, theirs = (load_file(out / "policy.safetensors") for out in (a, b))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Shares the programs of runs that differ in their folders and in the number of steps."""
    make_score, make_step, made, current = grpo_sampler.make_score, grpo.make_policy_step, {}, [""]

    def score(config, eos_id):
        own = dict.fromkeys(("model", "out", "solved", "steps"))
        current[0] = repr((dataclasses.asdict(config) | own, eos_id))
        return kept("score", make_score, config, eos_id)

    def step(*arguments):  # is made after the score
        return kept("step", make_step, *arguments)

    def kept(name, make, *arguments):
        if (name, current[0]) not in made:
            made[name, current[0]] = make(*arguments)
        return made[name, current[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_sampler, "make_score", score)
        patch.setattr(grpo, "make_policy_step", step)
        yield


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grpo") / "straight"
    train(model, out)
    return out


def test_a_run_leaves_a_policy_its_picture_and_metrics(straight):
    policy = load_policy(straight / "policy.safetensors")
    fresh = grpo.start_policy(grpo.GrpoConfig(model="", out="", seed=4))
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), policy.params, fresh.params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert (straight / "policy.png").stat().st_size > 1000
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert {
        "reward",
        "reward_std",
        "clip_ratio/region_mean",
        "forward_passes",
        "step/c_0.9",
    } <= rows[1].keys()
    assert "held_out/solved" in rows[0] and "held_out/solved" in rows[-1]
    assert {"seconds_per_step", "tokens_per_second", "goodput"} <= all_metrics(straight)[2].keys()
    assert rows[1]["ratio"] == 1.0, "the first batch is sampled by the policy that it trains"


@pytest.mark.slow
def test_a_run_stopped_and_resumed_equals_one_run(model, straight, tmp_path, monkeypatch):
    steps = grpo.Run.steps

    def interrupted(run, first, last, describe):
        for step in steps(run, first, last, describe):
            run.stopped = step == 1
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(grpo.Run, "steps", interrupted)
        train(model, tmp_path / "run")
    assert (
        not (tmp_path / "run/policy.safetensors").exists()
        and metrics(tmp_path / "run")[-1]["step"] == 2
    )
    train(model, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.slow
def test_a_run_continued_with_more_steps_equals_one_run(model, straight, tmp_path):
    train(model, tmp_path / "run", "steps=2")
    train(model, tmp_path / "run")
    rows = [row for row in metrics(tmp_path / "run") if "reward" in row]
    assert rows == [row for row in metrics(straight) if "reward" in row]
    assert_same_policy(straight, tmp_path / "run")


def test_flows_have_the_options_of_their_task():
    assert parse_flow("", None, get_task("humaneval")).logits_eos_inf
    assert not parse_flow("logits_eos_inf=false", None, get_task("humaneval")).logits_eos_inf
    assert parse_flow("", None, get_task("mbpp")).confidence_eos_eot_inf
    assert not parse_flow("", None, get_task("microcode")).confidence_eos_eot_inf


@pytest.mark.slow
def test_a_run_of_other_weights_is_not_continued(model, straight, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    lm = load(model)
    write_hf(other, jax.tree.map(lambda x: x * 1.5, lm.params), lm.config, TINY)
    shutil.copytree(straight, run)
    sentence = "its checkpoint is of another model. The fingerprint of its weights is .* there and"
    with pytest.raises(UserError, match=sentence):
        train(other, run, "steps=5")


@pytest.mark.parametrize("after_eos", [False, True])
def test_rewards_follow_the_protocols_end_of_an_answer(model, tmp_path, after_eos):
    """As in evaluation, text after EOS counts only if the protocol keeps it."""
    overrides = overrides_of(model, tmp_path / "run")
    config = load_toml(ROOT / "configs/grpo_tiny.toml", grpo.GrpoConfig, overrides)
    lm, task = load(model), get_task("microcode", [f"after_eos={str(after_eos).lower()}"])
    problems = task.problems(None, 2)
    cell = make_cells(lm, task, {"flow": parse_flow("", None, task)}, [Fraction(1)])[0]
    sampler = Sampler(lm, task, config, problems, cell)
    eos = lm.config.eos_id
    rows = [
        [eos, *lm.tokenizer.encode(task.canonical(problems[i]), add_special_tokens=False)]
        for i in sampler.row_problems(0)
    ]
    longest = max(map(len, rows))
    tokens = jnp.asarray([row + [eos] * (longest - len(row)) for row in rows])
    with sampler.sandbox:
        assert (sampler.judge(0, tokens) == float(after_eos)).all()


@eight
@pytest.mark.slow
def test_a_mesh_trains_the_same_policy(model, straight, tmp_path):
    train(model, tmp_path / "run", "mesh=2,2,2")
    ours, theirs = (load_file(out / "policy.safetensors") for out in (straight, tmp_path / "run"))
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_solved_problems_are_found_once(model, tmp_path, monkeypatch):
    """A random model solves nothing. A second run does not decode again."""
    with pytest.raises(UserError, match="0 problems do not fill a batch of 2"):
        train(model, tmp_path / "run", "solved_only=true", "problems=3")
    lines = (tmp_path / "solved/answers.jsonl").read_text()
    assert len(lines.splitlines()) == 3
    monkeypatch.setattr("xflow_jax.evaluation.runner.generate", None)
    with pytest.raises(UserError, match="0 problems"):
        train(model, tmp_path / "run", "solved_only=true", "problems=3")
    assert (tmp_path / "solved/answers.jsonl").read_text() == lines
    with pytest.raises(UserError, match="another run, which differs in problems"):
        train(model, tmp_path / "run", "solved_only=true", "problems=4")


@pytest.mark.slow
def test_problems_are_those_that_a_rule_fails(model, tmp_path):
    """A random model fails all of them. Without solved_only no mask prediction is needed."""
    train(model, tmp_path / "run", "failed_by=threshold:tau=0.9", "problems=3", "steps=1")
    lines = (tmp_path / "solved/answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["rule"] for line in lines] == ["threshold:tau=0.9"] * 3


def test_the_share_of_tests_is_a_reward(model, tmp_path):
    """Each test of a problem is a program of its own."""
    task = grpo.get_task("microcode")
    problem = task.training(None, 1)[0]
    right = task.extract(problem, task.canonical(problem))
    parts = task.parts(problem, right)
    assert len(parts) == len(problem.cases()) and all(result.passed for result in run_many(parts))
    constant = f"def solve(xs):\n    return {problem.cases()[0][1]!r}"
    share = [result.passed for result in run_many(task.parts(problem, constant))]
    assert share[0] and not all(share)


def test_the_rewards_of_a_decode():
    ones = jnp.ones((1, 2, 3))
    acted = jnp.array([[[True, True, False], [True, False, False]]])
    made = Rollout(
        tokens=jnp.zeros((2, 3), int),
        progress=jnp.array([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]]),
        forward_passes=jnp.array([6, 3]),
        features=jnp.zeros((1, 2, 3, 8)),
        y=ones / 2,
        log_prob=ones,
        acted=acted,
    )
    config = grpo.GrpoConfig(
        "m", "o", group_size=2, progress_weight=0.5, pass_weight=0.1, delay_weight=0.3
    )
    rewards, _ = make_score(config, 9)(jnp.array([1.0, 0.0]), made, init_policy(jax.random.key(0)))
    wanted = [
        [1 + 0.5 - 0.2 - 0.3, 1 + 0.25 - 0.2 - 0.3, 1 - 0.2],
        [0.5 - 0.1 - 0.3, 0.5 - 0.1, 0.5 - 0.1],
    ]
    np.testing.assert_allclose(rewards[0], wanted, rtol=1e-5)


def rewards_by_speed(steps, passes, solved):
    """Rewards and metrics of one group with speed_power = 0.5."""
    zeros = jnp.zeros((steps, len(passes), 2))
    made = Rollout(
        tokens=jnp.zeros((len(passes), 2), int),
        progress=jnp.ones((len(passes), 2)),
        forward_passes=jnp.array(passes),
        features=jnp.zeros((steps, len(passes), 2, 13)),
        y=zeros,
        log_prob=zeros,
        acted=zeros > 0,
    )
    options = {"group_size": len(passes), "progress_weight": 0.0, "speed_power": 0.5}
    policy = init_entry_policy(jax.random.key(0), 4)
    score = make_score(grpo.GrpoConfig("m", "o", **options), 9)
    rewards, metrics = score(jnp.array(solved), made, policy)
    return rewards[0, :, 0], metrics


def test_a_wrong_answer_earns_nothing_by_its_speed():
    """With a power the verdict is multiplied by (1 - passes / T) ** power."""
    rewards, metrics = rewards_by_speed(8, [2, 6, 2], [1.0, 1.0, 0.0])
    np.testing.assert_allclose(rewards, [0.75**0.5, 0.25**0.5, 0.0], rtol=1e-6)
    assert metrics["rewards/task/mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("steps", [8, 24, 47])
def test_an_answer_that_takes_all_passes_earns_nothing_by_its_speed(steps):
    rewards, _ = rewards_by_speed(steps, [steps, steps], [1.0, 0.0])
    np.testing.assert_array_equal(rewards, [0.0, 0.0])


@pytest.mark.slow
def test_an_entry_policy_trains_beside_a_threshold(model, tmp_path, monkeypatch):
    """The last decode of each group imitates the threshold, the others draw."""
    seen = []
    original = grpo_sampler.rollout

    def spy(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(grpo_sampler, "rollout", spy)
    entry = ["policy.init=entry", "policy.width=8", "policy.above=0.5", "imitate=0.05"]
    train(model, tmp_path / "run", *entry, "switches=reedit_margin=none", "steps=1")
    made = seen[0]
    c, entered = np.asarray(made.features)[..., 0], np.asarray(made.y) > 0
    wanted = (c[0] > 0.05) & np.asarray(made.acted)[0]
    for row in range(8):
        left = (wanted[row] & ~entered[0, row]).any()
        assert left == (row % 4 != 3), "only in the last row of a group all sure masks enter"
    policy = load_policy(tmp_path / "run/policy.safetensors")
    assert policy.above == 0.5 and not (tmp_path / "run/policy.png").exists()
    assert metrics(tmp_path / "run")[1]["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_training_problems_are_none_of_the_held_out_ones():
    task = grpo.get_task("microcode")
    seen = {problem.composition for problem in task.training(None, 200)}
    assert not seen & {problem.composition for problem in task.problems(None, 200)}


@pytest.mark.slow
def test_a_policy_is_fitted_to_a_rule():
    def rule(c):
        return jnp.clip(c**4, 1 / 256, 1)

    policy = fit_policy(init_policy(jax.random.key(0)), rule, jax.random.key(1), updates=400)
    c = jnp.array([0.4, 0.6, 0.8, 0.9])
    top = jnp.stack([c, (1 - c) * 0.6, (1 - c) * 0.3, (1 - c) * 0.1], axis=-1)
    a = policy.expected_step(features(top, jnp.zeros(4), 0.5))
    np.testing.assert_allclose(a, rule(c), atol=0.1)
    mu, kappa = policy.beta(features(top, jnp.zeros(4), 0.5))
    assert (np.abs(np.diff(mu)) > 0.01).all() and np.allclose(kappa, 26)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("group_size=1", "what a decode gains over others"),
        ("epsilon=1.5", "epsilon is 1.5"),
        ("steps=0", "steps is 0, but it must be at least 1"),
        ("budget=1/7", "the budget 1/7 of 48 tokens makes"),
        ("reward=points", "reward is"),
        ("task=microcod", "did you mean microcode"),
        ("switches=powr=3", "no option 'powr', did you mean power"),
        ("policy.init=nowhere.safetensors", "no such file"),
        ("policy.init=entry", "an entry policy needs reedit=always, or reedit_margin=none"),
        ("speed_power=-1.0", "speed_power is -1.0, but it must not be negative"),
        ("imitate=0.5", "imitate is 0.5, but only an entry policy can imitate"),
        pytest.param("mesh=1,8,1", "8 devices", marks=eight),
        ("data=problems.jsonl", "reads no data file"),
    ],
)
def test_bad_input_is_one_sentence_before_any_step(model, tmp_path, override, sentence):
    more = ["prompts_per_step=1", "group_size=4"] if override.startswith("mesh") else []
    with pytest.raises(UserError, match=sentence):
        train(model, tmp_path / "run", override, *more)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_run_ends_as_the_uninterrupted_one(model, tmp_path):
    train(model, tmp_path / "straight", "steps=30")
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "train.grpo",
        "configs/grpo_tiny.toml",
        *overrides_of(model, out, "steps=30"),
    ]
    kills, rng = 0, np.random.default_rng(0)
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ)
        file = out / "metrics.jsonl"
        seen, wanted = (
            file.read_text().count("\n") if file.exists() else 0,
            int(rng.integers(4, 10)),
        )
        while process.poll() is None and kills < 2:
            time.sleep(0.02)
            if file.exists() and file.read_text().count("\n") >= seen + wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        if process.wait() == 0:
            break
    assert kills == 2
    assert_same_run(tmp_path / "straight", out)
