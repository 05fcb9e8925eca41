"""The same decode in PyTorch: a plain model of its own layers, equal weights, and the official schedule.

For `xflow bench --against torch`, which needs the extra [bench]. torch is imported inside the functions only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.errors import UserError, require
from xflow_jax.models import LLaDAConfig


def torch_decoder(
    config: Any, params: Any, dtype: str
) -> Callable[[np.ndarray, int, int], np.ndarray]:
    """decode(prompt int [B, P], response length, steps) -> tokens int [B, N]: mask prediction as LLaDA's code does it.

    At each step a forward pass of all positions, the softmax of all logits, and the surest masked tokens, as many as
    the schedule says, are written. UserError without PyTorch, and for anything but a LLaDA without biases.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            'PyTorch is missing; it comes with the extra [bench]: pip install "xflow-jax[bench]"'
        ) from None
    require(
        isinstance(config, LLaDAConfig)
        and not config.include_bias
        and not config.qkv_bias
        and not config.weight_tying,
        "the comparison with PyTorch is for LLaDA without biases and with a head of its own",
    )
    model = _model(torch, config, params, getattr(torch, dtype))

    @torch.inference_mode()
    def decode(prompt: np.ndarray, length: int, steps: int) -> np.ndarray:
        b = prompt.shape[0]
        blank = torch.full((b, length), config.mask_id)
        x = torch.cat([torch.from_numpy(np.asarray(prompt, np.int64)), blank], dim=1)
        for step in range(steps):
            quota = length // steps + (step < length % steps)
            logits = model(x)
            best = logits.argmax(dim=-1)
            confidence = torch.softmax(logits.float(), dim=-1).gather(-1, best[..., None])[..., 0]
            masked = x == config.mask_id
            confidence = torch.where(masked, confidence, -torch.inf)
            chosen = torch.zeros_like(masked).scatter_(
                1, confidence.topk(quota, dim=1).indices, True
            )
            x = torch.where(chosen & masked, best, x)
        return x[:, prompt.shape[1] :].numpy()

    return decode


def _model(torch: Any, config: LLaDAConfig, params: Any, dtype: Any) -> Any:
    """The module, with our weights: kernels are [in, out] here and [out, in] there."""
    nn, functional = torch.nn, torch.nn.functional
    c = config

    def weight(x: Any) -> Any:
        return torch.from_numpy(np.array(jnp.asarray(x, jnp.float32))).to(dtype)

    def linear(kernel: Any) -> Any:
        layer = nn.Linear(*kernel.shape, bias=False, dtype=dtype, device="meta")
        layer.weight = nn.Parameter(weight(kernel).T.contiguous(), requires_grad=False)
        return layer

    def norm(scale: Any) -> Any:
        layer = nn.RMSNorm(scale.shape[0], eps=c.rms_norm_eps, dtype=dtype)
        layer.weight = nn.Parameter(weight(scale), requires_grad=False)
        return layer

    class Block(nn.Module):
        def __init__(self, p: Any):
            super().__init__()
            names = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
            self.attn_norm, self.ff_norm = (
                norm(p["attn_norm"]["scale"]),
                norm(p["ff_norm"]["scale"]),
            )
            self.linear = nn.ModuleDict({name: linear(p[name]["kernel"]) for name in names})

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            h, f = self.attn_norm(x), self.linear
            heads = (f[f"{name}_proj"](h).unflatten(-1, (-1, c.head_dim)) for name in "qkv")
            q, k, v = (part.transpose(1, 2) for part in heads)
            q, k = (turn(part, cos, sin) for part in (q, k))
            h = functional.scaled_dot_product_attention(
                q, k, v, enable_gqa=c.num_kv_heads != c.n_heads
            )
            x = x + f["attn_out"](h.transpose(1, 2).flatten(-2))
            h = self.ff_norm(x)
            return x + f["ff_out"](functional.silu(f["ff_proj"](h)) * f["up_proj"](h))

    def turn(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
            x.dtype
        )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding.from_pretrained(weight(params["wte"]["embedding"]))
            layer = lambda n: jax.tree.map(lambda x: np.asarray(x[n]), params["blocks"])  # noqa: E731
            self.blocks = nn.ModuleList([Block(layer(n)) for n in range(c.n_layers)])
            self.norm, self.head = norm(params["ln_f"]["scale"]), linear(params["ff_out"]["kernel"])
            self.frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)

        def forward(self, tokens: Any) -> Any:
            angle = torch.outer(torch.arange(tokens.shape[1]).float(), self.frequency)
            cos, sin = angle.cos(), angle.sin()
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x, cos, sin)
            return self.head(self.norm(x))

    return Model().eval()
