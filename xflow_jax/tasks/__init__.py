"""Evaluation tasks: prompts, code extraction, and the checks that judge an answer."""

from xflow_jax.tasks import microcode
from xflow_jax.tasks.base import NAMES, Task, find_problem, find_tasks, get_task
from xflow_jax.tasks.extraction import EXTRACTIONS

__all__ = [
    "EXTRACTIONS",
    "NAMES",
    "Task",
    "find_problem",
    "find_tasks",
    "get_task",
    "microcode",
]
