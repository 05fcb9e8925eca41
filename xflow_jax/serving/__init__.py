"""Server of a model: continuous batching, an OpenAI-compatible API, and a page.

All but the page needs the extra `serve`, so it is imported on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from xflow_jax.serving.page import (
    TracedDecode,
    current_tokens,
    live_page,
    token_texts,
    write_trajectory_page,
)

if TYPE_CHECKING:
    from xflow_jax.serving.api import ApiOptions, make_app
    from xflow_jax.serving.batching import run_continuous, run_static
    from xflow_jax.serving.engine import Engine, EngineOptions
    from xflow_jax.serving.lanes import Lengths, make_lengths
    from xflow_jax.serving.load import Load, arrival_times, make_prompts, run_load, summarize
    from xflow_jax.serving.server import Server, ServerOptions

_MODULES = {
    "ApiOptions": "api",
    "Engine": "engine",
    "EngineOptions": "engine",
    "Lengths": "lanes",
    "Load": "load",
    "Server": "server",
    "ServerOptions": "server",
    "arrival_times": "load",
    "make_app": "api",
    "make_lengths": "lanes",
    "make_prompts": "load",
    "run_continuous": "batching",
    "run_load": "load",
    "run_static": "batching",
    "summarize": "load",
}
__all__ = [
    "ApiOptions",
    "Engine",
    "EngineOptions",
    "Lengths",
    "Load",
    "Server",
    "ServerOptions",
    "TracedDecode",
    "arrival_times",
    "current_tokens",
    "live_page",
    "make_app",
    "make_lengths",
    "make_prompts",
    "run_continuous",
    "run_load",
    "run_static",
    "summarize",
    "token_texts",
    "write_trajectory_page",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
