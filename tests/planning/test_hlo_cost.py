"""Costs counted in HLO text, against programs whose cost is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import eight
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.parallel.partitioning import batch_sharding, replicated
from xflow_jax.planning.hlo_cost import part_cycles, program_cost, sum_collectives
from xflow_jax.planning.hlo_flops import ExpertCount


def cost(fn, *args):
    return program_cost(jax.jit(fn).lower(*args).compile().as_text())


A = jax.ShapeDtypeStruct((32, 64), jnp.float32)
B = jax.ShapeDtypeStruct((64, 16), jnp.float32)


def test_a_product_and_a_loop_of_products():
    assert cost(jnp.matmul, A, B).flops == 2 * 32 * 64 * 16

    def loop(a, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), a, None, length=7)[0]

    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    found = cost(loop, A, square)
    assert found.flops == 7 * 2 * 32 * 64 * 64 and not found.unknown_loops


def test_loops_in_loops_and_the_dearer_branch():
    def inner(x, w):
        return jax.lax.fori_loop(2, 5, lambda _, x: jnp.tanh(x @ w), x)

    def outer(x, w, go):
        twice = lambda x: inner(inner(x, w), w)  # noqa: E731
        step = lambda x, _: (jax.lax.cond(go, twice, lambda x: x, x), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=4)[0]

    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    found = cost(outer, A, square, jax.ShapeDtypeStruct((), jnp.bool))
    assert found.flops == 4 * 2 * 3 * 2 * 32 * 64 * 64 and not found.unknown_loops


def test_a_loop_of_unknown_length_is_named():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ w), x)

    found = cost(until, A, jax.ShapeDtypeStruct((64, 64), jnp.float32))
    assert found.flops == 2 * 32 * 64 * 64 and len(found.unknown_loops) == 1


def test_traffic_of_a_sliced_stack_is_its_slices():
    """A loop over layers reads each layer's matrix once, not the stack each time."""
    stack = jax.ShapeDtypeStruct((6, 256, 256), jnp.float32)
    row = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    found = cost(lambda x, ws: jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0], row, stack)
    weights = 6 * 256 * 256 * 4
    assert found.flops == 6 * 2 * 8 * 256 * 256
    assert weights <= found.bytes < 4 * weights


# As the TPU compiler reads a layer of an int8 stack: through a change of tiles, in one fusion.
TILED = """HloModule tiled, is_scheduled=true

%copy_fusion (input: s8[6,64,128]) -> s8[6,64,128] {
  %input = s8[6,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy = s8[6,64,128]{2,1,0:T(8,128)(4,1)} copy(%input)
}

%slice_fusion (stack.1: s8[6,64,128], layer.1: s32[]) -> s8[1,64,128] {
  %stack.1 = s8[6,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %tiles = s8[6,64,128]{2,1,0:T(8,128)(4,1)} fusion(%stack.1), kind=kLoop, ALIAScalls=%copy_fusion
  %layer.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = s8[1,64,128]{2,1,0} dynamic-slice(%tiles, %layer.1, %zero, %zero)
}

ENTRY %main (stack: s8[6,64,128], layer: s32[]) -> s8[1,64,128] {
  %stack = s8[6,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %layer = s32[] parameter(1)
  ROOT %layers = s8[1,64,128]{2,1,0:S(1)} fusion(%stack, %layer), kind=kLoop, calls=%slice_fusion
}
"""


def test_a_slice_behind_a_change_of_tiles_reads_the_slice():
    in_place = TILED.replace("ALIAS", "output_to_operand_aliasing={{}: (0, {})}, ")
    assert program_cost(in_place).bytes == pytest.approx(64 * 128, abs=8)
    assert program_cost(TILED.replace("ALIAS", "")).bytes == pytest.approx(6 * 64 * 128, abs=8)


@eight
def test_collectives_by_kind_size_and_count():
    mesh = make_mesh("1,2,4")

    def loop(x):
        def one(x, _):
            return jax.lax.psum(x, "tensor") * 0.25, None

        return jax.lax.all_gather(jax.lax.scan(one, x, None, length=3)[0], "fsdp", tiled=True)

    spec = batch_sharding(mesh).spec
    fn = jax.shard_map(
        loop, mesh=mesh, in_specs=spec, out_specs=replicated(mesh).spec, check_vma=False
    )
    rows = sum_collectives(cost(fn, jax.ShapeDtypeStruct((8, 16), jnp.float32)).collectives)
    assert {(r["kind"], r["group"], r["count"]): r["bytes"] for r in rows} == {
        ("all-reduce", 4, 3): 3 * 4 * 16 * 4,
        ("all-gather", 2, 1): 8 * 16 * 4,
    }


