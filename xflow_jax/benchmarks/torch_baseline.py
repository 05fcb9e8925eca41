"""Speed of the same decode in PyTorch with equal weights.

PyTorch comes with the extra [bench]. It is imported only inside functions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.benchmarks.timer import median_ratio, time_in_turns
from xflow_jax.benchmarks.workload import random_prompts
from xflow_jax.decoding import DecodeConfig, MaskPrediction, decode_batch
from xflow_jax.errors import UserError, require
from xflow_jax.lm import LM
from xflow_jax.models import LLaDAConfig, require_float
from xflow_jax.types import ModelConfig, Params

Tensor: TypeAlias = Any  # torch.Tensor, whose module is imported only inside functions
# (prompt int [B, P], response length, steps) -> tokens int [B, N]
Decoder: TypeAlias = Callable[[np.ndarray, int, int], np.ndarray]


@dataclass(frozen=True)
class TorchComparison:
    """The same decode by this library and by PyTorch.

    Attributes:
        batch: number of sequences.
        ours: response tokens per second of this library, a median.
        theirs: response tokens per second of PyTorch, a median.
        speedup: ours / theirs, as the median of the rounds' own ratios.
        agreement: share of equal tokens.
    """

    batch: int
    ours: float
    theirs: float
    speedup: float
    agreement: float


def compare_with_torch(
    lm: LM, decode_config: DecodeConfig, batch: int, prompt_length: int, rounds: int
) -> TorchComparison:
    """Times mask prediction on random prompts here and in PyTorch, in turns.

    Args:
        lm: a LLaDA model.
        decode_config: lengths and steps.
        batch: number of prompts.
        prompt_length: tokens of each prompt.
        rounds: number of rounds.

    Raises:
        UserError: as `torch_decoder`.
    """
    decoder = torch_decoder(lm.config, lm.params, str(lm.dtype))
    ids, mask, keys = random_prompts(lm, batch, prompt_length)
    # Without padding, which the PyTorch model does not know.
    ids, mask = ids[:, -prompt_length:], mask[:, -prompt_length:]
    prompt = np.asarray(ids)
    length, steps = decode_config.gen_length, decode_config.blocks * decode_config.steps

    def run_jax() -> np.ndarray:
        rule = MaskPrediction()
        return np.asarray(
            decode_batch(lm.model, lm.params, rule, decode_config, ids, mask, keys)[0]
        )

    def run_torch() -> np.ndarray:
        return decoder(prompt, length, steps)

    with lm.scope():
        same = run_jax() == run_torch()
        times = time_in_turns({"jax": run_jax, "torch": run_torch}, rounds)
    return TorchComparison(
        batch,
        batch * length / statistics.median(times["jax"]),
        batch * length / statistics.median(times["torch"]),
        median_ratio(times["torch"], times["jax"]),
        float(np.mean(same)),
    )


def torch_decoder(config: ModelConfig, params: Params, dtype: str) -> Decoder:
    """Builds mask prediction as in the official LLaDA code.

    Each step runs a forward pass of all positions and the softmax of all logits. It writes the
    masked tokens of the highest confidence, as many as the schedule says.

    Args:
        config: a LLaDA model without biases and with a head of its own.
        params: its parameters.
        dtype: "float32" or "bfloat16".

    Raises:
        UserError: without PyTorch, or for any other model.
    """
    require_float(params, "the comparison with PyTorch")
    try:
        import torch
    except ImportError:
        raise UserError(
            'PyTorch is missing. It comes with the extra [bench]: pip install "xflow-jax[bench]"'
        ) from None
    if not isinstance(config, LLaDAConfig):
        raise UserError("the comparison with PyTorch is for LLaDA models only")
    require(
        not config.include_bias and not config.qkv_bias and not config.weight_tying,
        "the comparison with PyTorch is for LLaDA without biases and with a head of its own",
    )
    model = _TorchModel(config, params, dtype)

    @torch.inference_mode()
    def decode(prompt: np.ndarray, length: int, steps: int) -> np.ndarray:
        blank = torch.full((prompt.shape[0], length), config.mask_id)
        x = torch.cat([torch.from_numpy(np.asarray(prompt, np.int64)), blank], dim=1)
        for step in range(steps):
            quota = length // steps + (step < length % steps)
            logits = model.logits(x)
            best = logits.argmax(dim=-1)
            confidence = torch.softmax(logits.float(), dim=-1).gather(-1, best[..., None])[..., 0]
            masked = x == config.mask_id
            confidence = torch.where(masked, confidence, -torch.inf)
            surest = confidence.topk(quota, dim=1).indices
            chosen = torch.zeros_like(masked).scatter_(1, surest, True)
            x = torch.where(chosen & masked, best, x)
        return x[:, prompt.shape[1] :].numpy()

    return decode


class _TorchModel:
    """LLaDA in PyTorch.

    Kernels are [out, in], while those of this library are [in, out].
    """

    def __init__(self, config: LLaDAConfig, params: Params, dtype: str):
        import torch

        def convert(x: jax.Array) -> Tensor:
            return torch.from_numpy(np.array(jnp.asarray(x, jnp.float32))).to(getattr(torch, dtype))

        def convert_layer(path: tuple[jax.tree_util.DictKey, ...], x: jax.Array) -> Tensor:
            return convert(x).T.contiguous() if path[-1].key == "kernel" else convert(x)

        self.config = config
        self.embedding = convert(params["wte"]["embedding"])
        layers = [
            jax.tree.map(lambda x, n=n: x[n], params["blocks"]) for n in range(config.n_layers)
        ]
        self.layers = [jax.tree_util.tree_map_with_path(convert_layer, layer) for layer in layers]
        self.norm = convert(params["ln_f"]["scale"])
        self.head = convert(params["ff_out"]["kernel"]).T.contiguous()
        angles = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.frequency = config.rope_theta**-angles

    def logits(self, tokens: Tensor) -> Tensor:
        """Computes logits [B, L, V] of tokens [B, L]."""
        import torch
        from torch.nn import functional

        angle = torch.outer(torch.arange(tokens.shape[1]).float(), self.frequency)
        cos, sin = angle.cos(), angle.sin()
        x = functional.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = x + self._attention(layer, self._rms_norm(x, layer["attn_norm"]["scale"]), cos, sin)
            h = self._rms_norm(x, layer["ff_norm"]["scale"])
            gate = functional.silu(functional.linear(h, layer["ff_proj"]["kernel"]))
            up = functional.linear(h, layer["up_proj"]["kernel"])
            x = x + functional.linear(gate * up, layer["ff_out"]["kernel"])
        return functional.linear(self._rms_norm(x, self.norm), self.head)

    def _rms_norm(self, x: Tensor, scale: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.rms_norm(x, scale.shape, scale, self.config.rms_norm_eps)

    def _attention(
        self,
        layer: dict[str, dict[str, Tensor]],
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        from torch.nn import functional

        c = self.config
        projected = (functional.linear(h, layer[f"{name}_proj"]["kernel"]) for name in "qkv")
        q, k, v = (x.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for x in projected)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        grouped = c.num_kv_heads != c.n_heads
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        return functional.linear(out.transpose(1, 2).flatten(-2), layer["attn_out"]["kernel"])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions in float32."""
    import torch

    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
