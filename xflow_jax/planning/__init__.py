"""Memory and time of a program on a TPU slice, from the TPU compiler."""

from xflow_jax.planning.cost_model import PROGRAMS
from xflow_jax.planning.hardware import GPUS, parse_device, parse_topology
from xflow_jax.planning.planner import plan_rows
from xflow_jax.planning.report import markdown_page, plan_table, row_sentence

__all__ = [
    "GPUS",
    "PROGRAMS",
    "markdown_page",
    "parse_device",
    "parse_topology",
    "plan_rows",
    "plan_table",
    "row_sentence",
]
