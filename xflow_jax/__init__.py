"""Continuous-flow decoding of masked diffusion language models, in JAX.

The public names are imported when they are first used, so that `import xflow_jax` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xflow_jax.generate import Generation, generate
    from xflow_jax.lm import LM, load
    from xflow_jax.policy import Policy, load_policy, save_policy
    from xflow_jax.rules import Flow, MaskPrediction, Threshold
    from xflow_jax.sharding import make_mesh
    from xflow_jax.strict import UserError

_HOMES = {
    "load": "lm",
    "LM": "lm",
    "generate": "generate",
    "Generation": "generate",
    "Flow": "rules",
    "MaskPrediction": "rules",
    "Threshold": "rules",
    "Policy": "policy",
    "load_policy": "policy",
    "save_policy": "policy",
    "make_mesh": "sharding",
    "UserError": "strict",
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
]


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module xflow_jax.generate would put it in the place of the function of that name.
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
