"""Configurations of all families, and the reading of a config.json."""

from __future__ import annotations

from typing import TypeAlias

from xflow_jax.errors import UserError
from xflow_jax.models.dream_config import DreamConfig
from xflow_jax.models.fast_dllm_config import FastDLLMConfig
from xflow_jax.models.illada_config import ILLaDAConfig
from xflow_jax.models.llada2_config import LLaDA2Config
from xflow_jax.models.llada_config import LLaDAConfig
from xflow_jax.models.lladamoe_config import LLaDAMoEConfig
from xflow_jax.models.sdar_config import SDARConfig
from xflow_jax.models.size_limits import check_sizes
from xflow_jax.toml_config import format_value

__all__ = [
    "Config",
    "DreamConfig",
    "FastDLLMConfig",
    "ILLaDAConfig",
    "LLaDA2Config",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "SDARConfig",
    "model_config",
]

Config: TypeAlias = (
    LLaDAConfig
    | LLaDA2Config
    | ILLaDAConfig
    | LLaDAMoEConfig
    | DreamConfig
    | SDARConfig
    | FastDLLMConfig
)

# model_type -> configuration. veomni is the same model, with the experts of a layer stacked, and
# llada21_moe a name that some programs give to LLaDA2.1, which has LLaDA2.0's own.
_CONFIGS: dict[str, type[Config]] = {
    "llada": LLaDAConfig,
    "llada2_moe": LLaDA2Config,
    "llada2_moe_veomni": LLaDA2Config,
    "llada21_moe": LLaDA2Config,
    "illada": ILLaDAConfig,
    "lladamoe": LLaDAMoEConfig,
    "Dream": DreamConfig,
    "sdar": SDARConfig,
    "Fast_dLLM_Qwen": FastDLLMConfig,
}


def model_config(hf: object, where: str = "config.json") -> Config:
    """Reads the dict of a config.json.

    Args:
        hf: the dict. Its key model_type names the family.
        where: the file, for error messages.

    Returns:
        The configuration of that family.

    Raises:
        UserError: if there is no such family, or as its `from_hf`.
    """
    kind = hf.get("model_type") if isinstance(hf, dict) else None
    if isinstance(kind, str) and kind.startswith("diffusion_gemma"):
        raise UserError(
            f"{where}: DiffusionGemma starts from random tokens instead of masks. It is no masked "
            "diffusion model, so it is not supported."
        )
    if not isinstance(kind, str) or kind not in _CONFIGS:
        right = " or ".join(format_value(name) for name in _CONFIGS)
        raise UserError(
            f"{where}: model_type is {format_value(kind)}, which is not implemented. "
            f"It must be {right}."
        )
    family = _CONFIGS[kind]
    if family is LLaDAConfig and _has_experts(hf):
        family = LLaDAMoEConfig
    config = family.from_hf(hf, where)
    check_sizes(config, where)
    return config


def _has_experts(hf: object) -> bool:
    """Returns True for LLaDA-MoE, whose model_type is LLaDA's."""
    assert isinstance(hf, dict)
    return hf.get("architectures") == ["LLaDAMoEModelLM"] or bool(hf.get("num_experts"))
