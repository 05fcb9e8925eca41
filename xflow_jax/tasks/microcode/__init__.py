"""microcode: English requests for list functions, and the right answers to them."""

from xflow_jax.tasks.microcode.language import Problem, compositions, parse, problems
from xflow_jax.tasks.microcode.solutions import USUAL, WIDE, answer
from xflow_jax.tasks.microcode.task import TASK, checks, extract
from xflow_jax.tasks.microcode.training_pairs import training_pair

__all__ = [
    "Problem",
    "TASK",
    "USUAL",
    "WIDE",
    "answer",
    "checks",
    "compositions",
    "extract",
    "parse",
    "problems",
    "training_pair",
]
