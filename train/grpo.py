"""GRPO for the step-size policy (Eq. 18): `python -m train.grpo configs/grpo_tiny.toml`.

The model is frozen; what learns is the small policy that says how far each position moves. Each step samples a group of
decodes per prompt, runs the answers in the sandbox, and moves the policy toward what did better than its group.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from train.setup import Run, run_program
from xflow_jax.decoding import (
    Flow,
    MaskPrediction,
    Policy,
    fit_policy,
    init_policy,
    load_policy,
    make_decode_config,
    pad_prompts,
    parse_budget,
    parse_rule,
    row_keys,
    save_policy,
)
from xflow_jax.errors import UserError
from xflow_jax.evaluation import (
    Answers,
    Cell,
    describe_rule,
    describe_task,
    evaluate,
    fingerprint,
    make_cells,
    plot_policy_steps,
)
from xflow_jax.lm import LM, load
from xflow_jax.parallel import BATCH, batch_sharding, make_mesh, replicated
from xflow_jax.sandbox import Pool
from xflow_jax.tasks import Task, get_task
from xflow_jax.tokenizer import chat_ids, decode_answers
from xflow_jax.toml_config import load_toml
from xflow_jax.training import (
    Rollout,
    TrainState,
    delay,
    make_policy_step,
    rollout,
    rollout_metrics,
    token_rewards,
)


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy. init: "fresh", the file of a trained one, or a flow like "flow:jump=0.9" to fit before training."""

    init: str = "fresh"
    width: int = 64
    a_min: float = 1 / 256
    a_max: float = 1.0
    kappa_min: float = 2.0
    kappa_max: float = 50.0


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """A run of GRPO; B = prompts_per_step, G = group_size.

    task, data: where the prompts are from; problems: how many of its training split, 0 = all. solved_only: leave out
    those that mask prediction does not solve at full budget; failed_by: and those that this rule does solve in the
    budget of the rollouts (empty: keep them); solved: the folder that keeps what was found of that.
    budget: the share of the full number of steps that rollouts have at most. reward: "pass" or the "share" of tests
    passed, plus progress_weight times the final t of each position, less pass_weight times the forward passes by N and
    delay_weight times the position's `rollout.delay`. per_position: compare positions with the same one of their group,
    so that a reward of a position's own (t, delay) is for its own actions.
    overlap: sample a batch while the one before it is judged, by a policy that is one update behind. switches: options
    of the flow, as in flow:SWITCHES.
    """

    model: str
    out: str
    task: str = "microcode"
    data: str | None = None
    problems: int = 1024
    solved_only: bool = True
    failed_by: str = ""
    solved: str = "runs/grpo_solved"
    budget: str = "1/4"
    switches: str = ""
    prompts_per_step: int = 8
    group_size: int = 8
    steps: int = 300
    reward: Literal["pass", "share"] = "pass"
    progress_weight: float = 0.1
    pass_weight: float = 0.0
    delay_weight: float = 0.0
    per_position: bool = False
    scale_rewards: Literal["group", "batch", "none"] = "group"
    epsilon: float = 0.2
    epochs: int = 1
    rate: float = 3e-4
    clip: float = 1.0
    overlap: bool = True
    policy: PolicyConfig = PolicyConfig()
    evaluate_every: int = 50
    evaluate_problems: int = 128
    log_every: int = 1
    save_every: int = 25
    batch_size: int = 64
    dtype: str = "float32"
    mesh: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "prompts_per_step",
            "group_size",
            "steps",
            "epochs",
            "evaluate_every",
            "log_every",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if self.group_size < 2:
            raise UserError(
                "group_size is 1, but an advantage is what a decode gains over others of its group"
            )
        if not 0 < self.epsilon < 1:
            raise UserError(f"epsilon is {self.epsilon}, but it must be above 0 and below 1")


