"""Configuration of LLaDA2.0 and LLaDA2.1, under the keys of their config.json."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from xflow_jax.errors import UserError, require
from xflow_jax.models.config_base import (
    HfConfig,
    KeyTable,
    TransformersKeys,
    read_config,
    update_rope,
)
from xflow_jax.models.config_checks import (
    check_divides,
    check_not_negative,
    check_positive,
    check_token_ids,
)
from xflow_jax.toml_config import format_value, write_keys

# Rows of the released models' vocabulary, and their mask token, which no config.json names.
RELEASED_ROWS, RELEASED_MASK = 157184, 156895

_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "pad_token_id",
)
_REQUIRED_BY_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
# Every key of LLaDA2.0's configuration is a field, fixed or ignored. The original code computes as
# if these had the first value, and other engines read them.
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid", None),
    "use_qk_norm": (True, None),
    "using_split_qkv_in_self_attention": (False,),
    "norm_topk_prob": (None, True),
    "norm_head": (None, False),
    "norm_softmax": (None, False),
    "use_rmsnorm": (None, True),
    "router_dtype": (None, "fp32", "float32"),
    "moe_router_enable_expert_bias": (None, True),
    "use_sliding_window": (None, False),
    "attention_bias": (None, False),
    "clip_qkv": (None,),
    "num_nextn_predict_layers": (None, 0),
    "quantization_config": (None,),
    "use_fp8_experts": (None, False),
}
_KEYS = KeyTable(
    _FIXED,
    {"architectures": ("LLaDA2MoeModelLM",), "layer_types": ("full_attention",)},
    # No layer has a window. Ids of images lie beyond the text's. rotary_dim follows from
    # partial_rotary_factor.
    frozenset(
        {"image_token_offset", "max_window_layers", "mtp_loss_scaling_factor", "rotary_dim"}
        | {"sliding_window"}
    ),
)
_TEMPLATE: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    **{key: choices[0] for key, choices in _FIXED.items() if choices[0] is not None},
    "rope_scaling": None,
}


@dataclass(frozen=True)
class LLaDA2Config(TransformersKeys, HfConfig):
    """LLaDA2.0's configuration: the keys of its config.json that the computation reads.

    The properties translate them to the vocabulary of `xflow_jax.types.ModelConfig`.

    Attributes:
        eos_token_id: the end token. None: it is pad_token_id.
        mask_token_id: the mask token. The released config.json lacks it, so None means that of
            the released vocabulary.
        head_dim: D. If 0 is passed, hidden_size / num_attention_heads.
        first_k_dense_replace: number of layers at the start that have a dense MLP.
        num_experts: X. None: every layer is dense.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    pad_token_id: int
    eos_token_id: int | None = None
    mask_token_id: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int = 0
    intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    num_experts: int | None = None
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None
    num_shared_experts: int | None = None
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 16384
    tie_word_embeddings: bool = False
    use_bias: bool = False
    use_qkv_bias: bool = False

    mask_token_names: ClassVar[tuple[str, ...]] = ("<|mask|>",)
    softmax_router: ClassVar[bool] = False
    router_bias: ClassVar[bool] = True
    use_qk_norm: ClassVar[bool] = True
    clip_qkv: ClassVar[float | None] = None

    @property
    def family(self) -> str:
        """Name of the family."""
        return "llada2"

    @property
    def mask_id(self) -> int:
        """Id of the mask token.

        Raises:
            UserError: if there is no mask_token_id and the vocabulary is not the released one.
        """
        if self.mask_token_id is None and self.vocab_size == RELEASED_ROWS:
            return RELEASED_MASK
        return super().mask_id

    @property
    def eos_id(self) -> int:
        """Id of the end token."""
        return self.pad_token_id if self.eos_token_id is None else self.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.pad_token_id

    @property
    def num_dense_layers(self) -> int:
        """Number of layers, the first ones, that have no experts."""
        if self.num_experts is None:
            return self.num_layers
        return min(self.first_k_dense_replace, self.num_layers)

    @property
    def rotary_dim(self) -> int:
        """Dims of a head, the first ones, that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def rope_full_precision(self) -> bool:
        """False: the original code rotates in the dtype of the computation."""
        return False

    @property
    def dense_mlp_dim(self) -> int:
        """Width of the MLP of a dense layer."""
        return self.intermediate_size or 0

    @property
    def moe_mlp_dim(self) -> int:
        """Width of one expert's MLP."""
        return self.moe_intermediate_size or 0

    @property
    def shared_mlp_dim(self) -> int:
        """Width of the MLP of all shared experts, or 0."""
        return self.moe_mlp_dim * (self.num_shared_experts or 0)

    @property
    def mlp_dim(self) -> int:
        """Width of a dense MLP or of one token's experts, if larger."""
        return max(self.dense_mlp_dim, self.num_experts_per_tok * self.moe_mlp_dim)

    @property
    def head_bias(self) -> bool:
        """False: the logits have no biases."""
        return False

    @property
    def is_block_causal(self) -> bool:
        """True: a position attends to its own block and earlier ones."""
        return True

    @property
    def default_block_length(self) -> int:
        """Positions of a block in training."""
        return 32

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_positive(self, "vocab_size", "rope_theta", "rms_norm_eps")
        check_positive(self, "max_position_embeddings", "routed_scaling_factor")
        check_not_negative(self, "first_k_dense_replace", "num_shared_experts")
        check_not_negative(self, "num_key_value_heads")
        heads = self.num_attention_heads
        check_divides("num_key_value_heads", self.num_kv_heads, "num_attention_heads", heads)
        if not self.head_dim:
            require(
                self.hidden_size % heads == 0,
                f"num_attention_heads {heads} does not divide hidden_size {self.hidden_size}, "
                "and there is no head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)  # frozen dataclass
        require(
            0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"partial_rotary_factor {self.partial_rotary_factor} of {self.head_dim} dims is "
            f"{self.rotary_dim}, but it must be an even number of at least 2, and not exceed "
            "the head",
        )
        if self.num_dense_layers:
            check_positive(self, "intermediate_size", reason="there are dense layers")
        if self.num_dense_layers < self.num_layers:
            self._check_experts()
        check_token_ids(self, self.vocab_rows)

    def _check_experts(self) -> None:
        keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        check_positive(self, *keys, "n_group", "topk_group", reason="there are layers of experts")
        experts, groups = self.num_experts or 0, self.n_group
        check_divides("n_group", groups, "num_experts", experts)
        require(
            self.topk_group <= groups, f"topk_group {self.topk_group} is more than n_group {groups}"
        )
        kept = self.topk_group * experts // groups
        require(
            self.num_experts_per_tok <= kept,
            f"num_experts_per_tok is {self.num_experts_per_tok}, "
            f"but the groups that are kept hold {kept} experts",
        )

    @classmethod
    def from_hf(cls, hf: object, where: str = "config.json") -> LLaDA2Config:
        """Reads the dict of a config.json.

        Args:
            hf: the dict. A null head_dim counts as a missing one.
            where: the file, for error messages.

        Returns:
            The configuration.

        Raises:
            UserError: if a key is missing, a value is impossible or of a wrong type, or a setting
                of LLaDA2.0's code is not implemented.
        """
        if isinstance(hf, dict) and hf.get("expert_capacity") is not None:
            raise UserError(
                f"{where}: expert_capacity is {format_value(hf['expert_capacity'])}, as in "
                "LLaDA2.2. Its router, which first chooses experts for a whole block of tokens, is "
                "missing here. LLaDA2.0 and LLaDA2.1 have another one."
            )
        required: tuple[str, ...] = _REQUIRED
        if isinstance(hf, dict) and hf.get("num_experts") is not None:
            required += _REQUIRED_BY_EXPERTS
        if isinstance(hf, dict) and hf.get("head_dim", 0) is None:
            known = {key: value for key, value in hf.items() if key != "head_dim"}
            config = read_config(cls, known, where, required, _KEYS)
            return dataclasses.replace(config, hf=json.dumps(hf))
        return read_config(cls, hf, where, required, _KEYS)

    def to_hf(self) -> dict[str, Any]:
        """Returns the dict of a config.json, unknown keys of `from_hf` included."""
        return update_rope(write_keys(self, _TEMPLATE), self)
