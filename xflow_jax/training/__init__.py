"""Training: steps, losses, optimisers, rollouts and data."""

from xflow_jax.training.alignment import AlignmentConfig
from xflow_jax.training.alignment_program import align_program, check_lengths
from xflow_jax.training.batches import (
    BatchIterator,
    Example,
    batch_iterator,
    local_rows,
    place_batch,
    shuffled_batches,
    stack_examples,
)
from xflow_jax.training.config import TrainingConfig
from xflow_jax.training.data import MixedPairs, Responses, TaskPairs, read_lines, read_records
from xflow_jax.training.entry import (
    EntryLabels,
    Explorer,
    Teacher,
    make_entry_step,
    target_states,
    verdict_states,
)
from xflow_jax.training.gaussian import gaussian_optimizer, make_gaussian_step
from xflow_jax.training.grpo import make_policy_step
from xflow_jax.training.length_groups import LengthGroups
from xflow_jax.training.losses import RewardScale, cross_entropy
from xflow_jax.training.pretraining import make_pretrain_step
from xflow_jax.training.program import TrainProgram, check_batch
from xflow_jax.training.rollout import Rollout, delay, rollout, rollout_metrics, token_rewards
from xflow_jax.training.sft import SFTConfig, find_block_length, make_sft_step
from xflow_jax.training.sft_data import (
    BucketedPairs,
    Canvas,
    Dialogue,
    TokenizedPair,
    Turns,
    iterate_batches,
    split_pairs,
    tokenize_dialogues,
)
from xflow_jax.training.sft_program import check_canvas, sft_program
from xflow_jax.training.state import TrainState

__all__ = [
    "AlignmentConfig",
    "BatchIterator",
    "BucketedPairs",
    "Canvas",
    "Dialogue",
    "EntryLabels",
    "Example",
    "Explorer",
    "LengthGroups",
    "MixedPairs",
    "Responses",
    "RewardScale",
    "Rollout",
    "SFTConfig",
    "TaskPairs",
    "Teacher",
    "TokenizedPair",
    "TrainProgram",
    "TrainState",
    "TrainingConfig",
    "Turns",
    "align_program",
    "batch_iterator",
    "check_batch",
    "check_canvas",
    "check_lengths",
    "cross_entropy",
    "delay",
    "find_block_length",
    "iterate_batches",
    "gaussian_optimizer",
    "local_rows",
    "make_gaussian_step",
    "make_entry_step",
    "make_policy_step",
    "make_pretrain_step",
    "make_sft_step",
    "place_batch",
    "read_lines",
    "read_records",
    "rollout",
    "rollout_metrics",
    "sft_program",
    "shuffled_batches",
    "split_pairs",
    "stack_examples",
    "target_states",
    "token_rewards",
    "tokenize_dialogues",
    "verdict_states",
]
