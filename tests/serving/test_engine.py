"""The engine without HTTP: caches, families and meshes give the tokens of `generate`."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from tests.helpers import eight, random_prompts, toy
from tests.llada2_helpers import toy2
from xflow_jax.decoding import CacheOptions, Threshold, admit, generate, run_passes
from xflow_jax.errors import UserError
from xflow_jax.serving.engine import Engine, EngineOptions
from xflow_jax.serving.lanes import Lengths, make_lengths, request_config
from xflow_jax.serving.ticket import Ticket

NO_CACHE, RULE = CacheOptions(), Threshold(tau=0.3)
DUAL = CacheOptions("dual", refresh=2, window=3)
COUNT, SLOTS = 20, 8


def make_tickets(engine: Engine, prompts: list[list[int]]) -> list[Ticket]:
    config = request_config(engine.lm, RULE, engine.lengths, 16, 8)
    kind = engine.kinds[0]
    return [Ticket(prompt, "rule", kind, RULE, config, 16) for prompt in prompts]


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Answers prompts, of which the second half comes once the first is under way."""
    tickets, begun = make_tickets(engine, prompts), threading.Event()
    tickets[0].notify = begun.set
    engine.submit(tickets[: len(tickets) // 2])
    assert begun.wait(300)
    engine.submit(tickets[len(tickets) // 2 :])
    assert engine.drain(300)
    assert all(ticket.error is None for ticket in tickets)
    return [ticket.state.tokens[: ticket.end].tolist() for ticket in tickets if ticket.state]


@eight
@pytest.mark.parametrize(
    ("model", "mesh", "cache"),
    [
        (toy, None, CacheOptions("prompt")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (toy, "2,1,2", DUAL),
                (toy, None, CacheOptions("prefix", refresh=2)),
                (toy, "2,2,2", NO_CACHE),
                (toy, "1,8,1", DUAL),
                (toy2, None, NO_CACHE),
            ]
        ),
    ],
)
def test_answers_are_those_of_generate(model, mesh, cache):
    """Without a compilation after the start, and without a mesh."""
    lm = model(mesh) if mesh else model()
    engine = Engine(lm, {"rule": RULE}, Lengths((16,), (32,), 4, SLOTS, cache), EngineOptions(1))
    engine.start()
    programs = admit._cache_size(), run_passes._cache_size()
    prompts = random_prompts(np.random.default_rng(1).integers(1, 33, COUNT).tolist())
    given = answers(engine, prompts)
    engine.stop()
    assert engine.failure is None
    assert (admit._cache_size(), run_passes._cache_size()) == programs
    options = {"steps": 8, "block_length": 4, **dataclasses.asdict(cache)}
    expected = generate(model(), prompts, RULE, 16, **options).tokens
    is_end = np.isin(expected, lm.config.stop_ids)
    ends = np.where(is_end.any(axis=1), is_end.argmax(axis=1), 16)
    assert given == [row[:end].tolist() for row, end in zip(expected, ends, strict=True)]


@eight
def test_slots_divide_over_the_mesh():
    lm, arguments = toy("2,2,2"), ([16], [32], 4)
    assert make_lengths(lm, *arguments, None, NO_CACHE).slots == 8
    assert make_lengths(lm, *arguments, 4, NO_CACHE).slots == 4
    with pytest.raises(UserError, match="^6 slots do not divide over the 4 parts .* Use 4 or 8.$"):
        make_lengths(lm, *arguments, 6, NO_CACHE)


def test_short_requests_fit_the_cache_of_their_lane():
    lengths = Lengths((16,), (32,), 4, SLOTS, CacheOptions("dual", refresh=4, window=6))
    config = request_config(toy(), RULE, lengths, 4, 2)
    assert (config.cache, config.refresh, config.window) == ("dual", 2, 4)
    for cache, message in [
        (CacheOptions("dual", refresh=5), "refresh 5 exceeds the 4 steps of a block"),
        (CacheOptions("dual", window=17), "window 17 exceeds the response of 16 tokens"),
        (CacheOptions("exact"), "llada attends to later blocks, so it has no exact cache"),
    ]:
        with pytest.raises(UserError, match=message):
            Engine(toy(), {"rule": RULE}, dataclasses.replace(lengths, cache=cache))
