"""Live decodes: they are the decoder's, and the loss is taken at their states."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.family_helpers import golden_lm
from tests.helpers import apply, toy
from xflow_jax.decoding.decode import decode, embed
from xflow_jax.decoding.rules.parsing import parse_rule_ranges
from xflow_jax.decoding.state import DecodeConfig
from xflow_jax.errors import UserError
from xflow_jax.training import losses, trajectory
from xflow_jax.training.alignment import AlignmentConfig
from xflow_jax.training.alignment_program import begin_trajectories
from xflow_jax.training.alignment_step import make_align_step
from xflow_jax.training.block_copies import decode_rows
from xflow_jax.training.trajectory import (
    TrajectoryConfig,
    begin_decodes,
    parse_makers,
)
from xflow_jax.training.trajectory_loss import make_trajectory_loss

B, P, N, PASSES = 4, 5, 8, 3
ZERO = optax.set_to_zero()
FLOW, DRAWN = "flow:reedit=always,jump=0.2", "flow:jump=0.1..0.9,creep=0.1..0.4"


def config_of(*rules, **more):
    block_length = more.pop("block_length", 0)
    names = ("error", "revealed", "most_wrong")
    numbers = {name: more.pop(name) for name in names if name in more}
    options = TrajectoryConfig(rules=rules, block_lengths=(block_length,), passes=PASSES, **numbers)
    return AlignmentConfig(
        prompt_length=P, gen_length=N, batch_size=B, states="trajectory", trajectory=options,
        steps=9, chunk=16, **more,
    )  # fmt: skip


def batch_of(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    mask = np.ones((B, P), bool)
    mask[1, :3] = False
    return {
        "prompt": jnp.asarray(rng.integers(0, 20, (B, P)), jnp.int32),
        "prompt_mask": jnp.asarray(mask),
        "response": jnp.asarray(rng.integers(0, 20, (B, N)), jnp.int32),
    }


def start(lm, config, optimizer=ZERO):
    state = trajectory.TrainState.create(lm.params, optimizer)
    return begin_trajectories(lm.config, config, state, lm.params)


@pytest.mark.parametrize(
    "rule, block_length",
    [
        (FLOW, 0),
        pytest.param("softmask", 4, marks=pytest.mark.slow),
        pytest.param("flow:jump=0.3,creep=0.2,early_exit=true", 4, marks=pytest.mark.slow),
        pytest.param("dmax", 0, marks=pytest.mark.slow),
    ],
)
def test_a_live_decode_is_a_decode(rule, block_length):
    """With constant parameters each pass of a row is a step of the decoder, in any block."""
    lm, config = toy(), config_of(rule, block_length=block_length)
    size = block_length or N
    decode_config = DecodeConfig(N, size, PASSES, early_exit=True, trace=True)
    batch, keys = batch_of(), jax.random.split(jax.random.key(0), B)
    parsed = parse_rule_ranges(rule)[0]
    final, trace = jax.jit(
        lambda: decode(
            lm.model, lm.params, parsed, decode_config, batch["prompt"], batch["prompt_mask"], keys
        )
    )()
    loss = jax.jit(make_trajectory_loss(lm.model, config))
    live = start(lm, config).live
    ended = np.zeros(B, bool)
    for step in range(decode_config.blocks * PASSES):
        _, (_, live) = loss(lm.params, batch, live, jax.random.key(step))
        for row in np.flatnonzero(~ended):
            # The row's own step of the schedule. Blocks that end early skip the steps left.
            taken = np.flatnonzero(np.asarray(trace.confidence)[:, row].max(-1) > 0)[step]
            wanted = np.asarray(trace.tokens[taken, row])
            block = np.arange(N) // size == taken // PASSES
            now = np.asarray(live[0].state.tokens[row])
            settled = np.asarray(trace.progress[taken - 1, row]) >= 1 if taken else ~block
            fresh = block & ~settled
            np.testing.assert_array_equal(now[fresh], wanted[fresh])
        for row in np.flatnonzero(~ended & np.asarray(live[0].over)):
            np.testing.assert_array_equal(live[0].state.tokens[row], final.tokens[row])
            assert step + 1 == int(final.forward_passes[row])
        ended |= np.asarray(live[0].over)
    assert ended.all()


EOS_AT = (8, 2, 8, 5)  # 8: a response without EOS


def causal_batch(lm) -> dict[str, jax.Array]:
    """Returns responses that end at EOS_AT."""
    batch = batch_of()
    response = np.asarray(batch["response"]) % 11 + 20  # away from special tokens
    prompt = jnp.asarray(np.asarray(batch["prompt"]) % 11 + 20)
    response = np.where(np.arange(N) < np.array(EOS_AT)[:, None], response, lm.config.eos_id)
    return batch | {"prompt": prompt, "response": jnp.asarray(response)}


def causal_config(*rules, **more):
    config = config_of(*rules, **more)
    options = dataclasses.replace(config.trajectory, block_lengths=(0,))
    return dataclasses.replace(config, trajectory=options, block_length=4)


def test_blocks_of_all_rows_begin_at_the_same_places():
    lm = golden_lm("sdar_tiny")
    batch = causal_batch(lm)
    moved = decode_rows(batch, 4, lm.config.eos_id)
    assert moved["response"].shape == moved["fill"].shape == (B, 12)
    for row, lengths in enumerate((5, 2, 5, 5)):
        shared = lengths % 4
        before = np.concatenate([batch["prompt"][row, P - lengths :], batch["response"][row]])
        text = np.concatenate([moved["prompt"][row], moved["response"][row]])
        real = np.concatenate([moved["prompt_mask"][row], np.ones(12, bool)])
        first = P - (lengths - shared)
        assert real.tolist() == [False] * first + [True] * (P + 12 - first)
        np.testing.assert_array_equal(text[first : first + len(before)], before)
        assert (text[first + len(before) :] == lm.config.eos_id).all()
        end = shared + min(EOS_AT[row], N - 1)
        wanted = [shared <= place <= end // 4 * 4 + 3 for place in range(12)]
        assert moved["fill"][row].tolist() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("rule", [FLOW, "flow:jump=0.3,creep=0.2,early_exit=true"])
def test_the_blocks_of_a_block_causal_model_decode_at_once(rule):
    """With constant parameters each is the last block of a decode behind the clean target."""
    lm, config = golden_lm("sdar_tiny"), causal_config(rule)
    batch, parsed = causal_batch(lm), parse_rule_ranges(rule)[0]
    loss = jax.jit(make_trajectory_loss(lm.model, config))
    live, states = start(lm, config).live, []
    for step in range(PASSES):
        _, (metrics, live) = loss(lm.params, batch, live, jax.random.key(step))
        states.append(live[0])
    assert metrics["ended"] == 1 and live[0].over.all()
    run, keys = jax.jit(decode, static_argnums=(0, 2, 3)), jax.random.split(jax.random.key(0), 1)
    fill = np.asarray(live[0].fill).reshape(B, 3, 4)
    seen = 0
    for row in range(B):
        prompt = np.asarray(batch["prompt"][row])[np.asarray(batch["prompt_mask"][row])]
        text = np.concatenate([prompt, batch["response"][row]])
        for block in range(3):
            here = np.flatnonzero(fill[row, block])
            if not here.size:  # no decode: the response ended before
                continue
            begin = len(prompt) // 4 * 4 + 4 * block + here[0]
            # The decode fills the rest of this block, and a few positions of the next one.
            left, mask = (
                np.pad(x, (P + 12 - begin, 0))[None] for x in (text[:begin], np.ones(begin, bool))
            )
            decode_config = DecodeConfig(
                len(here), 4, PASSES, early_exit=True, trace=True, block_causal=True
            )
            final, _ = run(lm.model, lm.params, parsed, decode_config, left, mask, keys)
            ours = np.asarray(states[-1].state.tokens).reshape(B, 3, 4)[row, block, here]
            np.testing.assert_array_equal(ours, final.tokens[0, : len(here)])
            passes = 1 + next(i for i, s in enumerate(states) if s.over.reshape(B, 3)[row, block])
            assert passes == int(final.forward_passes[0])
            seen += 1
    assert seen == 10


def test_only_blocks_under_way_count_in_the_loss():
    lm, config = golden_lm("sdar_tiny"), causal_config(FLOW, freeze_embedding=False)
    batch, loss = causal_batch(lm), jax.jit(make_trajectory_loss(lm.model, config))
    _, (_, (live,)) = loss(lm.params, batch, start(lm, config).live, jax.random.key(0))
    over = np.asarray(live.over).reshape(B, 3).copy()
    over[0, 0] = True
    live = dataclasses.replace(live, over=jnp.asarray(over.ravel()))
    ours, (_, (after,)) = loss(lm.params, batch, (live,), jax.random.key(1))
    rows = decode_rows(batch, 4, lm.config.eos_id)
    x = live.state.x.reshape(B, 12, -1)
    total, count = 0.0, 0
    for block in range(3):
        # The clean text up to the block, then its states. Nothing attends to what is behind.
        tokens = jnp.concatenate([rows["prompt"], rows["response"]], axis=1)
        clean = apply(lm.model, lm.params, tokens, method="embed")
        at = slice(P + 4 * block, P + 4 * block + 4)
        inputs = clean.at[:, at].set(x[:, 4 * block : 4 * block + 4])
        real = jnp.concatenate([rows["prompt_mask"], jnp.ones((B, 12), bool)], axis=1)
        number = (jnp.arange(P + 12) - P) // 4
        allowed = (number[None, :] <= number[:, None])[None]
        hidden = apply(lm.model, lm.params, inputs, real, allowed=allowed, method="hidden")
        logits = apply(lm.model, lm.params, hidden[:, at], method="head")
        nll = losses.cross_entropy(logits, rows["response"][:, 4 * block : 4 * block + 4])
        counted = np.asarray(live.fill).reshape(B, 3, 4)[:, block] & ~over[:, block, None]
        total, count = total + float(nll[counted].sum()), count + counted.sum()
    np.testing.assert_allclose(ours, total / count, rtol=1e-4)
    # A block that is over stays as it is.
    np.testing.assert_array_equal(after.state.x[0], live.state.x[0])
    assert np.abs(after.state.x - live.state.x)[1:].max() > 0.01


def test_the_loss_is_the_cross_entropy_at_the_states_as_they_are():
    lm, config = toy(), config_of(FLOW, error=0.5, freeze_embedding=False)
    batch, loss = batch_of(), make_trajectory_loss(lm.model, config)
    state = start(lm, config)
    _, (_, live) = jax.jit(loss)(lm.params, batch, state.live, jax.random.key(0))
    live = (dataclasses.replace(live[0], over=jnp.zeros(B, bool)),)
    x = live[0].state.x
    assert float(jnp.abs(x - x[:1, :1]).max()) > 0.1  # the first pass has moved them

    def plain(params):
        variables = {"params": params}
        prompt = lm.model.apply(variables, batch["prompt"], method="embed")
        mask = jnp.concatenate([batch["prompt_mask"], jnp.ones((B, N), bool)], axis=1)
        hidden = lm.model.apply(variables, jnp.concatenate([prompt, x], 1), mask, method="hidden")[
            :, P:
        ]
        logits = lm.model.apply(variables, hidden, method="head")
        table = jax.lax.stop_gradient(params["wte"]["embedding"])
        x_pred = jax.nn.softmax(logits) @ table
        error = jnp.sum((x_pred - table[batch["response"]]) ** 2, axis=-1)
        return jnp.mean(losses.cross_entropy(logits, batch["response"]) + 0.5 * error)

    ours, grads = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, live, jax.random.key(1))[0]))(
        lm.params
    )
    wanted, wanted_grads = jax.jit(jax.value_and_grad(plain))(lm.params)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    chex.assert_trees_all_close(grads, wanted_grads, rtol=1e-3, atol=1e-5)


def test_a_new_request_takes_the_place_of_a_decode_that_is_over():
    lm, config = toy(), config_of(DRAWN)
    loss = jax.jit(make_trajectory_loss(lm.model, config))
    first, second = batch_of(0), batch_of(1)
    _, (_, live) = loss(lm.params, first, start(lm, config).live, jax.random.key(0))
    over = jnp.asarray([True, False, True, False])
    live = (dataclasses.replace(live[0], over=over),)
    _, (metrics, after) = loss(lm.params, second, live, jax.random.key(1))
    for name in first:
        wanted = jnp.where(over[:, None], second[name], first[name])
        np.testing.assert_array_equal(after[0].batch[name], wanted)
    index = jnp.where(after[0].over, 0, jnp.where(over, 1, 2))  # 0: the block has ended
    np.testing.assert_array_equal(after[0].index[:, 0], index)
    for name, low, high in (("jump", 0.1, 0.9), ("creep", 0.1, 0.4)):
        old, new = np.asarray(live[0].numbers[name]), np.asarray(after[0].numbers[name])
        np.testing.assert_array_equal(old[~over], new[~over])  # a decode keeps its numbers
        assert np.all(old[over] != new[over]) and len(np.unique(new)) == B
        assert new.min() >= low and new.max() <= high
    assert {"loss", "state_nll", "right", "ended"} <= metrics.keys()


def test_decodes_begin_with_a_share_of_their_target():
    lm, batch = toy(), batch_of()
    (maker,) = parse_makers([DRAWN], lm.config)
    key, mask_id = jax.random.key(3), lm.config.mask_id
    args = maker, decode_rows(batch, 0, lm.config.eos_id), key, lm.params, mask_id
    empty, some = begin_decodes(*args), begin_decodes(*args, (0.3, 0.7))
    np.testing.assert_array_equal(empty.state.tokens, mask_id)
    stands = np.asarray(some.state.t == 1)
    assert np.all(stands | np.asarray(some.state.t == 0)) and 0.1 < stands.mean() < 0.9
    tokens = jnp.where(stands, batch["response"], mask_id)
    np.testing.assert_array_equal(some.state.tokens, tokens)
    np.testing.assert_array_equal(some.state.x, embed(lm.params, tokens))
    chex.assert_trees_all_equal(empty.numbers, some.numbers)  # the draws of the rule are the same


@pytest.mark.parametrize(("most_wrong", "over"), [(1.0, False), (0.5, False), (0.2, True)])
def test_a_decode_that_has_left_its_target_is_over(most_wrong, over):
    """Two of eight tokens are wrong at first, and the pass writes a third one."""
    lm = toy()
    config = config_of("threshold:tau=1.0", most_wrong=most_wrong, revealed=(0.0, 0.0))
    loss = jax.jit(make_trajectory_loss(lm.model, config))
    batch = batch_of()
    (live,) = start(lm, config).live
    rows = decode_rows(batch, 0, lm.config.eos_id)
    live = dataclasses.replace(live, batch=rows, over=jnp.zeros(B, bool))
    wrong = jnp.where(jnp.arange(N) < 2, (batch["response"] + 1) % 20, lm.config.mask_id)
    t = jnp.broadcast_to((jnp.arange(N) < 2).astype(jnp.float32), (B, N))
    x = embed(lm.params, wrong)
    state = dataclasses.replace(live.state, tokens=wrong, t=t, x=x)
    live = dataclasses.replace(live, state=state)
    _, (_, (after,)) = loss(lm.params, batch, (live,), jax.random.key(0))
    np.testing.assert_array_equal(after.over, over)


@pytest.mark.slow
def test_groups_have_states_of_their_own_and_parts_change_no_row():
    lm, rules = toy(), (FLOW, "masked")
    batch = batch_of()
    states = []
    for accumulate in (1, 2):
        config = config_of(*rules, accumulate=accumulate)
        step = jax.jit(make_align_step(lm.model, optax.set_to_zero(), config))
        state, metrics = step(start(lm, config), batch, jax.random.key(0))
        assert {"state_nll", "masked_nll", "grad_norm"} <= metrics.keys()
        assert state.live[1] is None
        states.append(state.live[0])
    # Rows 0 and 2 belong to the rule. In two parts of two rows, rows 0 and 1 do.
    np.testing.assert_array_equal(states[0].batch["prompt"], batch["prompt"][::2])
    np.testing.assert_array_equal(states[1].batch["prompt"], batch["prompt"][:2])
    np.testing.assert_allclose(states[0].state.x[0], states[1].state.x[0], atol=1e-5)


@pytest.mark.parametrize(
    "rules, sentence",
    [
        (("flwo",), "there is no rule 'flwo', did you mean flow?"),
        (("mask:cfg_scale=1",), "has guidance, which needs a second pass"),
        (("flow:reedit=always,factor=-1..2",), "factor must be at least 0, not -1"),
        (("flow:jump=0.9..0.1",), "must be LOW..HIGH of a decimal number"),
        (("klass:history=1..3",), "must be LOW..HIGH of a decimal number"),
        (("flow:jump=0.5..1.5",), "jump must be between 0 and 1, not 1.5"),
        (("mask:temperature=0.1..0.9",), "has a range for a number that all rows share"),
    ],
)
def test_rules_that_make_no_states(rules, sentence):
    with pytest.raises(UserError) as error:
        parse_makers(rules, toy().config)
    assert sentence in str(error.value)


def test_a_rule_that_branches_by_its_number(tmp_path):
    source = """
