"""Evaluation of rules on tasks: answers, statistics, tables and plots."""

from xflow_jax.evaluation.answers import Answer, Answers, Row, shard_folder
from xflow_jax.evaluation.fingerprint import (
    describe_inputs,
    describe_rule,
    describe_task,
    fingerprint,
    hash_file,
)
from xflow_jax.evaluation.likelihood import log_likelihoods, read_pairs
from xflow_jax.evaluation.outside_answers import read_answers, score_answers
from xflow_jax.evaluation.paper_tables import (
    ablation_table,
    ablations,
    aup_table,
    budget_table,
    mcnemar_table,
)
from xflow_jax.evaluation.plots import plot_alignment, plot_policy_steps
from xflow_jax.evaluation.runner import Cell, evaluate, make_cells, open_answers
from xflow_jax.evaluation.tables import rows_to_text, table_legend, write_report
from xflow_jax.evaluation.verdicts import judge_prompts, verdict_sentence

__all__ = [
    "Answer",
    "Answers",
    "Cell",
    "Row",
    "ablation_table",
    "ablations",
    "aup_table",
    "budget_table",
    "describe_inputs",
    "describe_rule",
    "describe_task",
    "evaluate",
    "fingerprint",
    "hash_file",
    "judge_prompts",
    "log_likelihoods",
    "make_cells",
    "mcnemar_table",
    "open_answers",
    "plot_alignment",
    "plot_policy_steps",
    "read_answers",
    "read_pairs",
    "rows_to_text",
    "score_answers",
    "shard_folder",
    "table_legend",
    "verdict_sentence",
    "write_report",
]
