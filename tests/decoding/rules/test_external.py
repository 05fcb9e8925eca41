"""Rules of the user's own, from files and modules."""

from __future__ import annotations

import os

import jax.numpy as jnp
import pytest

from tests.helpers import stub
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.external import load_rule_class, source_hash
from xflow_jax.decoding.rules.parsing import parse_rule, parse_rules
from xflow_jax.errors import UserError

RULE = """
from flax import struct
from xflow_jax.decoding import Action, TokenConstraints, select_highest, static_field

@struct.dataclass
class MyRule(TokenConstraints):
    tau: float = static_field(0.9)
    early_exit: bool = static_field(True)

    def __call__(self, belief, state, step):
        masked = step.candidates & (state.t < 1)
        best = select_highest(belief.confidence, masked, 1)
        return Action.unmask((masked & (belief.confidence >= self.tau)) | best)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rule.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("source", ["my_rule.py", "{folder}/my_rule.py", "my_rule"])
def test_an_external_rule_decodes_like_its_built_in_twin(folder, source):
    text = source.format(folder=folder) + ":MyRule(tau=0.3)"
    label, rule = parse_rule(text)
    assert label == text and rule.tau == 0.3 and not rule.revises
    lm, prompts = stub(), [[1, 2, 3], [4]]
    ours = generate(lm, prompts, Threshold(tau=0.3), 8, 8, block_length=4)
    mine = generate(lm, prompts, rule, 8, 8, block_length=4)
    assert jnp.array_equal(ours.tokens, mine.tokens)
    assert jnp.array_equal(ours.forward_passes, mine.forward_passes)


def test_a_file_is_loaded_once_until_it_changes(folder):
    first = load_rule_class("my_rule.py", "MyRule")
    assert load_rule_class("my_rule.py", "MyRule") is first
    (folder / "my_rule.py").write_text(RULE.replace("0.9", "0.8"))
    os.utime(folder / "my_rule.py", ns=(1, 1))
    assert load_rule_class("my_rule.py", "MyRule")().tau == 0.8


def test_rules_of_both_kinds_in_one_list(folder):
    rules = parse_rules(
        "mask,my_rule.py:MyRule(tau=0.5,early_exit=false),flow:power=4,commit=false"
    )
    labels = ["mask", "my_rule.py:MyRule(tau=0.5,early_exit=false)", "flow:power=4,commit=false"]
    assert list(rules) == labels
    assert not rules[labels[1]].early_exit


def test_versions_of_a_file_have_different_hashes(folder):
    before = source_hash(load_rule_class("my_rule.py", "MyRule"))
    (folder / "my_rule.py").write_text(RULE + "\n# changed\n")
    os.utime(folder / "my_rule.py", ns=(1, 1))
    assert source_hash(load_rule_class("my_rule.py", "MyRule")) != before
    assert source_hash(Threshold) is None


@pytest.mark.parametrize(
    ("text", "code", "sentence"),
    [
        ("nowhere.py:MyRule", None, "nowhere.py: there is no such file"),
        ("no.such.module:MyRule", None, "there is no rule and no module 'no.such.module'"),
        ("my_rule.py:Mine", None, "my_rule.py has no class Mine. It has MyRule."),
        ("my_rule.py:MyRule(tua=1)", None, "has no option 'tua', did you mean tau?"),
        ("my_rule.py:MyRule(tau)", None, "must look like my_rule.py:MyRule(option=value)"),
        ("my_rule.py:MyRule(tau=x)", None, 'tau is "x", but it must be a number'),
        ("my_rule.py:A", "class A:\n    pass\n", "A is no rule, it lacks early_exit"),
        ("my_rule.py:MyRul", None, "my_rule.py has no class MyRul, did you mean MyRule?"),
        ("my_rule.py", None, "must look like FILE.py:Class or FILE.py:Class(option=value)"),
        ("my_rule.py:MyRule(tau=1", None, "must look like FILE.py:Class"),
        ("my_rule.py:MyRule:tau=1", None, "must look like FILE.py:Class"),
        ("my_rule.py:A", "def A(:\n", "SyntaxError: invalid syntax, line 1"),
        ("my_rule.py:A", "x = 1 / 0\n", "its code fails with ZeroDivisionError: division by zero"),
        ("my_rule.py:A", "import nothing_here\n", "ModuleNotFoundError: No module named"),
        (
            "my_rule.py:MyRule",
            RULE.replace("@struct.dataclass", ""),
            "MyRule must be a frozen dataclass",
        ),
    ],
)
def test_mistakes_are_one_sentence(folder, text, code, sentence):
    if code is not None:
        (folder / "my_rule.py").write_text(code)
        os.utime(folder / "my_rule.py", ns=(7, hash(code) % 10**9))
    with pytest.raises(UserError) as error:
        parse_rule(text)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("return belief.margin", "AttributeError: 'Belief' object has no attribute 'margin'"),
        ("return masked if masked.any() else best", "TracerBoolConversionError"),
        ("return masked", "MyRule must return an Action, not"),
        ("return Action(best * 1.0, masked[:, :1], best)", "returned reset of bool [2, 1], but it"),
        (
            "return Action(best, best, best)",
            "returned a of bool [2, 8], but it must be float32 [2,",
        ),
    ],
)
def test_a_mistake_inside_a_rule_is_one_sentence(folder, line, sentence):
    before = "return Action.unmask((masked & (belief.confidence >= self.tau)) | best)"
    (folder / "my_rule.py").write_text(RULE.replace(before, line))
    os.utime(folder / "my_rule.py", ns=(3, hash(line) % 10**9))
    rule = parse_rule("my_rule.py:MyRule")[1]
    with pytest.raises(UserError) as error:
        generate(stub(), [[1, 2, 3], [4]], rule, 8, 8, block_length=4)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("my_rule.py: ")


def test_a_path_may_hold_spaces(folder):
    (folder / "my rules").mkdir()
    (folder / "my rules" / "one.py").write_text(RULE)
    label, rule = parse_rule("my rules/one.py:MyRule( tau = 0.4, early_exit = false )")
    assert label == "my rules/one.py:MyRule(tau=0.4,early_exit=false)" and rule.tau == 0.4
