"""Names of slices and devices, and times of links."""

from __future__ import annotations

import pytest

from xflow_jax.errors import UserError
from xflow_jax.planning.hardware import link_seconds, parse_device, parse_topology


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("v5e-8", "v5e:2x4"),
        ("v5p-128", "v5p:4x4x4"),
        ("v6e-256", "v6e:16x16"),
        ("v5p:2x2x4", "v5p:2x2x4"),
    ],
)
def test_slices_by_either_name(text, wanted):
    assert parse_topology(text).text == wanted


@pytest.mark.parametrize(
    "text, message",
    [
        ("v9x:2x2", "there is no topology 'v9x:2x2'. There are v5e, v5p, v6e"),
        ("v5e", "there is no topology 'v5e'. There are"),
        ("v5e-7", "there is no slice 'v5e-7'. There are v5e-1, v5e-4, v5e-8"),
        ("v5p-7", "v5p counts TensorCores, two per chip, so the number must be even"),
        ("v5p:4x4", "needs 3 sizes, of a 3D torus, like v5p:4x4x4"),
        ("v5e:32x32", "has 1024 chips, but a pod of v5e has 256"),
    ],
)
def test_unknown_topologies(text, message):
    with pytest.raises(UserError) as error:
        parse_topology(text)
    assert message in str(error.value)


def test_unknown_devices():
    assert parse_device("gpu:h200:8")[1] == 8
    for text in ("gpu:h300", "h200", "gpu:h200:x"):
        with pytest.raises(UserError, match="There are gpu:a100, gpu:h100, gpu:h200, gpu:b200"):
            parse_device(text)


def test_link_times():
    assert link_seconds("all-reduce", 8e9, 8, 1, True, 50e9) == pytest.approx(
        2 * 7 / 8 * 8e9 / 100e9
    )
    assert link_seconds("all-gather", 8e9, 4, 2, False, 50e9) == pytest.approx(3 / 4 * 8e9 / 100e9)
    assert link_seconds("all-reduce", 8e9, 1, 1, True, 50e9) == 0
