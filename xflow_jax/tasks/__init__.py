"""Evaluation tasks: prompts, code extraction, and the checks that judge an answer."""

from xflow_jax.tasks import microcode
from xflow_jax.tasks.base import Task, find_task, get_task
from xflow_jax.tasks.extraction import EXTRACTIONS

__all__ = [
    "EXTRACTIONS",
    "Task",
    "find_task",
    "get_task",
    "microcode",
]
