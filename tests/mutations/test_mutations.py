"""Every bug of the table applies, and the default tests find all of them."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest

from tests.mutations import runner
from tests.mutations.table import ROOT, Mutation, StalePatch, read_mutations

MUTATIONS = read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies_and_names_tests_that_exist(mutation):
    text = (ROOT / mutation.file).read_text()
    mutated = mutation.apply(text)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))
    assert mutation.tests
    for test in mutation.tests:
        file, _, function = test.partition("::")
        found = re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE)
        assert not function or found, test


def test_there_are_enough_and_no_two_are_equal():
    assert len(MUTATIONS) >= 60
    assert len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)


def test_a_stale_patch_is_named():
    stale = dataclasses.replace(MUTATIONS[0], old="no such text")
    with pytest.raises(StalePatch, match=f"{stale.name} occurs 0 times in {stale.file}, but it"):
        runner.check_mutations([stale], print)
    with pytest.raises(ValueError, match="there is no mutation 'x' in patches.toml"):
        read_mutations(["x"])


@pytest.mark.slow
def test_a_result_needs_a_test_that_passes_without_the_bug():
    """A harmless change survives. A test that fails in any case proves nothing."""
    file, tests = "xflow_jax/evaluation/statistics.py", ("tests/evaluation/test_statistics.py",)
    harmless = Mutation("a", file, "if n == 0:", "if 0 == n:", tests)
    absent = dataclasses.replace(harmless, name="b", tests=("tests/no_such_file.py",))
    states = [outcome.state for outcome in runner.check_mutations([harmless, absent], print)]
    assert states == ["survived", "broken"]


@pytest.mark.slow
def test_every_mutation_is_killed():
    outcomes = runner.check_mutations(MUTATIONS, print)
    states = [o.state for o in outcomes]
    alive = [
        f"{o.name}: {o.state} {o.by}" for o in outcomes if o.state not in ("killed", "skipped")
    ]
    assert not alive, f"{len(alive)} of {len(outcomes)} mutations were not killed: {alive}"
    assert states.count("killed") >= 0.95 * len(states)
