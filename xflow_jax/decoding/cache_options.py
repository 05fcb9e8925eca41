"""Cache of a decode as a user gives it, with its checks."""

from __future__ import annotations

import dataclasses

import numpy as np

from xflow_jax.decoding.blocks import Count, require_count
from xflow_jax.decoding.state import CACHES, DecodeConfig
from xflow_jax.errors import UserError, require
from xflow_jax.types import ModelConfig

APPROXIMATE = ("prompt", "prefix", "dual")


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """Keys and values that a decode keeps (cached_forward.py).

    Attributes:
        cache: one of CACHES, or None for the default: "exact" if the model has it, "prompt" with a
            `refresh` above 1, otherwise "none". True and False mean "exact" and "none".
        refresh: renew an approximate cache every `refresh` steps of a block. 0: only in its first.
        window: positions on each side of the block that a pass with the dual cache reads as well.
        prompt_every: read the prompt only in the first step of every `prompt_every`-th block.
    """

    cache: str | bool | None = None
    refresh: Count = 0
    window: Count = 0
    prompt_every: Count = 1

    def resolve(self, model: ModelConfig) -> str:
        """Checks names and numbers, and returns one of CACHES.

        Lengths and steps have no part in these checks.

        Args:
            model: configuration of the model.

        Raises:
            UserError: if a name or number is wrong, or the model does not have such a cache.
        """
        for name in ("refresh", "window"):
            count = getattr(self, name)
            right = isinstance(count, int | np.integer) and not isinstance(count, bool)
            require(
                right and count >= 0, f"{name} must be a whole number of at least 0, not {count}"
            )
        require_count("prompt_every", self.prompt_every)
        require(self.prompt_every is not None, "prompt_every must be a whole number, not None")
        cache = self._name(model)
        if model.is_block_causal:
            require(
                not self.refresh,
                f"{model.family} is block-causal, so its cache is exact and never refreshed. "
                "Leave refresh out.",
            )
            require(
                cache not in APPROXIMATE,
                f"{model.family} is block-causal, so its cache is exact. "
                f"Use cache exact or none, not {cache}.",
            )
        elif cache == "exact":
            raise UserError(
                f"{model.family} attends to later blocks, so it has no exact cache. "
                "Leave cache out."
            )
        for name, count, least, caches in (
            ("refresh", self.refresh, 2, APPROXIMATE),
            ("window", self.window, 1, ("dual",)),
            ("prompt_every", self.prompt_every, 2, APPROXIMATE),
        ):
            needed = " or ".join(filter(None, (", ".join(caches[:-1]), caches[-1])))
            require(
                count < least or cache in caches,
                f"{name} {count} needs cache {needed}, not {cache}",
            )
        return cache

    def _name(self, model: ModelConfig) -> str:
        """Returns one of CACHES."""
        if isinstance(self.cache, bool):
            return "exact" if self.cache else "none"
        if self.cache is None:
            if model.is_block_causal:
                return "exact"
            return "prompt" if self.refresh > 1 else "none"
        require(
            self.cache in CACHES,
            f"there is no cache {self.cache!r}. "
            f"There are {', '.join(CACHES[:-1])} and {CACHES[-1]}.",
        )
        return self.cache

    def describe(self, model: ModelConfig) -> dict[str, int | str]:
        """Returns what changes the answers of a run, in JSON's types.

        Args:
            model: configuration of the model.
        """
        cache = self.resolve(model)
        if cache not in APPROXIMATE:
            return {}
        about: dict[str, int | str] = {"refresh": int(self.refresh)}
        about |= {} if cache == "prompt" else {"cache": cache}
        about |= {"window": int(self.window)} if self.window else {}
        return about | ({"prompt_every": int(self.prompt_every)} if self.prompt_every > 1 else {})

    def within(self, config: DecodeConfig) -> CacheOptions:
        """Returns the options with numbers that a decode is long enough for.

        Args:
            config: lengths and steps.
        """
        refresh, window = min(self.refresh, config.steps), min(self.window, config.gen_length)
        return dataclasses.replace(self, refresh=refresh, window=window)

    def apply(self, model: ModelConfig, config: DecodeConfig) -> DecodeConfig:
        """Returns a decode's configuration with the cache.

        Args:
            model: configuration of the model.
            config: lengths and steps.

        Raises:
            UserError: as `resolve`, or if a number does not fit the lengths.
        """
        cache = self.resolve(model)
        require(
            self.refresh <= max(config.steps, 1),
            f"refresh {self.refresh} exceeds the {config.steps} steps of a block, so it would "
            f"never come. Use at most {config.steps}, or 0 for the first step alone.",
        )
        require(
            self.window <= config.gen_length,
            f"window {self.window} exceeds the response of {config.gen_length} tokens. "
            "Use a smaller one.",
        )
        return dataclasses.replace(
            config,
            cache=cache,
            refresh=int(self.refresh) if cache in APPROXIMATE else 0,
            window=int(self.window),
            prompt_every=int(self.prompt_every),
        )
