"""Batches of GRPO: sampled on the devices, judged in the sandbox, rewarded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from train.grpo_config import GrpoConfig
from xflow_jax.decoding import (
    EntryPolicy,
    Flow,
    Policy,
    make_decode_config,
    pad_prompts,
    parse_rule,
    row_keys,
)
from xflow_jax.evaluation import Cell
from xflow_jax.lm import LM
from xflow_jax.parallel import BATCH, batch_sharding, put_sharded
from xflow_jax.planning import Workload, pass_flops
from xflow_jax.sandbox import Pool
from xflow_jax.tasks import Task
from xflow_jax.tokenizer import chat_ids, decode_responses
from xflow_jax.training import (
    Rollout,
    delay,
    local_rows,
    place_batch,
    rollout,
    rollout_metrics,
    token_rewards,
)
from xflow_jax.types import Metrics

AnyPolicy: TypeAlias = Policy | EntryPolicy
ScoreFn: TypeAlias = Callable[[jax.Array, Rollout, AnyPolicy], tuple[jax.Array, Metrics]]


class Sampler:
    """Samples batches on the devices, and judges them on the hosts.

    The prompts of step n are batch n of endless shuffled epochs, so the step of a run is its
    position in the data.

    Args:
        lm: the model.
        task: the task.
        config: the configuration.
        problems: the problems to train on.
        cell: the budget, and the flow without its policy.
    """

    def __init__(
        self, lm: LM, task: Task, config: GrpoConfig, problems: Sequence[object], cell: Cell
    ):
        import grain

        assert lm.tokenizer is not None
        self.lm, self.task, self.config, self.problems = lm, task, config, problems
        self.tokenizer = lm.tokenizer
        self.prompts = [chat_ids(lm.tokenizer, task.prompt(problem)) for problem in problems]
        protocol = task.config
        longest = max(map(len, self.prompts))
        decode_config = make_decode_config(
            lm, longest, protocol.gen_length, cell.steps, None, protocol.block_length
        )
        self.decode_config = dataclasses.replace(decode_config, early_exit=cell.rule.early_exit)
        self.sandbox = Pool(protocol.limits)
        self.score = make_score(config, lm.config.eos_id)
        # One padded length for all batches, so that there is one compilation.
        self.ids, self.mask = pad_prompts(lm, self.prompts)
        self.work = Workload(
            "rollout",
            config.prompts_per_step * config.group_size,
            self.ids.shape[1],
            protocol.gen_length,
            cell.steps,
            block_length=protocol.block_length,
        )
        order = grain.MapDataset.source(np.arange(len(problems))).shuffle(seed=config.seed).repeat()
        self.batches = order.batch(config.prompts_per_step, drop_remainder=True)
        self.key = jax.random.key(config.seed)

    def row_problems(self, step: int) -> np.ndarray:
        """Returns the index of each row's problem, int [B G]."""
        return np.repeat(np.asarray(self.batches[step]), self.config.group_size)

    def __call__(self, policy: AnyPolicy, step: int) -> Rollout:
        """Samples the batch of a step.

        Args:
            policy: the policy, replicated over the mesh of the model if it has one.
            step: number of the step.

        Returns:
            The decodes.
        """
        rows = self.row_problems(step)
        keys = row_keys(jax.random.fold_in(self.key, step), [self.prompts[i] for i in rows])
        arrays = (self.ids[rows], self.mask[rows], keys, self._imitated())
        if self.lm.mesh is not None:
            arrays = put_sharded(arrays, batch_sharding(self.lm.mesh))
        if isinstance(policy, EntryPolicy):
            policy = dataclasses.replace(policy, imitate=arrays[3])
        flow = parse_flow(self.config.switches, policy, self.task)
        with self.lm.scope():
            return rollout(self.lm.model, self.lm.params, flow, self.decode_config, *arrays[:3])

    def _imitated(self) -> jax.Array:
        """Returns the confidence that each row imitates.

        It is below 1 in the last row of each group alone.
        """
        size = self.config.group_size
        last = jnp.arange(self.config.prompts_per_step * size) % size == size - 1
        return jnp.where(last, self.config.imitate, 1.0)[:, None]

    def count_work(self) -> tuple[int, float]:
        """Counts response tokens of a batch, and FLOPs of a pass."""
        return self.work.batch * self.work.gen_length, pass_flops(self.lm.config, self.work)

    def judge(self, step: int, tokens: jax.Array) -> np.ndarray:
        """Runs the answers of this process in the sandbox.

        It runs in a thread, so it uses no collective operation between processes.

        Args:
            step: number of the step.
            tokens: responses to its batch, int [R, N].

        Returns:
            A score in [0, 1] for each row of this process, float32.
        """
        rows = np.arange(len(tokens))
        if self.lm.mesh is not None and jax.process_count() > 1:
            rows = local_rows(batch_sharding(self.lm.mesh), len(tokens))
            tokens = multihost_utils.global_array_to_host_local_array(
                tokens, self.lm.mesh, P(BATCH)
            )
        end_ids = self.task.config.end_ids(self.lm.config.stop_ids)
        texts = decode_responses(self.tokenizer, np.asarray(tokens), end_ids)
        problems = [self.problems[i] for i in self.row_problems(step)[rows]]
        jobs = [self._jobs(*pair) for pair in zip(problems, texts, strict=True)]
        results = iter(self.sandbox.run_many([job for part in jobs for job in part]))
        scores = [np.mean([next(results).passed for _ in part]) for part in jobs]
        return np.asarray(scores, np.float32)

    def _jobs(self, problem: object, text: str) -> list[tuple[str, str]]:
        """Returns the (program, checks) pairs that judge an answer."""
        if self.config.reward == "share":
            return self.task.parts(problem, self.task.extract(problem, text))
        return [self.task.job(problem, text)]

    def reward(
        self, scores: Future[np.ndarray], rollouts: Rollout, policy: AnyPolicy
    ) -> tuple[jax.Array, Metrics]:
        """Waits for the scores of a batch.

        Args:
            scores: the result of `judge`.
            rollouts: the batch.
            policy: supplies the ranges of the policy.

        Returns:
            Rewards float32 [B, G, N], and metrics.
        """
        own = scores.result()
        if self.lm.mesh is None:
            return self.score(jnp.asarray(own), rollouts, policy)
        rows = self.config.prompts_per_step * self.config.group_size
        placed = place_batch({"scores": own}, batch_sharding(self.lm.mesh), rows)
        return self.score(placed["scores"], rollouts, policy)


