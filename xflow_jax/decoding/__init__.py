"""Decoding as a flow. Start with decode.py: it is the paper."""

from xflow_jax.decoding.belief import TOP, Belief, BeliefOptions, compute_belief
from xflow_jax.decoding.blocks import (
    block_layout,
    branch_shares,
    make_schedule,
    nearest_multiples,
    pass_positions,
    resolve_steps,
)
from xflow_jax.decoding.cache_options import CacheOptions
from xflow_jax.decoding.cached_forward import make_forward
from xflow_jax.decoding.canvas import embed
from xflow_jax.decoding.decode import commit_tokens, decode, move_positions
from xflow_jax.decoding.entry_policy import (
    EntryPolicy,
    confidence_log_odds,
    init_entry_policy,
)
from xflow_jax.decoding.forward import ExactCache
from xflow_jax.decoding.gaussian import (
    GaussianModel,
    add_noise,
    expected_embedding,
    sample_gaussian,
    token_embeddings,
)
from xflow_jax.decoding.generate import (
    PROMPT_MULTIPLE,
    Generation,
    decode_batch,
    generate,
    make_decode_config,
    pad_prompts,
    require_finite,
    row_keys,
)
from xflow_jax.decoding.noise_schedules import NOISE_SCHEDULES
from xflow_jax.decoding.policy import Policy, features, fit_policy, init_policy
from xflow_jax.decoding.policy_io import (
    check_entry_ranges,
    check_policy_ranges,
    load_policy,
    save_policy,
)
from xflow_jax.decoding.rules.base import (
    Action,
    Rule,
    TokenConstraints,
    chance_before,
    order_score,
    select_highest,
    static_field,
)
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.external import source_hash
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.rules.numbers import row_numbers, takes_arrays, with_numbers
from xflow_jax.decoding.rules.own_loop import adapt_loop
from xflow_jax.decoding.rules.parsing import (
    parse_budget,
    parse_budgets,
    parse_rule,
    parse_rule_ranges,
    parse_rules,
)
from xflow_jax.decoding.slot_rows import Lane, Rows, make_row
from xflow_jax.decoding.slots import Slots, Snapshot, admit, init_slots, run_passes
from xflow_jax.decoding.state import (
    SETTLED,
    DecodeConfig,
    DecodeState,
    Step,
    Trace,
    is_stop,
    read_out,
)
from xflow_jax.decoding.stream import StreamState, slot_config, stream

__all__ = [
    "Action",
    "Belief",
    "BeliefOptions",
    "CacheOptions",
    "DecodeConfig",
    "DecodeState",
    "EntryPolicy",
    "ExactCache",
    "Flow",
    "GaussianModel",
    "Generation",
    "Lane",
    "MaskPrediction",
    "NOISE_SCHEDULES",
    "PROMPT_MULTIPLE",
    "Policy",
    "Rows",
    "Rule",
    "SETTLED",
    "Slots",
    "Snapshot",
    "Step",
    "StreamState",
    "TOP",
    "Threshold",
    "TokenConstraints",
    "Trace",
    "adapt_loop",
    "add_noise",
    "admit",
    "block_layout",
    "branch_shares",
    "chance_before",
    "check_entry_ranges",
    "check_policy_ranges",
    "commit_tokens",
    "compute_belief",
    "confidence_log_odds",
    "decode",
    "decode_batch",
    "embed",
    "expected_embedding",
    "features",
    "fit_policy",
    "generate",
    "init_entry_policy",
    "init_policy",
    "is_stop",
    "init_slots",
    "load_policy",
    "make_decode_config",
    "make_forward",
    "make_row",
    "make_schedule",
    "move_positions",
    "nearest_multiples",
    "order_score",
    "pad_prompts",
    "parse_budget",
    "parse_budgets",
    "parse_rule",
    "parse_rule_ranges",
    "parse_rules",
    "pass_positions",
    "read_out",
    "require_finite",
    "resolve_steps",
    "row_keys",
    "row_numbers",
    "run_passes",
    "sample_gaussian",
    "save_policy",
    "select_highest",
    "slot_config",
    "source_hash",
    "static_field",
    "stream",
    "takes_arrays",
    "token_embeddings",
    "with_numbers",
]
