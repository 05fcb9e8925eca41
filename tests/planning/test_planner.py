"""What `xflow plan` counts, against programs whose cost is known, and what it says to bad input."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import TOY, eight, toy
from xflow_jax.cli import plan
from xflow_jax.errors import UserError
from xflow_jax.models.presets import PRESETS
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.parallel.partitioning import batch_sharding, replicated
from xflow_jax.planning import planner
from xflow_jax.planning.cost_model import Workload, estimate_cost
from xflow_jax.planning.hardware import CHIPS, link_seconds, parse_device, parse_topology
from xflow_jax.planning.hlo_cost import Program, by_kind, part_cycles
from xflow_jax.planning.programs import candidate_meshes, make_lowerable

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]"
)


def cost(fn, *args):
    return Program(jax.jit(fn).lower(*args).compile().as_text()).cost()


def arguments(*argv):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_args(argv)


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
    rows = by_kind(cost(fn, jax.ShapeDtypeStruct((8, 16), jnp.float32)).collectives)
    assert {(r["kind"], r["group"], r["count"]): r["bytes"] for r in rows} == {
        ("all-reduce", 4, 3): 3 * 4 * 16 * 4,
        ("all-gather", 2, 1): 8 * 16 * 4,
    }


TPU_TEXT = """HloModule jit_f, num_partitions=8

