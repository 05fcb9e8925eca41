"""Attention kernels: one result, and a clear error for each that cannot compute it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import eight
from xflow_jax.errors import UserError
from xflow_jax.models import attention, rounded_attention
from xflow_jax.models.attention import attend, attention_mask
from xflow_jax.parallel.mesh import make_mesh


def arguments(length=40, keys=136, heads=4, kv_heads=2, width=128, dtype=jnp.float32):
    """q, k and v, and a mask of two rows, one with seven keys of padding."""
    rng = np.random.default_rng(0)
    sizes = ((length, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, h, width)), dtype) for n, h in sizes)
    return q, k, v, jnp.arange(keys)[None, None, None] >= jnp.array([0, 7])[:, None, None, None]


def test_masks_by_hand():
    """Rows of five positions, the second with one of padding, in blocks of two."""
    assert attention_mask(5) is None
    real = jnp.arange(5)[None] >= jnp.array([[0], [1]])
    keys = [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert attention_mask(5, real)[:, 0, 0].astype(int).tolist() == keys
    first, rest = [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]
    grid = [first, first, rest, rest, [1] * 5]
    assert attention_mask(5, None, 2)[0, 0].astype(int).tolist() == grid
    ours = attention_mask(5, real, 2)[:, 0].astype(int)
    assert ours[0].tolist() == grid
    # The second row's blocks begin at its first real token. Its padding may hold anything.
    assert ours[1, 1:].tolist() == [[0, 1, 1, 0, 0]] * 2 + [[0, 1, 1, 1, 1]] * 2
    allowed = jnp.ones((2, 5, 5), bool).at[:, 4, 3].set(False)
    ours = attention_mask(5, real, 2, allowed)[:, 0, 4].astype(int)
    assert ours.tolist() == [[1, 1, 1, 0, 1], [0, 1, 1, 0, 1]]


@eight
def test_splash_is_einsum():
    """The kernel is interpreted. No length is a multiple of a tile."""
    *qkv, mask = arguments()
    for seen in (mask, None):
        wanted = attend(*qkv, seen, "einsum")
        np.testing.assert_allclose(attend(*qkv, seen, "splash"), wanted, rtol=0, atol=1e-5)
    for spec in (
        "1,2,2",
        "4,1,1",
    ):  # the second divides no batch of two, so every device computes both rows
        with jax.set_mesh(make_mesh(spec)):
            out = jax.jit(lambda *args: attend(*args, "splash"))(*qkv, mask)
        np.testing.assert_allclose(out, attend(*qkv, mask, "einsum"), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_splash():
    *qkv, mask = arguments(length=8, keys=8, heads=2)

    def grads(kernel):
        return jax.grad(lambda qkv: (attend(*qkv, mask[..., :8], kernel) ** 2).sum())(qkv)

    for ours, wanted in zip(grads("splash"), grads("einsum"), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows_in_cache", [1, 2, 100])
def test_rounded_products_change_attention_little(rows_in_cache, monkeypatch):
    """The first row of the mask is padding in its first seven keys."""
    q, k, v, mask = arguments(length=24, keys=40, kv_heads=4, width=8)
    q, k, v, mask = (jnp.concatenate([x, x[::-1]]) for x in (q, k, v, mask))
    causal = mask & (jnp.arange(40)[None] <= 16 + jnp.arange(24)[:, None])[None, None]
    monkeypatch.setattr(rounded_attention, "CACHE_BYTES", rows_in_cache * 4 * 4 * 24 * 40)
    for allowed in (None, mask, causal):

        def both(qkv, allowed=allowed):
            out = attend(*qkv, allowed)
            return (out**2).sum(), out

        grad = jax.value_and_grad(both, has_aux=True)
        (_, wanted), slopes = grad((q, k, v))
        with jax.default_matmul_precision("bfloat16"):
            (_, out), ours = jax.jit(grad)((q, k, v))
        assert out.dtype == jnp.float32 and (out != wanted).any()
        np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-2)
        for one, other in zip(ours, slopes, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-2 * jnp.abs(other).max())


def test_rows_at_a_time_divide_the_batch(monkeypatch):
    monkeypatch.setattr(rounded_attention, "CACHE_BYTES", 400)
    rows = [rounded_attention._rows_at_a_time(n, 100) for n in (1, 2, 5, 6, 7, 8)]
    assert rows == [1, 2, 1, 3, 1, 4]
    assert rounded_attention._rows_at_a_time(8, 1000) == 1
    with jax.set_mesh(make_mesh("1,1,1")):
        assert rounded_attention._rows_at_a_time(8, 1000) == 8


CANNOT = [
    ("splash", {"width": 64}, "heads of 128, 256, ... dims, not 64"),
    ("cudnn", {}, "bfloat16 or float16, not float32"),
    ("cudnn", {"dtype": jnp.bfloat16, "width": 12}, "heads of 8, 16, ... 128 dims, not 12"),
    ("cudnn", {"dtype": jnp.bfloat16, "width": 256}, "heads of 8, 16, ... 128 dims, not 256"),
    ("cudnn", {"dtype": jnp.bfloat16, "length": 7}, "even lengths, not 7 and 136"),
]


@pytest.mark.parametrize("kernel, changes, needs", CANNOT)
def test_what_a_kernel_cannot_do(kernel, changes, needs, monkeypatch):
    monkeypatch.setattr(attention, "has_cudnn", lambda: True)
    with pytest.raises(UserError) as error:
        attend(*arguments(**changes), kernel)
    assert str(error.value) == f"the attention kernel {kernel} needs {needs}. Leave attention out."


def test_kernels_that_are_not_here():
    *qkv, mask = arguments(dtype=jnp.bfloat16)
    with pytest.raises(
        UserError, match="cudnn needs an NVIDIA GPU of compute capability 8.0 or more. Leave"
    ):
        attend(*qkv, mask, "cudnn")
    with pytest.raises(
        UserError, match="attention is 'flash', but it must be one of einsum, xla, cudnn, splash"
    ):
        attend(*qkv, mask, "flash")
    blocks = jnp.ones((2, 1, 40, 136), bool)
    with pytest.raises(
        UserError, match="splash needs the same keys for all queries of a row, not blocks"
    ):
        attend(*qkv, blocks, "splash")


@pytest.mark.parametrize(
    "platform, there, changes, wanted",
    [
        ("cpu", True, {"dtype": jnp.bfloat16}, "einsum"),
        ("tpu", True, {"dtype": jnp.bfloat16}, "xla"),
        ("gpu", True, {"dtype": jnp.bfloat16}, "cudnn"),
        ("gpu", True, {"dtype": jnp.float16, "width": 64}, "cudnn"),
        ("gpu", False, {"dtype": jnp.bfloat16}, "xla"),
        ("gpu", True, {}, "xla"),
        ("gpu", True, {"dtype": jnp.bfloat16, "width": 20}, "xla"),
        ("gpu", True, {"dtype": jnp.bfloat16, "keys": 135}, "xla"),
    ],
)
def test_the_default_is_the_best_that_can(platform, there, changes, wanted, monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    monkeypatch.setattr(attention, "has_cudnn", lambda: there)
    q, k, _, mask = arguments(**changes)
    assert attention.default_kernel(q, k, mask) == wanted
