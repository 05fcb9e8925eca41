"""Decoding as a flow. Start with decode.py: it is the paper."""

from xflow_jax.decoding.blocks import block_layout, budget_steps, count_blocks, make_schedule
from xflow_jax.decoding.decode import decode
from xflow_jax.decoding.forward import CachedForward
from xflow_jax.decoding.generate import (
    PROMPT_MULTIPLE,
    Generation,
    check_refresh,
    decode_batch,
    generate,
    make_decode_config,
    pad_prompts,
    row_keys,
)
from xflow_jax.decoding.policy import Policy, features, fit_policy, init_policy
from xflow_jax.decoding.policy_io import load_policy, save_policy
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.rules.parsing import parse_budget, parse_budgets, parse_rule, parse_rules
from xflow_jax.decoding.state import SETTLED, DecodeConfig, read_out

__all__ = [
    "CachedForward",
    "DecodeConfig",
    "Flow",
    "Generation",
    "MaskPrediction",
    "PROMPT_MULTIPLE",
    "Policy",
    "Rule",
    "SETTLED",
    "Threshold",
    "block_layout",
    "budget_steps",
    "check_refresh",
    "count_blocks",
    "decode",
    "decode_batch",
    "features",
    "fit_policy",
    "generate",
    "init_policy",
    "load_policy",
    "make_decode_config",
    "make_schedule",
    "pad_prompts",
    "parse_budget",
    "parse_budgets",
    "parse_rule",
    "parse_rules",
    "read_out",
    "row_keys",
    "save_policy",
]