def make_score(config: GrpoConfig, eos_id: int) -> ScoreFn:
    """Builds the function of rewards and metrics, jitted.

    Args:
        config: the configuration.
        eos_id: id of EOS.

    Returns:
        (scores [R], rollouts, policy) -> (rewards [B, G, N], metrics).
    """

    def score(scores: jax.Array, rollouts: Rollout, policy: AnyPolicy) -> tuple[jax.Array, Metrics]:
        steps = rollouts.y.shape[0]
        # Not 1 - passes / steps: a rounded quotient above 1 would have no root.
        speed = (steps - rollouts.forward_passes) / steps
        # Zero where the answer is wrong: with a sum, the fastest wrong answer is the best policy.
        earned = scores * speed**config.speed_power if config.speed_power else scores
        rewards = token_rewards(
            earned, rollouts.progress, config.progress_weight, config.group_size
        )
        passes = rollouts.forward_passes.reshape(*rewards.shape[:2], 1)
        rewards -= config.pass_weight * passes / rewards.shape[-1]
        rewards -= config.delay_weight * delay(rollouts).reshape(rewards.shape)
        return rewards, rollout_metrics(rollouts, scores, rewards, eos_id, policy.step_of)

    return jax.jit(score)


def parse_flow(switches: str, policy: AnyPolicy | None, task: Task) -> Flow:
    """Parses the options of a flow.

    Args:
        switches: options as in flow:SWITCHES.
        policy: the policy of the flow, if any.
        task: the task, whose options of rules come after the switches.

    Returns:
        The flow.

    Raises:
        UserError: for an unknown option or a wrong value.
    """
    text = f"flow:{switches}" if switches else "flow"
    _, flow = parse_rule(text, task.config.rule_options)
    assert isinstance(flow, Flow)
    return dataclasses.replace(flow, policy=policy)
