"""Tests of train.pretrain and train.self_generate on a small model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import TOKENIZER
from tests.run_helpers import metrics
from train import pretrain, self_generate
from train.mixture import make_pairs
from train.pretrain_config import PretrainConfig
from xflow_jax.errors import UserError
from xflow_jax.lm import BUNDLED, load, read_tasks
from xflow_jax.models import abstract_params, build
from xflow_jax.tasks import get_task
from xflow_jax.tokenizer import chat_ids, load_tokenizer
from xflow_jax.toml_config import load_toml

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


def tensors(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "hf/model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    for name, value in tensors(a).items():
        np.testing.assert_array_equal(value, tensors(b)[name], err_msg=name)


def stop_in_the_third_step(patch: pytest.MonkeyPatch) -> None:
    steps = pretrain.Run.steps

    def interrupted(run, first, last, describe):
        for step in steps(run, first, last, describe):
            run.stopped = step == 2
            yield step

    patch.setattr(pretrain.Run, "steps", interrupted)


@pytest.fixture(scope="module", autouse=True)
def steps():
    """Shares the step, and so its program, between runs that differ in their folder alone."""
    train, make, made = pretrain.train, pretrain.make_pretrain_step, {}

    def shared(config):
        same = repr(dataclasses.replace(config, out=""))

        def kept(*arguments):
            which = same, arguments[3:]
            if which not in made:
                made[which] = make(*arguments)
            return made[which]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretrain, "make_pretrain_step", kept)
            train(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train", shared)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    pretrain_small(folder / "model")
    generate_small(folder)
    return folder


@pytest.mark.slow
def test_pretraining_stopped_and_resumed_equals_one_run(base, tmp_path, monkeypatch):
    # After a stop in the middle, the run saves and ends, and the next call continues.
    with monkeypatch.context() as patch:
        stop_in_the_third_step(patch)
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


@pytest.mark.slow
def test_clean_copies_stopped_and_resumed_equal_one_run(base, tmp_path, monkeypatch):
    """The resumed run begins with clean copies and goes on without them."""
    clean = ["clean_steps=4", "clean_blocks=[1, 8]", "clean_window=3"]
    pretrain_small(tmp_path / "whole", *clean)
    with monkeypatch.context() as patch:
        stop_in_the_third_step(patch)
        pretrain_small(tmp_path / "run", *clean)
    pretrain_small(tmp_path / "run", *clean)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert metrics(tmp_path / "whole")[-2] != metrics(base / "model")[-2]


@pytest.mark.slow
def test_the_early_distribution_of_named_tasks_alone():
    options = ["out=", f"tokenizer={ROOT / 'xflow_jax' / 'tiny'}", *MIXTURE, "batch_size=4"]

    def pairs(*more):
        config = load_toml(ROOT / "configs/pretrain_tiny.toml", PretrainConfig, [*options, *more])
        return pretrain.make_data(config, TOKENIZER)[0]

    everywhere, named, nowhere = (
        pairs(f"wide_steps={steps}", *more)
        for steps, more in ((4, []), (4, ['wide_tasks=["latin-square"]']), (0, []))
    )
    kinds = set()
    for row in range(24):
        is_square, is_early = named.choose(row // 4) == 1, row < 16
        wanted = everywhere if is_square else nowhere
        assert named[row]["response"].tolist() == wanted[row]["response"].tolist()
        assert named[row]["prompt"].tolist() == wanted[row]["prompt"].tolist()
        differ = everywhere[row]["prompt"].tolist() != nowhere[row]["prompt"].tolist() or (
            everywhere[row]["response"].tolist() != nowhere[row]["response"].tolist()
        )
        kinds.add((is_square, is_early, differ))
    assert kinds >= {(True, True, True), (False, True, True)}
    assert not {differ for _, is_early, differ in kinds if not is_early} & {True}


@pytest.mark.slow
def test_clean_copies_alternate_with_masks_anywhere(tmp_path, monkeypatch):
    count, layouts = pretrain.count_work, []

    def counted(model_config, batch, is_clean):
        layouts.append((is_clean, batch["response"].shape[1]))
        return count(model_config, batch, is_clean)

    monkeypatch.setattr(pretrain, "count_work", counted)
    monkeypatch.setattr(pretrain, "solve_rate", lambda *_: 0.0)
    copies = ["clean_steps=10", "clean_every=2", "clean_window=4", 'clean_tasks=["microcode"]']
    pretrain_small(tmp_path / "run", *MIXTURE, *copies, "steps=12", "gen_length=[64, 48]")
    rows = metrics(tmp_path / "run")[:-1]
    assert len(rows) == len(layouts) == 12
    for row, (is_clean, length) in zip(rows, layouts, strict=True):
        step, is_microcode = row["step"] - 1, "loss_microcode" in row
        assert is_clean == (is_microcode and step % 2 == 0 and step < 10)
        # Only batches with clean copies lose padding.
        assert length < 64 if is_clean else length == (64 if is_microcode else 48)
    assert {is_clean for is_clean, _ in layouts} == {True, False}


def test_a_run_begins_with_the_parameters_of_a_model(base, tmp_path):
    standing = ["steps=1", f"start={base / 'model/hf'}", "rate_points=[[0, 0.0], [1, 0.0]]"]
    pretrain_small(tmp_path / "run", *standing)
    for name, value in tensors(base / "model").items():
        np.testing.assert_array_equal(value, tensors(tmp_path / "run")[name], err_msg=name)


@pytest.mark.slow
def test_a_block_causal_model_begins_with_a_llada_model(base, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "solve_rate", lambda *_: 0.0)
    standing = ["steps=1", f"start={base / 'model/hf'}", "rate_points=[[0, 0.0], [1, 0.0]]"]
    pretrain_small(tmp_path / "run", *standing, "model.block_size=8", "block_length=8")
    lm = load(tmp_path / "run/hf")
    assert lm.config.family == "sdar" and lm.config.default_block_length == 8
    blocks, start = lm.params["blocks"], load(base / "model/hf").params
    for name in ("q", "k"):
        norm = blocks.pop(f"{name}_norm")["scale"]
        assert norm.shape == (1, 8) and (norm > 0).all()
    jax.tree.map(np.testing.assert_array_equal, lm.params, start)
    (row,) = (row for row in metrics(tmp_path / "run") if "loss" in row)
    # An untrained model knows nothing of 352 rows of the table.
    assert 4 < row["masked_nll"] < 8

    # It goes on from a model of its family as well, which need not have the same blocks.
    standing[1] = f"start={tmp_path / 'run/hf'}"
    pretrain_small(tmp_path / "next", *standing, "model.block_size=4", "block_length=8")
    for name, value in tensors(tmp_path / "run").items():
        np.testing.assert_array_equal(value, tensors(tmp_path / "next")[name], err_msg=name)
    with pytest.raises(UserError, match="has another shape than"):
        pretrain_small(tmp_path / "back", *standing)


def test_a_start_of_another_shape_is_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"start: .*hf has another shape than \[model\]"):
        pretrain_small(tmp_path / "run", f"start={base / 'model/hf'}", "model.d_model=8")


@pytest.mark.parametrize("override", ["model.n_heads=4", "model.rope_theta=500"])
def test_a_start_that_computes_otherwise_is_refused(base, tmp_path, override):
    name, value = override.removeprefix("model.").split("=")
    with pytest.raises(
        UserError, match=rf"hf has {name} .*, and the run {value}.* the same \[model"
    ):
        pretrain_small(tmp_path / "run", f"start={base / 'model/hf'}", override)


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
    config = PretrainConfig("out", "folder")
    with pytest.raises(
        UserError, match=re.escape("folder: the tokenizer has no token <|mdm_mask|>")
    ):
        pretrain.make_model_config(config, NoMask())


MIXTURE = ['tasks=["microcode", "latin-square"]', "weights=[1, 2]", "prompt_length=[40, 64]"]
MIXTURE += ["block_length=[16, 48]", "wide_steps=2", "model.d_model=8"]
MIXTURE += ["seed=4"]  # of which both tasks occur before and after the third step


@pytest.mark.slow
def test_a_mixture_stopped_and_resumed_equals_one_run(tmp_path, monkeypatch):
    """Both tasks occur on either side of the stop, each with its own shape."""
    pretrain_small(tmp_path / "whole", *MIXTURE)
    rows = metrics(tmp_path / "whole")
    solved = rows[-1]
    assert set(solved) == {"step", "solved", "solved_microcode", "solved_latin-square"}
    names = [next(key for key in row if key.startswith("loss_")) for row in rows[:-1]]
    assert set(names[:3]) == set(names[3:]) == {"loss_microcode", "loss_latin-square"}
    assert all(row["loss"] == row[name] for row, name in zip(rows, names, strict=False))
    about = json.loads((tmp_path / "whole/hf/provenance.json").read_text())
    assert about["tasks"] == ["microcode", "latin-square"] and "task" not in about
    assert read_tasks(tmp_path / "whole/hf") == ("microcode", "latin-square")
    with monkeypatch.context() as patch:
        stop_in_the_third_step(patch)
        pretrain_small(tmp_path / "run", *MIXTURE)
    shares = {name: solved[f"solved_{name}"] for name in about["tasks"]}
    monkeypatch.setattr(pretrain, "solve_rate", lambda lm, config, how: shares[how.task.name])
    pretrain_small(tmp_path / "run", *MIXTURE)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["clean_blocks=[1, 0]"], "clean_blocks is [1, 0], but it must hold lengths of at least 1"),
        (["clean_every=0"], "clean_every is 0, but it must be at least 1"),
        (["model.block_size=-1"], "model.block_size is -1, but it must not be negative"),
        (
            ['wide_tasks=["latin-square"]'],
            "wide_tasks has latin-square, but tasks has only microcode",
        ),
        (
            ['clean_tasks=["latin-square"]'],
            "clean_tasks has latin-square, but tasks has only microcode",
        ),
        (["clean_steps=-1"], "clean_steps is -1, but it must not be negative"),
        (["tasks=[]"], "tasks is empty, but it must name at least one task"),
        (['tasks=["microcode", "latin"]'], "did you mean latin-square?"),
        (['tasks=["microcode", "microcode"]'], "tasks names a task twice"),
        (['tasks=["mbpp"]'], "the task mbpp has no endless training set to train on"),
        ([*MIXTURE, "weights=[1]"], "weights has 1 values for 2 tasks"),
        ([*MIXTURE, "weights=[1, 0]"], "weights is 0.0, but it must be positive"),
        ([*MIXTURE, "gen_length=[48]"], "gen_length has 1 values for 2 tasks"),
        ([*MIXTURE, "gen_length=[48, 0]"], "gen_length is 0, but it must be at least 1"),
        ([*MIXTURE, "prompt_length=40"], "latin-square: 200 of 200 pairs do not fit prompt_length"),
        (["gen_length=20"], "pairs do not fit prompt_length 40 and gen_length 20. They need "),
        (['tasks=["microcode-long"]'], "microcode-long: 200 of 200 pairs do not fit"),
    ],
)
def test_a_bad_mixture_is_one_sentence_at_the_start(tmp_path, monkeypatch, overrides, sentence):
    monkeypatch.setattr(pretrain, "Run", lambda *_: pytest.fail("the run has begun"))
    with pytest.raises(UserError) as error:
        pretrain_small(tmp_path / "run", *overrides)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_bundled_models_fit_into_the_package():
    """12 MB altogether, of at most 6 M parameters each."""
    files = [path for path in (ROOT / "xflow_jax").rglob("*") if path.is_file()]
    models = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent for path in models} == set(BUNDLED.values())
    sizes = [path.stat().st_size for path in models]
    assert sum(sizes) < 12e6 and max(sizes) <= 2 * 6e6
    # With the code as well, no model left out.
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 13e6


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["pretrain_small", "pretrain_microcode_long", "pretrain_tiny_long"]
)
def test_mixtures_of_the_configurations_fit_their_tasks(name):
    config = load_toml(ROOT / f"configs/{name}.toml", PretrainConfig)
    tokenizer = load_tokenizer(config.tokenizer)
    params = abstract_params(build(pretrain.make_model_config(config, tokenizer)))
    assert sum(x.size for x in jax.tree.leaves(params)) <= 6e6
    assert [how.task.name for how in config.components] == list(config.tasks)
    for how in config.components:
        assert how.gen_length == how.task.config.gen_length
        assert how.block_length == how.task.config.block_length
    early = [0] * len(config.tasks)
    make_pairs(config.components, tokenizer, config.seed, config.batch_size, early)  # all fit


@pytest.mark.parametrize("name", ["microcode-long", "latin-square"])
def test_requests_of_every_task_are_answered_and_judged(tmp_path, monkeypatch, name):
    task = get_task(name)
    config = load_toml(
        ROOT / "configs/self_generate_tiny.toml",
        self_generate.SelfGenerateConfig,
        [f"prompts={name}", "limit=3", "seed=4"],
    )
    problems = self_generate.training_problems(config, task)
    assert problems == task.generate("train", 3, 5)
    prompts = self_generate.read_prompts(config, TOKENIZER)
    assert prompts == {i: chat_ids(TOKENIZER, task.prompt(p)) for i, p in enumerate(problems)}
    answers = [task.canonical(problem) for problem in problems]
    assert self_generate.judge(task, problems, [*answers[:2], "no"]) == [True, True, False]
    monkeypatch.setattr(self_generate, "_decode", lambda config, lm, rows: ([[1]] * 3, answers))
    out = tmp_path / "out.jsonl"
    self_generate._generate(config, None, prompts, set(), out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["index"] for row in rows} == {0, 1, 2}
    # Batches are in order of length, and so the answers must be as well.
    order = sorted(prompts, key=lambda i: (len(prompts[i]), i))
    assert [row["passed"] for row in rows] == [i == j for i, j in enumerate(order)]
