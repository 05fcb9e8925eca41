"""Memory and speed of a program, compiled or by arithmetic."""

from xflow_jax.planning.cost_model import PROGRAMS, PlanRow, Workload, pass_flops
from xflow_jax.planning.hardware import DEVICES, find_chip, parse_device, parse_topology
from xflow_jax.planning.planner import PlanRequest, plan_rows
from xflow_jax.planning.report import markdown_page, plan_table, row_sentence

__all__ = [
    "DEVICES",
    "PROGRAMS",
    "PlanRequest",
    "PlanRow",
    "Workload",
    "find_chip",
    "markdown_page",
    "parse_device",
    "parse_topology",
    "pass_flops",
    "plan_rows",
    "plan_table",
    "row_sentence",
]
