"""Metrics in Prometheus's format, and the places that name them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from xflow_jax.serving.metrics import Metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "configs" / "grafana" / "xflow_serve.json"
SUFFIX = re.compile(r"_(bucket|sum|count)$")


def exported() -> dict[str, set[str]]:
    """Returns the names of all samples that a server can export, with their labels."""
    metrics = Metrics()
    metrics.set_load(1, 2)
    metrics.count_answer("stop", 3, 4, 16)
    metrics.count_failure("queue_full")
    metrics.count_row(5, 1)
    metrics.count_call(0.1, 1)
    lines = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    names: dict[str, set[str]] = {}
    for line in lines:
        name, labels = re.match(r"([\w:]+)(\{.*\})?", line).groups()
        names.setdefault(name, set()).update(re.findall(r"(\w+)=", labels or ""))
    return {name: labels for name, labels in names.items() if not name.endswith("_created")}


def queries() -> list[str]:
    """Returns all queries of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return variables + [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]


def test_the_dashboard_asks_for_what_the_server_exports():
    known = exported()
    for query in queries():
        names = re.findall(r"xflow:\w+", query)
        assert names
        for name in names:
            assert name in known, query
        by = re.search(r"sum by \(([^)]*)\)", query)
        labels = {label.strip() for label in by.group(1).split(",")} if by else set()
        assert labels <= known[names[0]], query


def test_the_dashboard_has_every_metric():
    asked = {SUFFIX.sub("", name) for q in queries() for name in re.findall(r"xflow:\w+", q)}
    assert {SUFFIX.sub("", name) for name in exported()} == asked


def test_the_guide_lists_every_metric():
    text = (ROOT / "docs" / "guides" / "serve.md").read_text()
    table = text[text.index("| metric `xflow:` |") :].split("\n\n")[0]
    listed = set(re.findall(r"`(\w+)(?:\{\w+\})?`", table))
    assert {SUFFIX.sub("", n).removeprefix("xflow:") for n in exported()} == listed


def test_figures():
    metrics = Metrics()
    metrics.count_row(8, 3)
    metrics.count_answer("length", 5, 16, 32)
    text = metrics.text().decode()
    for line in (
        "xflow:tokens_per_forward 2.0",
        "xflow:revised_tokens_total 3.0",
        "xflow:prompt_tokens_total 5.0",
        "xflow:canvas_positions_total 32.0",
        'xflow:request_success_total{finished_reason="length"} 1.0',
    ):
        assert line in text
    assert metrics.mean_decode_seconds() == 1.0
