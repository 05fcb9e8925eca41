"""Evaluation tasks: prompts, code extraction, and the checks that judge an answer."""

from xflow_jax.tasks import microcode
from xflow_jax.tasks.base import Task, get_task
from xflow_jax.tasks.datasets import read_jsonl

__all__ = [
    "Task",
    "get_task",
    "microcode",
    "read_jsonl",
]
