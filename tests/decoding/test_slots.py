"""Rows at their own block and step: the tokens of `generate`, whatever the neighbours do."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.family_helpers import golden_lm
from tests.helpers import eight, random_prompts, toy
from tests.llada2_helpers import toy2
from xflow_jax.decoding.cache_options import CacheOptions
from xflow_jax.decoding.generate import generate, make_decode_config
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.numbers import row_numbers
from xflow_jax.decoding.rules.own_loop import adapt_loop
from xflow_jax.decoding.rules.parsing import parse_rule
from xflow_jax.decoding.slot_rows import Lane, make_row
from xflow_jax.decoding.slots import admit, init_slots, run_passes
from xflow_jax.decoding.stream import slot_config, stream
from xflow_jax.errors import UserError
from xflow_jax.lm import LM
from xflow_jax.models.logical_axes import shardings
from xflow_jax.parallel import make_mesh

RULE = Threshold(tau=0.4)
MODELS = {
    "bidirectional": toy,
    "block-causal": toy2,
    "shifted": functools.partial(golden_lm, "fastdllm2_tiny"),  # block-causal too
}
NO_CACHE = CacheOptions()
CACHES = {
    "prompt": CacheOptions("prompt", refresh=2, prompt_every=2),
    "prefix": CacheOptions("prefix", refresh=3),
    "dual": CacheOptions("dual"),
    "all options": CacheOptions("dual", refresh=2, window=3, prompt_every=2),
}
PROMPTS = random_prompts([5, 17, 2], 3)
RULES = [
    pytest.param("threshold:tau=0.3", marks=pytest.mark.slow),
    "flow:power=2,early_exit=true",
    pytest.param("flow:reedit=always,floor=0.6", marks=pytest.mark.slow),
    pytest.param("mask", marks=pytest.mark.slow),
    pytest.param("mask:order=random,temperature=0.7", marks=pytest.mark.slow),
    pytest.param("mask:schedule=eps,order=origin", marks=pytest.mark.slow),
    pytest.param("klass", marks=pytest.mark.slow),
    pytest.param("edit:tau=0.5,tau_edit=0.3", marks=pytest.mark.slow),
    pytest.param("dmax", marks=pytest.mark.slow),
    pytest.param("softmask", marks=pytest.mark.slow),
    pytest.param("mask:cfg_scale=0.5", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "family",
    [
        "bidirectional",
        pytest.param("shifted", marks=pytest.mark.slow),
        pytest.param("block-causal", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("text", RULES)
def test_a_stream_ends_with_the_tokens_of_generate(family, text):
    lm, rule = MODELS[family](), parse_rule(text)[1]
    options = {"gen_length": 16, "steps": 8, "block_length": 4, "seed": 2**32 - 1}
    prompts = [*PROMPTS, PROMPTS[0]]
    states = list(stream(lm, prompts, rule, every=3, **options))
    expected = generate(lm, prompts, rule, **options)
    assert np.array_equal(states[-1].tokens, expected.tokens)
    np.testing.assert_allclose(states[-1].progress, expected.progress, atol=1e-5)
    assert np.array_equal(states[-1].forward_passes, expected.forward_passes)
    assert states[0].active.all() and not states[-1].active.any()
    assert all((a.forward_passes <= b.forward_passes).all() for a, b in itertools.pairwise(states))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["threshold:tau=0.3", "flow", "mask:cfg_scale=0.5"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model", [toy, functools.partial(golden_lm, "dream_tiny")])
def test_a_stream_with_a_cache_ends_with_the_tokens_of_generate(model, cache, rule):
    lm, rule = model(), parse_rule(rule)[1]
    options = {"steps_per_block": 3, "block_length": 4, **dataclasses.asdict(CACHES[cache])}
    *_, last = stream(lm, PROMPTS, rule, 16, **options)
    expected = generate(lm, PROMPTS, rule, 16, **options)
    assert np.array_equal(last.tokens, expected.tokens)
    assert np.array_equal(last.forward_passes, expected.forward_passes)


class Bench:
    """A lane of a model, which decodes requests in given slots."""

    def __init__(
        self,
        lm: LM,
        slots: int = 6,
        prompt_length: int = 32,
        rule: Rule = RULE,
        cache: CacheOptions = NO_CACHE,
    ) -> None:
        self.lm, self.rule, self.cache = lm, rule, cache
        # Twelve steps are more than any request takes.
        config = self.config(rule, 16, steps=12)
        numbers = row_numbers(rule, lm.config)
        self.lane = Lane.of(config, slots, prompt_length, numbers)
        self.slots = init_slots(lm, rule, self.lane)
        self.live = np.ones(slots, bool)

    def config(self, rule: Rule, gen_length: int, steps: int):
        config = make_decode_config(self.lm, 32, gen_length, 1, steps, 4)
        return adapt_loop(rule, slot_config(self.lm, rule, config, self.cache.within(config)))

    def admit(
        self,
        slot: int,
        prompt: list[int],
        rule: Rule | None = None,
        gen_length: int = 16,
        steps: int = 2,
        seed: int = 0,
    ) -> None:
        rule = rule or self.rule
        row = make_row(
            self.lane, self.lm.config.pad_id, prompt, rule,
            self.config(rule, gen_length, steps), seed,
        )  # fmt: skip
        parts = (self.lm.model, self.lm.params, self.rule, self.lane, self.slots, row)
        with self.lm.scope():
            self.slots = admit(*parts, jnp.int32(slot))

    def run(self, passes: int = 1):
        parts = (self.lm.model, self.lm.params, self.rule, self.lane, self.slots, self.live)
        with self.lm.scope():
            self.slots, snapshot = run_passes(*parts, passes)
        return jax.tree.map(np.asarray, snapshot)

    def finish(self, slot: int):
        """Returns the slot's part of the last snapshot."""
        while True:
            snapshot = self.run()
            if not snapshot.rows[slot, 2]:
                return jax.tree.map(lambda x: x[slot], snapshot)


