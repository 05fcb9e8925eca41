"""Protocol of rules that change the loop around them."""

from __future__ import annotations

import sys

from xflow_jax.decoding.state import DecodeConfig

if sys.version_info >= (3, 12):
    from typing import Protocol, runtime_checkable
else:  # as in types.py
    from typing_extensions import Protocol, runtime_checkable


@runtime_checkable
class OwnLoop(Protocol):
    """A rule with steps or an end of its own."""

    def adapt(self, config: DecodeConfig) -> DecodeConfig:
        """Returns the configuration of a decode as the rule needs it."""
        ...


def adapt_loop(rule: object, config: DecodeConfig) -> DecodeConfig:
    """Adapts a decode's configuration to a rule with its own loop."""
    return rule.adapt(config) if isinstance(rule, OwnLoop) else config
