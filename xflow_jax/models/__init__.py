"""Model backbones in Flax Linen, and their configurations.

flax.linen is imported in this package alone. Elsewhere parameters are a nested dict of arrays.
"""

from xflow_jax.models import kv_cache
from xflow_jax.models.attention import attend
from xflow_jax.models.config import (
    Config,
    ILLaDAConfig,
    LLaDA2Config,
    LLaDAConfig,
    LLaDAMoEConfig,
    SDARConfig,
    model_config,
)
from xflow_jax.models.factory import abstract_params, abstract_weights, build, init_params
from xflow_jax.models.flops import (
    forward_flops,
    matrix_parameters,
    tensor_split_sizes,
    touched_parameters,
    update_flops,
)
from xflow_jax.models.lm_head import Head, LogitsFn, make_head, shift_rows
from xflow_jax.models.logical_axes import check_heads, shardings, state_shardings
from xflow_jax.models.lora import LoraConfig, lora_init, merge
from xflow_jax.models.presets import PRESETS
from xflow_jax.models.quantization import (
    INT8,
    SCALE,
    compute_dtype,
    is_quantized,
    quantize,
    quantize_params,
    require_float,
)

__all__ = [
    "Config",
    "Head",
    "ILLaDAConfig",
    "INT8",
    "LLaDA2Config",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LogitsFn",
    "LoraConfig",
    "PRESETS",
    "SCALE",
    "SDARConfig",
    "abstract_params",
    "abstract_weights",
    "attend",
    "build",
    "check_heads",
    "compute_dtype",
    "forward_flops",
    "init_params",
    "is_quantized",
    "kv_cache",
    "lora_init",
    "make_head",
    "matrix_parameters",
    "merge",
    "model_config",
    "quantize",
    "quantize_params",
    "require_float",
    "shardings",
    "shift_rows",
    "state_shardings",
    "tensor_split_sizes",
    "touched_parameters",
    "update_flops",
]
