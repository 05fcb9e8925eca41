"""The task microcode: English requests for list functions."""

from xflow_jax.tasks.microcode.language import Problem, compositions, parse, problems
from xflow_jax.tasks.microcode.solutions import USUAL_STYLE, WIDE_STYLE, sample_answer
from xflow_jax.tasks.microcode.task import TASK, checks, extract, make_task
from xflow_jax.tasks.microcode.training_pairs import training_pair
from xflow_jax.tasks.microcode.words import WORD, split_words

__all__ = [
    "Problem",
    "TASK",
    "USUAL_STYLE",
    "WIDE_STYLE",
    "WORD",
    "checks",
    "compositions",
    "extract",
    "make_task",
    "parse",
    "problems",
    "sample_answer",
    "split_words",
    "training_pair",
]