def equal(a, b) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("bidirectional", CACHES["all options"]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("bidirectional", NO_CACHE),
                ("bidirectional", CACHES["prompt"]),
                ("bidirectional", CACHES["prefix"]),
                ("block-causal", NO_CACHE),
                ("shifted", NO_CACHE),
            ]
        ),
    ],
)
def test_neighbours_change_nothing(family, cache):
    """Rows of several lengths begin at different times, and one of them twice."""
    bench = Bench(MODELS[family](), cache=cache)
    mine = random_prompts([11], 8)[0]
    bench.admit(2, mine, steps=3)
    alone = bench.finish(2)
    rng = np.random.default_rng(0)
    others = random_prompts(rng.integers(1, 30, 12).tolist(), 9)
    for slot in (0, 1, 4):
        bench.admit(slot, others.pop(), Threshold(tau=0.2 * slot), int(rng.choice([4, 8, 16])))
    bench.run(2)
    bench.admit(5, mine, steps=3)
    for slot in (0, 3):  # one joins in the middle, and one is replaced
        bench.run()
        bench.admit(slot, others.pop(), Threshold(tau=0.9), 16, steps=4)
    assert equal(bench.finish(5), alone)
    expected = generate(
        bench.lm, [mine], RULE, 16, steps_per_block=3, block_length=4, **dataclasses.asdict(cache)
    )
    assert np.array_equal(alone.tokens[:16] & 0xFFFFFF, expected.tokens[0])
    assert alone.rows[1] == expected.forward_passes[0] > 4
    assert len({tuple(row) for row in (np.asarray(bench.slots.state.tokens)).tolist()}) > 4