def main(path: str, overrides: list[str]) -> None:
    """Trains to the configured step; `out`/policy.safetensors is the policy, policy.png a picture of its steps."""
    config = load_toml(path, GrpoConfig, overrides)
    task = get_task(config.task)
    mesh = make_mesh(config.mesh) if config.mesh or jax.process_count() > 1 else None
    lm = load(config.model, dtype=config.dtype, mesh=mesh)
    if lm.tokenizer is None:
        raise UserError(
            f"{config.model} has no tokenizer.json, which training needs for its prompts"
        )
    cell = make_cells(
        lm, task, {"flow": parse_flow(config.switches, None)}, [parse_budget(config.budget)]
    )[0]
    sampler = Sampler(lm, task, config, read_problems(config, task, lm), cell)
    policy = start_policy(config)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(config.rate))
    step_fn = jax.jit(
        make_policy_step(
            policy,
            optimizer,
            config.epsilon,
            config.epochs,
            config.per_position,
            config.scale_rewards,
        )
    )
    held_out = task.problems(
        None if config.data is None else Path(config.data), config.evaluate_problems
    )

    def measure(params: Any) -> dict[str, float]:
        """How the policy does in its expectation on held-out problems."""
        flow = parse_flow(config.switches, policy.replace(params=params))
        cells = [dataclasses.replace(cell, rule=flow)]
        row = evaluate(
            lm, task, held_out, cells, Answers(None, {}), config.batch_size, config.seed
        )[0]
        return {
            "held_out/solved": row.accuracy / 100,
            "held_out/forward_passes": row.forward_passes,
        }

    run = Run(config.out)
    # With `behaviour`, the parameters that sampled the batch at hand, a resumed run samples that batch again.
    train, behaviour = TrainState.create(policy.params, optimizer), policy.params
    if run.latest is not None:
        (train, behaviour), _ = run.restore((train, behaviour))
    first = int(train.step)
    if first == 0:
        run.log(0, measure(train.params))
    made = sampler(policy.replace(params=behaviour), first) if first < config.steps else None
    with ThreadPoolExecutor(1) as judge, sampler.sandbox:
        for step in run.steps(first, config.steps, "grpo"):
            verdicts, batch, last = (
                judge.submit(sampler.judge, step, made.tokens),
                made,
                step + 1 == config.steps,
            )
            if config.overlap and not last:
                behaviour = train.params
                made = sampler(policy.replace(params=behaviour), step + 1)
            rewards, metrics = sampler.reward(verdicts, batch, policy)
            train, learnt = step_fn(train, batch, rewards)
            if not config.overlap and not last:
                behaviour = train.params
                made = sampler(policy.replace(params=behaviour), step + 1)
            done = step + 1
            if done % config.log_every == 0 or last:
                run.log(done, metrics | learnt)
                run.bar.set_postfix(reward=f"{float(metrics['reward']):.3f}")
            if done % config.evaluate_every == 0 or last:
                solved = measure(train.params)
                run.log(done, solved)
                run.bar.write(
                    f"step {done}: {solved['held_out/solved']:.1%} of {len(held_out)} held-out problems"
                )
            if done % config.save_every == 0 or last or run.stopped:
                run.save(done, (train, behaviour))
    run.close()
    if int(train.step) == config.steps and jax.process_index() == 0:
        trained, out = policy.replace(params=jax.device_get(train.params)), Path(config.out)
        made_by = {"command": "python -m train.grpo", "config": dataclasses.asdict(config)}
        save_policy(
            out / "policy.safetensors",
            trained,
            switches=config.switches,
            made_by=json.dumps(made_by),
        )
        plot_policy_steps(trained, out / "policy.png")
        print(f"{out / 'policy.safetensors'}: the policy; policy.png beside it shows its steps")


