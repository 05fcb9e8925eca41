"""Sizes of matrices and FLOPs: literal numbers of every preset, and of shapes they lack."""

import dataclasses

import pytest

from tests.helpers import TOY
from tests.llada2_helpers import TINY2
from xflow_jax.models.flops import (
    forward_flops,
    matrix_parameters,
    tensor_split_sizes,
    touched_parameters,
    update_flops,
)
from xflow_jax.models.presets import PRESETS

CONFIGS = PRESETS | {
    "toy": TOY,
    "toy, one key/value head": dataclasses.replace(TOY, n_kv_heads=1),
    "tiny": TINY2,
    "tiny, dense": dataclasses.replace(TINY2, num_experts=None),
    "tiny, sparse": dataclasses.replace(TINY2, first_k_dense_replace=0, num_shared_experts=0),
}
# name -> (parameters that a token meets, all), sizes that `tensor` splits, parameters that 1 and
# 64 tokens touch, FLOPs of 2 x 32 tokens that attend to 640 each
EXPECTED = {
    "llada-8b": (
        (6979321856, 6979321856),
        [32, 32, 12288],
        [6979321856, 6979321856],
        914828034048,
    ),
    "illada-8b": (
        (6979321856, 6979321856),  # as LLaDA: fewer key/value heads, a wider MLP
        [32, 8, 14336],
        [6979321856, 6979321856],
        914828034048,
    ),
    "dream-7b": (
        (6525288448, 6525288448),
        [28, 4, 18944],
        [6525288448, 6525288448],
        851678593024,
    ),
    "fast-dllm-v2-7b": (
        (6525288448, 6525288448),  # as Dream
        [28, 4, 18944],
        [6525288448, 6525288448],
        851678593024,
    ),
    "fast-dllm-v2-1.5b": (
        (1310195712, 1310195712),
        [12, 2, 8960],
        [1310195712, 1310195712],
        174751481856,
    ),
    "sdar-1.7b": (
        (1409286144, 1409286144),
        [16, 8, 6144],
        [1409286144, 1409286144],
        189783867392,
    ),
    "sdar-4b": (
        (3633315840, 3633315840),
        [32, 8, 9728],
        [3633315840, 3633315840],
        489223618560,
    ),
    "sdar-8b": (
        (6945767424, 6945767424),
        [32, 8, 12288],
        [6945767424, 6945767424],
        913217421312,
    ),
    "llada-moe-7b": (
        (1075838976, 6712983552),
        [16, 16, 64, 0],
        [1075838976.0, 6711731661.010131],
        143076098048,
    ),
    "llada2-mini": (
        (789053440, 15611723776),
        [16, 4, 5120, 256, 512],
        [789053440.0, 13606030460.137339],
        107709726720,
    ),
    "llada2-flash": (
        (4864344064, 101601771520),
        [32, 4, 9216, 256, 1024],
        [4864344064.0, 88511983563.84369],
        644110876672,
    ),
    "llada2-20m": (
        (4935680, 18698240),
        [4, 2, 1024, 16, 256],
        [4935680.0, 18695183.625513013],
        883425280,
    ),
    "toy": ((4352, 4352), [2, 2, 24], [4352, 4352], 5799936),
    "toy, one key/value head": ((3840, 3840), [2, 1, 24], [3840, 3840], 5734400),
    "tiny": ((37376, 65024), [4, 2, 48, 8, 24], [37376.0, 65023.99962801681], 36241408),
    "tiny, dense": ((32256, 32256), [4, 2, 48], [32256, 32256], 35586048),
    "tiny, sparse": ((33024, 74496), [4, 2, 8, 0], [33024.0, 74495.99944202522], 35684352),
}
for size in ("mini", "flash"):  # other weights only
    EXPECTED[f"llada2.1-{size}"] = EXPECTED[f"llada2-{size}"]


def test_every_preset_is_covered():
    assert EXPECTED.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes(name):
    config = CONFIGS[name]
    parameters, sizes, touched, flops = EXPECTED[name]
    assert matrix_parameters(config) == parameters
    assert tensor_split_sizes(config) == sizes
    assert [touched_parameters(config, tokens) for tokens in (1, 64)] == touched
    assert forward_flops(config, rows=2, queries=32, keys=640) == flops


def test_flops_of_an_update():
    """Three times the matrix products of a pass, without the gradients of frozen ones."""
    rows, length, predicted = 2, 12, 8
    forward = forward_flops(TOY, rows, length, length)
    head = 2 * rows * predicted * TOY.hidden_size * TOY.vocab_rows
    assert update_flops(TOY, rows, length, predicted, 5, False) == 3 * forward + 5 * head
    matrices = 2 * rows * length * 4352
    assert update_flops(TOY, rows, length, predicted, 5, True) == 3 * forward - matrices + 4 * head
