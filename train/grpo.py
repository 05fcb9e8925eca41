"""GRPO for the step-size policy (Eq. 18): `python -m train.grpo configs/grpo_tiny.toml`.

The model is frozen. A small policy learns how far each position moves. Each step samples a group of
decodes per prompt, runs the answers in the sandbox, and makes the actions of the better decodes of
a group likelier.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TypeAlias

import jax
import optax
from jax.sharding import Mesh

from train.grpo_config import GrpoConfig
from train.grpo_sampler import AnyPolicy, Sampler, parse_flow
from train.run import Run
from train.setup import run_program
from xflow_jax.decoding import (
    EntryPolicy,
    Flow,
    Policy,
    fit_policy,
    init_entry_policy,
    init_policy,
    load_policy,
    parse_budget,
    parse_rule,
    save_policy,
)
from xflow_jax.errors import UserError, require
from xflow_jax.evaluation import (
    Answers,
    Cell,
    describe_rule,
    describe_task,
    evaluate,
    fingerprint,
    make_cells,
    open_answers,
    plot_policy_steps,
)
from xflow_jax.input_files import to_path
from xflow_jax.lm import LM, load
from xflow_jax.parallel import count_shards, make_mesh, multihost, put_sharded, replicated
from xflow_jax.tasks import Task, get_task
from xflow_jax.toml_config import load_toml
from xflow_jax.training import Rollout, TrainState, make_policy_step
from xflow_jax.types import Metrics

StepFn: TypeAlias = Callable[[TrainState, Rollout, jax.Array], tuple[TrainState, Metrics]]


def main(path: str, overrides: list[str]) -> None:
    """Trains a policy to the configured step, writes and plots it.

    Args:
        path: TOML file of a GrpoConfig.
        overrides: texts like "key=value".

    Raises:
        UserError: for bad input. It is found before the folder of the run is made.
    """
    config = load_toml(path, GrpoConfig, overrides)
    task = get_task(config.task)
    mesh = make_mesh(config.mesh) if config.mesh or jax.process_count() > 1 else None
    check_mesh(config, mesh)
    policy = start_policy(config)
    parse_flow(config.switches, policy, task)  # refuses switches that the policy cannot use
    require(
        config.imitate == 1 or isinstance(policy, EntryPolicy),
        f"imitate is {config.imitate}, but only an entry policy can imitate a threshold",
    )
    lm = load(config.model, dtype=config.dtype, mesh=mesh)
    flow = parse_flow(config.switches, None, task)
    cell = make_cells(lm, task, {"flow": flow}, [parse_budget(config.budget)])[0]
    sampler = Sampler(lm, task, config, select_problems(config, task, lm), cell)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(config.rate))
    begin = TrainState.create(policy.params, optimizer)
    if mesh is not None:  # processes share global arrays only
        begin = put_sharded(begin, replicated(mesh))
        policy = dataclasses.replace(policy, params=begin.params)
    step_fn = jax.jit(
        make_policy_step(
            policy,
            optimizer,
            config.epsilon,
            config.epochs,
            config.per_position,
            config.scale_rewards,
        ),
        out_shardings=None if mesh is None else replicated(mesh),
    )
    held_out = task.problems(_data_file(config), config.evaluate_problems)
    measure = partial(evaluate_policy, config, lm, task, held_out, cell)
    with Run(config.out, config.seed, devices=1 if mesh is None else mesh.size) as run:
        run.frozen = fingerprint(lm.params)
        state = train(run, config, sampler, policy, begin, step_fn, measure)
        if int(state.step) == config.steps and multihost.is_first_process():
            trained = dataclasses.replace(policy, params=jax.device_get(state.params))
            _write_policy(config, trained)


def _write_policy(config: GrpoConfig, policy: AnyPolicy) -> None:
    """Writes the policy, and plots its steps if it has any."""
    out = to_path(config.out)
    options = dataclasses.asdict(config)
    # The same run has the same bytes in every folder.
    for place in ("out", "solved"):
        del options[place]
    made_by = {"command": "python -m train.grpo", "config": options}
    metadata = {"switches": config.switches, "made_by": json.dumps(made_by)}
    save_policy(out / "policy.safetensors", policy, **metadata)
    print(f"{out / 'policy.safetensors'}: the policy")
    if isinstance(policy, Policy):
        plot_policy_steps(policy, out / "policy.png")
        print(f"{out / 'policy.png'}: its steps")


def check_mesh(config: GrpoConfig, mesh: Mesh | None) -> None:
    """Checks that the devices divide the rows of a batch.

    Args:
        config: the configuration.
        mesh: the mesh, or None for one device.

    Raises:
        UserError: if they do not.
    """
    rows = config.prompts_per_step * config.group_size
    devices = count_shards(mesh)
    require(
        rows % devices == 0,
        f"prompts_per_step x group_size is {rows}, which {devices} devices of the mesh do not "
        "divide",
    )


def train(
    run: Run,
    config: GrpoConfig,
    sampler: Sampler,
    policy: AnyPolicy,
    state: TrainState,
    step_fn: StepFn,
    measure: Callable[[AnyPolicy], Mapping[str, float]],
) -> TrainState:
    """Runs GRPO, from the last checkpoint if there is one.

    Args:
        run: the folder of the run.
        config: the configuration.
        sampler: samples and judges the batches.
        policy: supplies the ranges of the policy.
        state: the state before the first step.
        step_fn: the step.
        measure: metrics of a policy on held-out problems.

    Returns:
        The state after the last step.
    """
    # `behaviour` is the parameters that sample the next batch. With them a resumed run samples that
    # batch again.
    behaviour = state.params
    if run.latest is not None:
        (state, behaviour), _ = run.restore((state, behaviour))
    first = int(state.step)

    def with_params(params: Mapping[str, jax.Array]) -> AnyPolicy:
        return dataclasses.replace(policy, params=params)

    if first == 0:
        run.log(0, measure(with_params(state.params)))

    def sample(params: Mapping[str, jax.Array], step: int) -> Rollout | None:
        return sampler(with_params(params), step) if step < config.steps else None

    rollouts = sample(behaviour, first)
    tokens, flops = sampler.count_work()
    with ThreadPoolExecutor(1) as judge, sampler.sandbox:
        for step in run.steps(first, config.steps, "grpo"):
            done, is_last = step + 1, step + 1 == config.steps
            batch = rollouts
            assert batch is not None
            scores = judge.submit(sampler.judge, step, batch.tokens)
            if config.overlap:
                behaviour, rollouts = state.params, sample(state.params, done)
            rewards, metrics = sampler.reward(scores, batch, policy)
            state, step_metrics = step_fn(state, batch, rewards)
            if not config.overlap:
                behaviour, rollouts = state.params, sample(state.params, done)
            run.clock.count(step_metrics, tokens, flops, metrics["forward_passes"])
            if done % config.log_every == 0 or is_last:
                run.log_step(done, metrics | step_metrics, "reward")
            if done % config.evaluate_every == 0 or is_last:
                with run.clock.paused((step_metrics, rollouts)):
                    measured = measure(with_params(state.params))
                run.log(done, measured)
                solved = measured["held_out/solved"]
                run.bar.write(f"step {done}: {solved:.1%} of the held-out problems are solved")
            if done % config.save_every == 0 or is_last or run.stopped:
                run.save(done, (state, behaviour))
    run.wait()
    return state


def evaluate_policy(
    config: GrpoConfig,
    lm: LM,
    task: Task,
    problems: Sequence[object],
    cell: Cell,
    policy: AnyPolicy,
) -> dict[str, float]:
    """Measures the expected steps of a policy on held-out problems.

    Args:
        config: the configuration.
        lm: the model.
        task: the task.
        problems: held-out problems.
        cell: the budget.
        policy: the policy.

    Returns:
        The share of solved problems, and the mean number of forward passes.
    """
    cell = dataclasses.replace(cell, rule=parse_flow(config.switches, policy, task))
    answers = Answers(None, {})
    row = evaluate(lm, task, problems, [cell], answers, config.batch_size, config.seed)[0]
    return {"held_out/solved": row.accuracy / 100, "held_out/forward_passes": row.forward_passes}


def start_policy(config: GrpoConfig) -> AnyPolicy:
    """Makes the policy before the first step.

    Args:
        config: the configuration.

    Returns:
        A new policy, one from a file, or one fitted to a fixed rule.

    Raises:
        UserError: for a file that is not a policy, or a rule that is not a flow.
    """
    chosen, init = config.policy, config.policy.init
    key, fit_key = jax.random.split(jax.random.key(config.seed))
    if init == "entry":
        return init_entry_policy(key, chosen.width, chosen.above, chosen.temperature)
    if init != "fresh" and not init.startswith("flow"):
        return load_policy(init)
    names = ("width", "a_min", "a_max", "kappa_min", "kappa_max")
    policy = init_policy(key, **{name: getattr(chosen, name) for name in names})
    if init == "fresh":
        return policy
    _, rule = parse_rule(init)
    if not isinstance(rule, Flow):
        raise UserError(f"policy.init is {init!r}, but it must be a flow")
    return fit_policy(policy, rule.fixed_step, fit_key)


def select_problems(config: GrpoConfig, task: Task, lm: LM) -> list[object]:
    """Selects the problems to train on (`solved_only`, `failed_by`).

    The answers for the selection are kept in a folder that describes model, rules and problems, so
    a second run does not decode again.

    Args:
        config: the configuration.
        task: the task.
        lm: the model.

    Returns:
        The problems.

    Raises:
        UserError: if the model has no tokenizer, or if the problems do not fill a batch.
    """
    if lm.tokenizer is None:
        raise UserError(
            f"{config.model} has no tokenizer.json, which training needs for its prompts"
        )
    problems = list(task.training(_data_file(config), config.problems or None))
    options = task.config.rule_options
    cells = []
    if config.solved_only:
        cells += make_cells(lm, task, dict([parse_rule("mask", options)]), [Fraction(1)])
    if config.failed_by:
        rules = dict([parse_rule(config.failed_by, options)])
        cells += make_cells(lm, task, rules, [parse_budget(config.budget)])
    if cells:
        description = describe_task(task, _data_file(config)) | {
            "model": f"{fingerprint(lm.params)} {config.dtype}",
            "rules": [[str(cell.budget), describe_rule(cell.rule)] for cell in cells],
            "problems": config.problems,
        }
        with open_answers(config.solved, json.loads(json.dumps(description))) as answers:
            for cell in cells:
                evaluate(lm, task, problems, [cell], answers, config.batch_size)
                ids = [task.task_id(problem) for problem in problems]
                given = answers.select(cell.label, str(cell.budget), ids)
                # Solved by mask prediction, and not by the other rule.
                wanted = config.solved_only and cell is cells[0]
                problems = [p for p, a in zip(problems, given, strict=True) if a.passed == wanted]
        print(f"{len(problems)} problems to train on")
    require(
        len(problems) >= config.prompts_per_step,
        f"{len(problems)} problems do not fill a batch of {config.prompts_per_step}. Use more.",
    )
    return problems


def _data_file(config: GrpoConfig) -> Path | None:
    return None if config.data is None else to_path(config.data)


if __name__ == "__main__":
    run_program(main, "python -m train.grpo CONFIG [key=value ...]")
