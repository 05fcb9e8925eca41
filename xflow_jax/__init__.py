"""Continuous-flow decoding of masked diffusion language models, in JAX.

The public names are imported on first use (PEP 562), so `import xflow_jax` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xflow_jax.decoding import (
        Flow,
        Generation,
        MaskPrediction,
        Policy,
        Threshold,
        generate,
        load_policy,
        save_policy,
        stream,
    )
    from xflow_jax.errors import UserError
    from xflow_jax.lm import LM, load
    from xflow_jax.parallel import make_mesh

_MODULES = {
    "load": "lm",
    "LM": "lm",
    "generate": "decoding",
    "Generation": "decoding",
    "Flow": "decoding",
    "MaskPrediction": "decoding",
    "Threshold": "decoding",
    "Policy": "decoding",
    "load_policy": "decoding",
    "save_policy": "decoding",
    "stream": "decoding",
    "make_mesh": "parallel",
    "UserError": "errors",
}
__all__ = [
    "LM",
    "Flow",
    "Generation",
    "MaskPrediction",
    "Policy",
    "Threshold",
    "UserError",
    "generate",
    "load",
    "load_policy",
    "make_mesh",
    "save_policy",
    "stream",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