import dataclasses
from xflow_jax.decoding import Action, TokenConstraints, static_field

@dataclasses.dataclass(frozen=True)
class Branching(TokenConstraints):
    tau: float = 0.5

    def __call__(self, belief, state, step):
        if self.tau > 0.7:
            return Action.unmask(step.candidates)
        return Action.unmask(step.candidates & (belief.confidence > self.tau))
"""
    file = tmp_path / "branching.py"
    file.write_text(source)
    parse_makers([f"{file}:Branching(tau=0.8)"], toy().config)
    with pytest.raises(UserError, match="decides by tau which program runs, so it takes no range"):
        parse_makers([f"{file}:Branching(tau=0.3..0.8)"], toy().config)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"rules": ()}, "trajectory.rules is empty"),
        ({"passes": 0}, "trajectory.passes is 0, but it must be at least 1"),
        ({"block_lengths": (4, 8, 16)}, "must be one length or 2, none of them negative"),
        ({"error": -1.0}, "trajectory.error is -1.0, but it must not be negative"),
        (
            {"revealed": (0.5, 0.1)},
            r"trajectory.revealed is \[0.5, 0.1\], but it must be two shares",
        ),
        (
            {"revealed": (0.5, 1.0)},
            r"trajectory.revealed is \[0.5, 1.0\], but it must be two shares",
        ),
        ({"most_wrong": 1.5}, "trajectory.most_wrong is 1.5, but it must be a share from 0 to 1"),
    ],
)
def test_impossible_options(options, sentence):
    with pytest.raises(UserError, match=sentence):
        TrajectoryConfig(**options)


def test_rules_that_do_not_divide_the_batch():
    with pytest.raises(UserError, match="the 3 rules of the trajectories do not divide batch_size"):
        config_of(FLOW, DRAWN, "masked")


def test_a_rule_with_times_of_its_own_makes_no_loss():
    with pytest.raises(UserError, match="has times of its own, which live decodes have not"):
        make_trajectory_loss(toy().model, config_of("mask:schedule=eps"))