%fused (p0: bf16[640,4096], p1: bf16[32,4096,512]) -> bf16[640,4,128] {
  %p0 = bf16[640,4096]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[32,4096,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = bf16[1,4096,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p1, %zero, %zero, %zero), dynamic_slice_sizes={1,4096,512}
  %w = bf16[4,128,4096]{2,1,0:T(8,128)(2,1)} bitcast(%one)
  %x = bf16[640,4096,1]{1,0,2:T(8,128)(2,1)} bitcast(%p0)
  ROOT %c = bf16[640,4,128]{0,2,1:T(8,128)(2,1)S(1)} convolution(%x, %w), window={size=4 pad=3_3 rhs_reversal=1}, \
dim_labels=bf0_0oi->b0f, metadata={op_name="jit(f)/blocks/v_proj/dot_general"}
}

ENTRY %main (a: bf16[640,4096], b: bf16[32,4096,512], q: bf16[4,128,640]) -> bf16[640,4,128] {
  %a = bf16[640,4096]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[32,4096,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %q = bf16[4,640,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %scores = f32[4,640,640]{1,2,0:T(8,128)S(1)} convolution(%q, %q), window={size=4 stride=3 lhs_dilate=4}, \
dim_labels=0bf_0oi->0bf, backend_config={"estimated_cycles":"500"}
  %r = bf16[640,4096]{1,0:T(8,128)(2,1)S(1)} all-reduce(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  ROOT %f = bf16[640,4,128]{0,2,1:T(8,128)(2,1)S(1)} fusion(%r, %b), kind=kOutput, calls=%fused, \
metadata={op_name="jit(f)/blocks/v_proj/dot_general"}, backend_config={"estimated_cycles":"1500"}
}
"""


def test_the_tpus_own_forms():
    """Products written as padded or dilated convolutions, arrays on the chip, groups named by mesh, cycles."""
    found = Program(TPU_TEXT.replace("\\\n", "")).cost()
    assert found.flops == 2 * 640 * 4096 * 512 + 2 * 4 * 640 * 640 * 128
    assert found.bytes == 4096 * 512 * 2  # of the stack one slice; all else is on the chip
    (reduced,) = found.collectives
    assert reduced.kind == "all-reduce" and reduced.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert part_cycles(found, {"backbone": "/blocks/"}) == {"backbone": 1500.0, "rest": 500.0}


CHAINED_TEXT = """HloModule m, num_partitions=4

%part (p0: bf16[8,16], p1: bf16[32,16], p2: bf16[64,16]) -> (bf16[64,16], bf16[8,16], bf16[32,16]) {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  %p2 = bf16[64,16]{1,0} parameter(2)
  %g = bf16[32,16]{1,0} all-gather(%p0), channel_id=7, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
  %n = bf16[64,16]{1,0} negate(%p2)
  ROOT %t = (bf16[64,16]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) tuple(%n, %p0, %g)
}

ENTRY %main (x: bf16[8,16], y: bf16[32,16], z: bf16[64,16]) -> bf16[64,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = bf16[32,16]{1,0} parameter(1)
  %z = bf16[64,16]{1,0} parameter(2)
  %a = (bf16[64,16]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%x, %y, %z), kind=kLoop, calls=%part
  %a0 = bf16[64,16]{1,0} get-tuple-element(%a), index=0
  %b = (bf16[64,16]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%x, %y, %a0), kind=kLoop, calls=%part
  ROOT %b0 = bf16[64,16]{1,0} get-tuple-element(%b), index=0
}
"""


def test_a_collective_behind_several_fusions_moves_its_bytes_once():
    found = Program(CHAINED_TEXT).cost()
    (gathered,) = found.collectives
    assert gathered.kind == "all-gather" and gathered.bytes == 2 * 32 * 16
    assert found.bytes == 2 * 16 * ((8 + 32) + 2 * (64 + 64))


GROUPED_TEXT = """HloModule m

ENTRY %main (n: s32[1], x: bf16[64,32], w: bf16[12,32,16]) -> bf16[64,16] {
  %n = s32[1]{0} parameter(0)
  %x = bf16[64,32]{1,0} parameter(1)
  %w = bf16[12,32,16]{2,1,0} parameter(2)
  ROOT %ragged-dot-none.1 = bf16[64,16]{1,0} custom-call(%n, %x, %w), custom_call_target="tpu_custom_call"
}
"""


def test_a_grouped_product_reads_the_experts_of_its_own_layer():
    """Of 8 experts 4 are on the chip, and the stack is of 3 layers: half of the rows, a third of the matrices."""
    found = Program(GROUPED_TEXT, experts=(8, 4)).cost()
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
    (found,) = Program("HloModule m, num_partitions=4\n\n" + body).cost().collectives
    assert found.groups == groups and found.bytes == 32


def test_a_decode_counts_what_arithmetic_says():
    """The program that runs, compiled for CPUs: all products of all steps, within the chunks' overlap."""
    lm = toy()
    work = Workload("decode", 4, prompt=16, response=8, steps=4)
    program = make_lowerable(lm.config, work, make_mesh("1,1,1"))
    assert program.steps == 4
    found = Program(program.compile().as_text()).cost()
    least = estimate_cost(lm.config, work, (1, 1, 1)).flops
    assert not found.unknown_loops
    assert 1 <= found.flops / 4 / least < 1.1


def test_analytic_by_hand():
    c = PRESETS["llada-8b"]
    found = estimate_cost(c, Workload("decode", 8, prompt=128, response=512), (4, 1, 2))
    layer = 4 * 4096**2 + 3 * 4096 * 12288
    wanted = 2 * 640 * 32 * layer + 4 * 640**2 * 4096 * 32 + 2 * 512 * 4096 * 126464
    policy = 2 * 512 * (8 * 64 + 64 * 64 + 2 * 64)
    assert found.flops == pytest.approx(2 * (wanted / 2 + policy))
    assert found.weights == pytest.approx((32 * layer + 2 * 4096 * 126464) * 2 / 2)
    mini = estimate_cost(PRESETS["llada2-mini"], Workload("decode", 1), (1, 1, 1))
    assert 30e9 < mini.weights < 34e9  # 16 B parameters
    assert (
        estimate_cost(PRESETS["llada2-mini"], Workload("decode", 1), (1, 1, 4)).weights
        == mini.weights / 4
    )


def test_meshes_divide_heads_and_vocabulary():
    shapes = candidate_meshes(PRESETS["llada2-mini"], 8)
    assert {t for *_, t in shapes} == {1, 2, 4}  # four key/value heads
    assert all(d * f * t == 8 for d, f, t in shapes)
    assert {t for *_, t in candidate_meshes(PRESETS["llada-8b"], 64)} == {1, 2, 4, 8, 16, 32}


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
        ("v9x:2x2", "there is no topology 'v9x:2x2'; known are v5e, v5p, v6e"),
        ("v5e", "there is no topology 'v5e'; known are"),
        ("v5e-7", "there is no slice 'v5e-7'; there are v5e-1, v5e-4, v5e-8"),
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
        with pytest.raises(UserError, match="known are gpu:a100, gpu:h100, gpu:h200, gpu:b200"):
            parse_device(text)


def test_link_times():
    assert link_seconds("all-reduce", 8e9, 8, 1, True, 50e9) == pytest.approx(
        2 * 7 / 8 * 8e9 / 100e9
    )
    assert link_seconds("all-gather", 8e9, 4, 2, False, 50e9) == pytest.approx(3 / 4 * 8e9 / 100e9)
    assert link_seconds("all-reduce", 8e9, 1, 1, True, 50e9) == 0


def test_a_gpu_by_arithmetic_and_its_exit_status(capsys, tmp_path):
    file, page = tmp_path / "rows.json", tmp_path / "rows.md"
    options = ("--program=decode,align,rollout", f"--json={file}", f"--markdown={page}")
    assert plan.run(arguments("--preset=llada-8b", "--device=gpu:h200", *options)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("llada-8b decode on gpu:h200, mesh 1,1,1, batch 1: fits, ")
    rows = json.loads(file.read_text())["rows"]
    assert [r["program"] for r in rows] == ["decode", "align", "rollout"]
    assert rows[0]["seconds"]["compute"] == pytest.approx(rows[0]["flops"] / 989e12)
    assert "| decode | 1 | 1,1,1 | yes |" in page.read_text()
    assert plan.run(arguments("--preset=llada2-flash", "--device=gpu:h200")) == 1
    assert "does not fit" in capsys.readouterr().out


def test_the_largest_batch_fits_and_its_double_does_not():
    config, chip = PRESETS["llada-8b"], CHIPS["v6e"]
    work = Workload("decode", 1)
    most = planner.largest_batch(config, work, chip, 8)
    fits = [
        any(
            planner.predict_seconds(config, dataclasses.replace(work, batch=batch), chip, s)[
                "memory"
            ]["total"]
            < 0.85 * chip.memory
            for s in candidate_meshes(config, 8)
            if batch % (s[0] * s[1]) == 0
        )
        for batch in (most, 2 * most)
    ]
    assert fits == [True, False]


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--preset=llama", "--device=gpu:h200"), "there is no preset 'llama'; there are llada-8b"),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--program=decoed"),
            "there is no program 'decoed'",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--batch=0"),
            "the batch '0' must be positive whole numbers",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--program=align", "--train-batch=0"),
            "train_batch must be at least 1",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200:4", "--mesh=1,8,1"),
            "mesh 1,8,1 is of 8 devices, but there are 4",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--mesh=8"),
            "mesh '8' must be three positive sizes",
        ),
        (("--preset=llada-8b", "--topology=v5z-8"), "there is no topology 'v5z-8'"),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--gen-length=9999"),
            "exceed the model's 4096 positions",
        ),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises(UserError) as error:
        plan.run(arguments(*argv))
    assert message in str(error.value)


def test_without_the_compiler_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        plan.run(arguments("--preset=llada-8b", "--topology=v5e-8"))
    assert (
        str(error.value)
        == 'the TPU compiler is missing; it comes with the extra [plan]: pip install "xflow-jax[plan]"'
    )


@pytest.mark.slow
@needs_libtpu
def test_the_tpu_compiler_and_the_arithmetic_agree(monkeypatch):
    """A small model compiled for four chips: FLOPs near the arithmetic, no weight copied, no gathered head."""
    config = dataclasses.replace(
        TOY, d_model=512, n_layers=4, n_heads=4, mlp_hidden_size=1024, embedding_size=4096
    )
    monkeypatch.setitem(PRESETS, "small", config)
    args = (
        "--preset=small",
        "--mesh=1,1,4",
        "--prompt-length=64",
        "--gen-length=64",
        "--steps=4",
        "--batch=4",
    )
    rows = list(planner.plan_rows(prepared(*args, "--topology=v5e:2x2"), []))
    (row,) = rows
    assert row["fits"] and row["compiled"] and not row["unknown_loops"]
    assert 0.99 < row["flops"] / row["analytic_flops"] < 1.1
    kinds = {c["kind"]: c for c in row["collectives"]}
    assert kinds["all-reduce"]["count"] >= 2 * config.n_layers
    assert kinds.get("all-gather", {"bytes": 0})["bytes"] < 1e6  # of the belief alone


def prepared(*argv):
    args = arguments(*argv)
    args.preset, args.program, args.topology = [args.preset], [args.program], [args.topology]
    args.batch = [int(args.batch)]
    return args


@pytest.mark.slow
@needs_libtpu
def test_a_topology_that_the_compiler_does_not_know():
    with pytest.raises(UserError, match="the TPU compiler does not know the topology 'v5e:3x7': "):
        list(
            planner.plan_rows(prepared("--preset=llada-8b", "--topology=v5e:3x7", "--batch=1"), [])
        )


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        (
            "Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded",
            (18.5, 15.75),
        ),
        ("required for HLO temporaries (16.09G) exceeds available HBM (15.75G).", (16.09, 15.75)),
        ("the compiler ran out of its own memory", None),
    ],
)
def test_the_compilers_words_for_too_large(message: str, memory: tuple[float, float] | None):
    wanted = memory and {"total": memory[0] * 2**30, "capacity": memory[1] * 2**30}
    assert planner._refused(message) == wanted