class Sampler:
    """What happens to the prompts of a step: sampled decodes on the devices, verdicts on the hosts.

    The prompts of step n are the n-th batch of endless shuffled epochs, so a run's position in them is its step.
    """

    def __init__(self, lm: LM, task: Task, config: GrpoConfig, problems: Sequence[Any], cell: Cell):
        self.lm, self.task, self.config, self.problems = lm, task, config, problems
        self.prompts = [chat_ids(lm.tokenizer, task.prompt(problem)) for problem in problems]
        protocol = task.config
        longest = max(map(len, self.prompts))
        settings = make_decode_config(
            lm, longest, protocol.gen_length, cell.steps, None, protocol.block_length
        )
        early = {"early_exit": cell.rule.early_exit, "settled": cell.rule.settled}
        self.settings = dataclasses.replace(settings, **early)
        self.sandbox = Pool(protocol.limits)
        self.score = make_score(config, lm.config.eos_id)
        # One length for all batches, so that there is one compilation.
        self.ids, self.mask = pad_prompts(lm, self.prompts)
        order = grain.MapDataset.source(np.arange(len(problems))).shuffle(seed=config.seed).repeat()
        self.batches = order.batch(config.prompts_per_step, drop_remainder=True)
        self.key = jax.random.key(config.seed)
        rows = config.prompts_per_step * config.group_size
        if lm.mesh is not None and rows % (lm.mesh.shape["data"] * lm.mesh.shape["fsdp"]):
            parts = lm.mesh.shape["data"] * lm.mesh.shape["fsdp"]
            raise UserError(
                f"prompts_per_step x group_size is {rows}, which {parts} devices of the mesh do not divide"
            )

    def problems_of(self, step: int) -> np.ndarray:
        """Indices of the problems of each row of a step's batch, int [B G]."""
        return np.repeat(np.asarray(self.batches[step]), self.config.group_size)

    def __call__(self, policy: Policy, step: int) -> Rollout:
        """The batch of a step, sampled from a policy."""
        asked = self.problems_of(step)
        keys = row_keys(jax.random.fold_in(self.key, step), [self.prompts[i] for i in asked])
        arrays = (self.ids[asked], self.mask[asked], keys)
        if self.lm.mesh is not None:
            arrays = jax.device_put(arrays, batch_sharding(self.lm.mesh))
            policy = jax.device_put(policy, replicated(self.lm.mesh))
        flow = parse_flow(self.config.switches, policy)
        with self.lm.scope():
            return rollout(self.lm.model, self.lm.params, flow, self.settings, *arrays)

    def judge(self, step: int, tokens: jax.Array) -> np.ndarray:
        """Runs the answers that this process holds of tokens int [R, N]; a score in 0 ... 1 for each, float32."""
        first, mine = _local(self.lm.mesh, tokens)
        asked = self.problems_of(step)
        texts = decode_answers(self.lm.tokenizer, mine, self.lm.config.eos_id)
        problems = [self.problems[i] for i in asked[first : first + len(mine)]]
        codes = [
            self.task.extract(problem, text) for problem, text in zip(problems, texts, strict=True)
        ]
        jobs = (
            self.task.parts
            if self.config.reward == "share"
            else lambda *pair: [self.task.program(*pair)]
        )
        parts = [jobs(problem, code) for problem, code in zip(problems, codes, strict=True)]
        results = iter(self.sandbox.run_many([job for part in parts for job in part]))
        return np.asarray(
            [np.mean([next(results).passed for _ in part]) for part in parts], np.float32
        )

    def reward(
        self, verdicts: Future, made: Rollout, policy: Policy
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(rewards float32 [B, G, N], metrics) once a batch is judged."""
        scores = verdicts.result()
        if self.lm.mesh is not None:
            scores = multihost_utils.host_local_array_to_global_array(
                scores, self.lm.mesh, P(BATCH)
            )
        return self.score(jnp.asarray(scores), made, policy)


def make_score(
    config: GrpoConfig, eos_id: int
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """(scores [R], rollout, policy) -> (rewards [B, G, N], metrics), jitted once."""

    def score(
        scores: jax.Array, made: Rollout, policy: Policy
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        rewards = token_rewards(scores, made.progress, config.progress_weight, config.group_size)
        rewards -= (
            config.pass_weight
            * made.forward_passes.reshape(*rewards.shape[:2], 1)
            / rewards.shape[-1]
        )
        rewards -= config.delay_weight * delay(made).reshape(rewards.shape)
        return rewards, rollout_metrics(made, scores, rewards, eos_id, policy.step_of)

    return jax.jit(score)


def parse_flow(switches: str, policy: Policy | None) -> Flow:
    """The flow with these options, as in flow:SWITCHES, and this policy."""
    _, flow = parse_rule(f"flow:{switches}" if switches else "flow")
    return flow.replace(policy=policy)


def start_policy(config: GrpoConfig) -> Policy:
    """The policy before the first step: fresh, read from a file, or fitted to a fixed rule."""
    key, fit_key = jax.random.split(jax.random.key(config.seed))
    shape = {
        name: value for name, value in dataclasses.asdict(config.policy).items() if name != "init"
    }
    init = config.policy.init
    if init != "fresh" and not init.startswith("flow"):
        return load_policy(init)
    policy = init_policy(key, **shape)
    return (
        policy if init == "fresh" else fit_policy(policy, parse_rule(init)[1].fixed_step, fit_key)
    )


def read_problems(config: GrpoConfig, task: Task, lm: LM) -> list[Any]:
    """The problems to train on: of the split, and, where the configuration says so, solved at full budget.

    Which are solved is kept in a folder that names model, rule and problems, and is found out once.
    """
    data = None if config.data is None else Path(config.data)
    problems = list(task.training(data, config.problems or None))
    if config.solved_only:
        cells = make_cells(lm, task, {"mask": MaskPrediction()}, [Fraction(1)])
        if config.failed_by:
            cells += make_cells(
                lm, task, dict([parse_rule(config.failed_by)]), [parse_budget(config.budget)]
            )
        about = describe_task(task, data) | {
            "model": f"{fingerprint(lm.params)} {config.dtype}",
            "rules": [[str(cell.budget), describe_rule(cell.rule)] for cell in cells],
            "problems": config.problems,
        }
        answers = Answers(config.solved, json.loads(json.dumps(about)))
        for cell in cells:
            evaluate(lm, task, problems, [cell], answers, config.batch_size)
            given = answers.of(
                cell.label, str(cell.budget), [task.task_id(problem) for problem in problems]
            )
            wanted = cell is cells[0]
            problems = [
                problem
                for problem, answer in zip(problems, given, strict=True)
                if answer.passed == wanted
            ]
        print(f"{len(problems)} problems to train on")
    if len(problems) < config.prompts_per_step:
        raise UserError(
            f"{len(problems)} problems do not fill a batch of {config.prompts_per_step}; use more"
        )
    return problems


def _local(mesh: Any, x: jax.Array) -> tuple[int, np.ndarray]:
    """(number of the first, values) of the rows of x that this process holds."""
    if mesh is None or jax.process_count() == 1:
        return 0, np.asarray(x)
    first = min(shard.index[0].start or 0 for shard in x.addressable_shards)
    return first, np.asarray(multihost_utils.global_array_to_host_local_array(x, mesh, P(BATCH)))


if __name__ == "__main__":
    run_program(main, "python -m train.grpo CONFIG [key=value ...]")
