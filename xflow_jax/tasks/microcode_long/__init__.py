"""The task microcode-long: English requests for two dependent functions."""

from xflow_jax.tasks.microcode_long.language import Problem
from xflow_jax.tasks.microcode_long.parsing import parse
from xflow_jax.tasks.microcode_long.requests import problems
from xflow_jax.tasks.microcode_long.solutions import sample_answer
from xflow_jax.tasks.microcode_long.task import TASK, make_task, training_pair

__all__ = [
    "Problem",
    "TASK",
    "make_task",
    "parse",
    "problems",
    "sample_answer",
    "training_pair",
]