@pytest.mark.slow
@pytest.mark.parametrize("cache", [NO_CACHE, *CACHES.values()])
def test_rows_have_their_own_numbers_lengths_and_steps(cache):
    lm = toy()
    bench = Bench(lm, cache=cache)
    assert bench.lane.numbers == ("tau",)
    cases = [(0.1, 8, 3), (0.3, 16, 4), (0.95, 12, 3)]
    for slot, (tau, length, steps) in enumerate(cases):
        bench.admit(slot, PROMPTS[slot], Threshold(tau=tau), length, steps)
        bench.run(slot)  # so that each begins at another time
    for slot, (tau, length, steps) in enumerate(cases):
        row = bench.finish(slot)
        expected = generate(
            lm,
            [PROMPTS[slot]],
            Threshold(tau=tau),
            length,
            steps_per_block=steps,
            block_length=4,
            **dataclasses.asdict(cache),
        )
        tokens = row.tokens[:length] & 0xFFFFFF
        assert np.array_equal(tokens, expected.tokens[0])
        assert row.rows[1] == expected.forward_passes[0]


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
def test_no_pass_copies_the_cache(cache):
    """The compiled program holds no copy of all keys or values."""
    bench = Bench(toy(), slots=5, cache=dataclasses.replace(CACHES[cache], refresh=0, window=0))
    parts = (bench.lm.model, bench.lm.params, bench.rule, bench.lane, bench.slots, bench.live)
    with bench.lm.scope():
        text = run_passes.lower(*parts, 2).compile().as_text()
    shape = ",".join(map(str, bench.slots.cache["blocks"]["k"].shape))
    assert f"f32[{shape}]" in text
    assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", text)


def test_a_row_that_is_given_up_stops():
    bench = Bench(toy())
    bench.admit(0, PROMPTS[0], Threshold(tau=1.0), steps=4)
    bench.run()
    bench.live[0] = False
    assert bench.run().rows[0].tolist() == [0, 1, 0, 1]
    bench.live[0] = True
    assert bench.run().rows[0].tolist() == [0, 1, 0, 1]


def test_a_row_that_is_over_stays_while_others_begin_blocks():
    bench = Bench(toy(), slots=2, prompt_length=4, rule=parse_rule("flow:power=2")[1])
    bench.admit(0, PROMPTS[2], gen_length=4, steps=2)
    bench.admit(1, PROMPTS[2], gen_length=16, steps=4)
    over = bench.finish(0)
    assert over.levels[:4, 0].min() < 255  # the last block is never committed
    bench.finish(1)
    assert np.array_equal(bench.run().levels[0], over.levels)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("threshold", ("tau",)),
        ("mask", ()),
        ("mask:threshold=0.5,temperature=0.5", ("threshold",)),
        ("flow:jump=0.4", ("power", "jump", "creep", "reedit_margin", "settled", "reedit_above",
                           "sure")),
    ],
)  # fmt: skip
def test_numbers_that_a_row_can_have(text, names):
    assert set(row_numbers(parse_rule(text)[1], toy().config)) >= set(names)
    assert "temperature" not in row_numbers(parse_rule(text)[1], toy().config)


def test_what_slots_cannot_do():
    with pytest.raises(UserError, match="llada2 is block-causal, so its cache is exact"):
        stream(toy2(), PROMPTS, RULE, 16, block_length=4, cache="dual")
    bench = Bench(toy(), prompt_length=4)
    with pytest.raises(UserError, match="the prompt has 5 tokens, but there is room for 4"):
        bench.admit(0, PROMPTS[0])
    with pytest.raises(UserError, match="exceeds 16 positions with 12 steps"):
        bench.admit(0, [1], gen_length=20)


def on_mesh(lm: LM, spec: str) -> LM:
    """Puts a model on a mesh."""
    mesh = make_mesh(spec)
    params = jax.device_put(lm.params, shardings(lm.params, mesh, lm.config.family))
    return dataclasses.replace(lm, params=params, mesh=mesh)


@eight
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cache"),
    [*((family, NO_CACHE) for family in MODELS), ("bidirectional", CACHES["all options"])],
)
@pytest.mark.parametrize("count", [8, 3])
def test_a_mesh_changes_no_token(family, cache, count):
    """Also with a number of rows that the mesh does not divide."""
    rule, options = Threshold(tau=0.3), {"steps_per_block": 2, "block_length": 4}
    options |= dataclasses.asdict(cache)
    prompts = random_prompts([5, 17, 2, 9, 12, 1, 30, 3], 3)[:count]
    expected = generate(MODELS[family](), prompts, rule, 16, **options)
    lm = on_mesh(MODELS[family](), "2,2,2" if family == "bidirectional" else "4,1,2")
    *_, last = stream(lm, prompts, rule, 16, **options)
    assert np.array_equal(last.tokens, expected.tokens)
    assert np.array_equal(last.forward_passes, expected.forward_passes)


def test_a_lane_is_hashable():
    lane = Bench(toy()).lane
    assert hash(lane) == hash(dataclasses.replace(lane))