TPU_TEXT = """HloModule jit_f, num_partitions=8

%fused (p0: bf16[640,4096], p1: bf16[32,4096,512]) -> bf16[640,4,128] {
  %p0 = bf16[640,4096]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[32,4096,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = bf16[1,4096,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p1, %zero, %zero, %zero), \
dynamic_slice_sizes={1,4096,512}
  %w = bf16[4,128,4096]{2,1,0:T(8,128)(2,1)} bitcast(%one)
  %x = bf16[640,4096,1]{1,0,2:T(8,128)(2,1)} bitcast(%p0)
  ROOT %c = bf16[640,4,128]{0,2,1:T(8,128)(2,1)S(1)} convolution(%x, %w), \
window={size=4 pad=3_3 rhs_reversal=1}, \
dim_labels=bf0_0oi->b0f, metadata={op_name="jit(f)/blocks/v_proj/dot_general"}
}

ENTRY %main (a: bf16[640,4096], b: bf16[32,4096,512], q: bf16[4,128,640]) -> bf16[640,4,128] {
  %a = bf16[640,4096]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[32,4096,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %q = bf16[4,640,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %scores = f32[4,640,640]{1,2,0:T(8,128)S(1)} convolution(%q, %q), \
window={size=4 stride=3 lhs_dilate=4}, \
dim_labels=0bf_0oi->0bf, backend_config={"estimated_cycles":"500"}
  %r = bf16[640,4096]{1,0:T(8,128)(2,1)S(1)} all-reduce(%a), \
replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  ROOT %f = bf16[640,4,128]{0,2,1:T(8,128)(2,1)S(1)} fusion(%r, %b), kind=kOutput, calls=%fused, \
metadata={op_name="jit(f)/blocks/v_proj/dot_general"}, backend_config={"estimated_cycles":"1500"}
}
"""


def test_the_tpus_own_forms():
    """Convolutions for products, arrays on the chip, groups by mesh axis, and cycles."""
    found = program_cost(TPU_TEXT)
    assert found.flops == 2 * 640 * 4096 * 512 + 2 * 4 * 640 * 640 * 128
    assert found.bytes == 4096 * 512 * 2  # one slice of the stack, all else is on the chip
    (reduced,) = found.collectives
    assert reduced.kind == "all-reduce" and reduced.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert part_cycles(found, {"backbone": "/blocks/"}) == {"backbone": 1500.0, "rest": 500.0}


CHAINED_TEXT = """HloModule m, num_partitions=4

%part (p0: bf16[8,16], p1: bf16[32,16], p2: bf16[64,16]) -> (bf16[64,16], bf16[8,16], bf16[32,16]) {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  %p2 = bf16[64,16]{1,0} parameter(2)
  %g = bf16[32,16]{1,0} all-gather(%p0), channel_id=7, replica_groups={{0,1,2,3}}, \
frontend_attributes={chain_id="1"}
  %n = bf16[64,16]{1,0} negate(%p2)
  ROOT %t = (bf16[64,16]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) tuple(%n, %p0, %g)
}

ENTRY %main (x: bf16[8,16], y: bf16[32,16], z: bf16[64,16]) -> bf16[64,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = bf16[32,16]{1,0} parameter(1)
  %z = bf16[64,16]{1,0} parameter(2)
  %a = (bf16[64,16]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%x, %y, %z), kind=kLoop, \
calls=%part
  %a0 = bf16[64,16]{1,0} get-tuple-element(%a), index=0
  %b = (bf16[64,16]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%x, %y, %a0), kind=kLoop, \
calls=%part
  ROOT %b0 = bf16[64,16]{1,0} get-tuple-element(%b), index=0
}
"""


def test_a_collective_behind_several_fusions_moves_its_bytes_once():
    found = program_cost(CHAINED_TEXT)
    (gathered,) = found.collectives
    assert gathered.kind == "all-gather" and gathered.bytes == 2 * 32 * 16
    assert found.bytes == 2 * 16 * ((8 + 32) + 2 * (64 + 64))


GROUPED_TEXT = """HloModule m

ENTRY %main (n: s32[1], x: bf16[64,32], w: bf16[12,32,16]) -> bf16[64,16] {
  %n = s32[1]{0} parameter(0)
  %x = bf16[64,32]{1,0} parameter(1)
  %w = bf16[12,32,16]{2,1,0} parameter(2)
  ROOT %ragged-dot-none.1 = bf16[64,16]{1,0} custom-call(%n, %x, %w), \
custom_call_target="tpu_custom_call"
}
"""


def test_a_grouped_product_reads_the_experts_of_its_own_layer():
    """4 of 8 experts are on the chip, and the stack has 3 layers: half the rows, a third of it."""
    found = program_cost(GROUPED_TEXT, ExpertCount(total=8, local=4))
    assert found.flops == found.grouped_flops == 2 * 64 * 32 * 16 / 2
    assert found.bytes == found.grouped_bytes == 4 + 2 * (64 * 32 + 4 * 32 * 16 + 64 * 16)
    assert not found.unknown_kernels


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        (
            "replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}",
            ((0, 1), (2, 3)),
        ),
        ("to_apply=%add", ((0, 1, 2, 3),)),
    ],
)
def test_groups_in_every_notation(text, groups):
    line = f"  %r = f32[8]{{0}} all-reduce(%a), channel_id=1, {text}, use_global_device_ids=true"
    body = "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n" + line + "\n}\n"
    (found,) = program_cost("HloModule m, num_partitions=4\n\n" + body).collectives
    assert found.groups == groups and found.bytes == 32
