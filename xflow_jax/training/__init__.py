"""Training: steps, losses, optimisers, rollouts and data."""

from xflow_jax.training.alignment import AlignmentConfig
from xflow_jax.training.alignment_program import (
    AlignProgram,
    align_program,
    check_batch,
    check_lengths,
)
from xflow_jax.training.data import (
    BatchIterator,
    Example,
    MixedPairs,
    Responses,
    TaskPairs,
    batch_iterator,
    local_rows,
    place_batch,
    read_lines,
    read_records,
    shuffled_batches,
    stack_examples,
)
from xflow_jax.training.grpo import make_policy_step
from xflow_jax.training.losses import RewardScale, cross_entropy
from xflow_jax.training.pretraining import make_pretrain_step
from xflow_jax.training.rollout import Rollout, delay, rollout, rollout_metrics, token_rewards
from xflow_jax.training.state import TrainState

__all__ = [
    "AlignProgram",
    "AlignmentConfig",
    "BatchIterator",
    "Example",
    "MixedPairs",
    "Responses",
    "RewardScale",
    "Rollout",
    "TaskPairs",
    "TrainState",
    "align_program",
    "batch_iterator",
    "check_batch",
    "check_lengths",
    "cross_entropy",
    "delay",
    "local_rows",
    "make_policy_step",
    "make_pretrain_step",
    "place_batch",
    "read_lines",
    "read_records",
    "rollout",
    "rollout_metrics",
    "shuffled_batches",
    "stack_examples",
    "token_rewards",
]
