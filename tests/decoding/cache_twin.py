"""Decoding of one row on stale keys and values, in plain NumPy: the definition of the caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from xflow_jax.lm import LM


@dataclasses.dataclass(frozen=True)
class Setting:
    """Lengths, cache and rule of a decode. `rule` is "mask", "threshold" or "flow"."""

    cache: str
    refresh: int = 0
    window: int = 0
    prompt_every: int = 1
    rule: str = "mask"
    tau: float = 0.4
    guidance: float = 0.0
    blocks: int = 3
    size: int = 4
    steps: int = 4  # of a block


@dataclasses.dataclass
class Step:
    """Record of a pass: its block, and the columns of the block after it."""

    block: int
    tokens: np.ndarray
    confidence: np.ndarray
    t: np.ndarray


class Network:
    """The model for one row of T columns, with the last keys and values of each column."""

    def __init__(self, lm: LM, columns: int) -> None:
        self.config: Any = lm.config
        self.p: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params)
        shape = (self.config.n_layers, self.config.n_heads, columns, self.config.head_dim)
        self.keys, self.values = np.full(shape, np.nan), np.full(shape, np.nan)

    def logits(self, x: np.ndarray, columns: range) -> np.ndarray:
        """Runs some columns [n, E] on the kept keys and values, and keeps those of its own."""
        at = np.asarray(columns)
        for layer in range(self.config.n_layers):
            part = jax.tree.map(lambda leaf, i=layer: leaf[i], self.p["blocks"])
            h = self.norm(x, part["attn_norm"])
            q, k, v = (self.heads(h @ part[f"{name}_proj"]["kernel"]) for name in "qkv")
            self.keys[layer][:, at], self.values[layer][:, at] = self.rotate(k, at), v
            scores = np.einsum("hqd,hkd->hqk", self.rotate(q, at), self.keys[layer])
            weights = np.exp(scores / self.config.head_dim**0.5)
            weights /= weights.sum(-1, keepdims=True)
            h = np.einsum("hqk,hkd->qhd", weights, self.values[layer]).reshape(len(x), -1)
            x = x + h @ part["attn_out"]["kernel"]
            h = self.norm(x, part["ff_norm"])
            gate = h @ part["ff_proj"]["kernel"]
            up = h @ part["up_proj"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ part["ff_out"]["kernel"]
        return self.norm(x, self.p["ln_f"]) @ self.p["ff_out"]["kernel"]

    def norm(self, x: np.ndarray, part: Any) -> np.ndarray:
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config.rms_norm_eps) * part["scale"]

    def heads(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), self.config.n_heads, -1).transpose(1, 0, 2)

    def rotate(self, x: np.ndarray, at: np.ndarray) -> np.ndarray:
        half = self.config.head_dim // 2
        angle = np.outer(at, self.config.rope_theta ** (-np.arange(half) / half))
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def columns_of(setting: Setting, prompt: int, block: int, step: int) -> range:
    """Returns the columns that a pass runs."""
    total = prompt + setting.blocks * setting.size
    start = prompt + block * setting.size
    if setting.cache == "none":
        return range(total)
    if step == 0:
        return range(0 if block % setting.prompt_every == 0 else prompt, total)
    if setting.refresh and step % setting.refresh == 0:
        return range(total)
    if setting.cache == "prompt":
        return range(prompt, total)
    if setting.cache == "prefix":
        return range(start, total)
    end = start + setting.size
    return range(max(start - setting.window, 0), min(end + setting.window, total))


def decode(lm: LM, prompt: list[int], setting: Setting) -> tuple[np.ndarray, list[Step]]:
    """Decodes one prompt. Returns its tokens, and a record of each pass."""
    config: Any = lm.config
    table = np.asarray(lm.params["wte"]["embedding"], np.float64)
    m, length = table[config.mask_id], setting.blocks * setting.size
    x, t = np.tile(m, (length, 1)), np.zeros(length)
    tokens = np.full(length, config.mask_id)
    inputs = [table[prompt]]
    if setting.guidance:
        inputs.append(np.tile(m, (len(prompt), 1)))
    networks = [Network(lm, len(prompt) + length) for _ in inputs]
    passes = []
    for block in range(setting.blocks):
        part = slice(block * setting.size, (block + 1) * setting.size)
        for step in range(setting.steps):
            if setting.rule == "threshold" and (t[part] == 1).all():
                break
            columns = columns_of(setting, len(prompt), block, step)
            at = slice(len(prompt) + part.start - columns.start, None)
            z = [
                network.logits(np.concatenate([p, x])[np.asarray(columns)], columns)[at]
                for network, p in zip(networks, inputs, strict=True)
            ]
            guided = z[0] if len(z) == 1 else z[1] + (setting.guidance + 1) * (z[0] - z[1])
            c, v = belief(config, guided[: setting.size], setting.rule == "flow")
            parts = x[part], t[part], tokens[part]
            move(setting, step, config.mask_id, m, table[v], c, v, *parts)
            passes.append(Step(block, v, c, t[part].copy()))
        x[part] = np.where((t[part] < 1)[:, None], table[tokens[part]], x[part])
        t[part] = np.where(t[part] < 1, 1, t[part])
    return tokens, passes


def belief(config: Any, z: np.ndarray, suppress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns confidence and prediction of each position."""
    z = z.copy()
    if suppress:
        z[:, config.mask_id], z[:, config.vocab_size :] = -np.inf, -np.inf
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p.max(-1), p.argmax(-1)


def move(
    setting: Setting,
    step: int,
    mask_id: int,
    m: np.ndarray,
    x_pred: np.ndarray,
    c: np.ndarray,
    v: np.ndarray,
    x: np.ndarray,
    t: np.ndarray,
    tokens: np.ndarray,
) -> None:
    """Changes x, t and tokens of a block by the rule, in place."""
    tokens[t < 1] = v[t < 1]
    if setting.rule == "flow":
        before, a = t.copy(), np.clip(c**2, 1 / 256, 1)
        x += np.where(before < 1, a, 0)[:, None] * (x_pred - x)
        t += a * (1 - t)
        back = c - before < -0.1
        x[back] = (c[:, None] * x_pred + (1 - c[:, None]) * m)[back]
        t[back], tokens[back] = c[back], v[back]
        open_ = np.flatnonzero(t < 0.99)
        chosen = open_[np.argsort(-c[open_], kind="stable")[:1]]
    else:
        order = np.argsort(np.where(t < 1, -c, np.inf), kind="stable")[: (t < 1).sum()]
        quota = setting.size // setting.steps + (step < setting.size % setting.steps)
        if setting.rule == "threshold":
            quota = max(1, int((c[order] >= setting.tau).sum()))
        chosen = order[:quota]
        chosen = chosen[v[chosen] != mask_id]
    x[chosen], t[chosen], tokens[chosen] = x_pred[chosen], 1, v[chosen]
