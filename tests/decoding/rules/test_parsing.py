"""Rules and budgets as text."""

from __future__ import annotations

from fractions import Fraction

import jax
import pytest

from xflow_jax.decoding.policy import init_policy
from xflow_jax.decoding.policy_io import save_policy
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.rules.parsing import (
    RULES,
    parse_budget,
    parse_budgets,
    parse_rule,
    parse_rules,
)
from xflow_jax.errors import UserError
from xflow_jax.toml_config import field_types


def test_rules():
    assert parse_rule("flow") == ("flow", Flow())
    assert parse_rule("threshold: tau = 0.7") == ("threshold:tau=0.7", Threshold(tau=0.7))
    assert parse_rule("flow:power=4,commit=false,reedit_margin=none")[1] == Flow(
        power=4.0, commit=False, reedit_margin=None
    )
    rules = parse_rules("mask:order=entropy,temperature=0.5,flow:power=8,threshold")
    assert list(rules) == ["mask:order=entropy,temperature=0.5", "flow:power=8", "threshold"]
    assert rules["mask:order=entropy,temperature=0.5"] == MaskPrediction(
        order="entropy", temperature=0.5
    )


def test_options_in_the_text_override_defaults():
    defaults = (("logits_eos_inf", True),)
    assert parse_rule("mask", defaults)[1].logits_eos_inf
    assert not parse_rule("mask:logits_eos_inf=false", defaults)[1].logits_eos_inf
    assert parse_rule("flow", (*defaults, ("tau", 0.5)))[1] == Flow(logits_eos_inf=True)


def test_every_option_has_a_type():
    for cls in RULES.values():
        assert field_types(cls) and "needs_keys" not in field_types(cls)


def test_a_flow_takes_a_policy_from_its_file(tmp_path):
    save_policy(tmp_path / "policy.safetensors", init_policy(jax.random.key(0), width=8))
    assert parse_rule(f"flow:policy={tmp_path}/policy.safetensors")[1].policy.kappa_max == 50.0
    assert parse_rule("flow:policy=none")[1].policy is None


def test_a_policy_brings_the_options_that_it_was_trained_under(tmp_path):
    file = tmp_path / "policy.safetensors"
    save_policy(
        file, init_policy(jax.random.key(0), width=8), switches="early_exit=true,reedit_margin=none"
    )
    rule = parse_rule(f"flow:policy={file}")[1]
    assert rule.early_exit and rule.reedit_margin is None
    rule = parse_rule(f"flow:reedit_margin=0.2,policy={file}", [("early_exit", False)])[1]
    assert rule.early_exit and rule.reedit_margin == 0.2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("flo", "did you mean flow?"),
        ("", "There are mask, threshold, factor, eb"),
        ("flow:pwer=2", "did you mean power?"),
        ("flow:", "must look like flow:option=value"),
        ("flow:power", "must look like flow:option=value"),
        ("flow:power=high", 'power is "high", but it must be a number'),
        ("flow:commit=2", "commit is 2, but it must be true or false"),
        ("threshold:tau=1.5", "the rule threshold:tau=1.5: tau must be between 0 and 1, not 1.5"),
        ("mask:temperature=-1", "temperature must be at least 0, not -1.0"),
        (
            "mask:order=best",
            "order must be confidence, random, entropy, margin, sequential or origin",
        ),
        ("flow:policy=nowhere.safetensors", "no such file"),
        ("flow:policy=/dev/zero", "it is a pipe or a device"),
        ("flow:power=nan", "power is NaN, but it must be a finite number"),
        (f"flow:power={'9' * 5000}", "but it must be a finite number"),
        ("flow:\x1b[2J=1", r"has no option '\x1b[2J'"),
    ],
)
def test_wrong_rules(text, sentence):
    with pytest.raises(UserError) as error:
        parse_rule(text)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_budgets():
    assert parse_budget("1/4") == parse_budget(" 0.25") == Fraction(1, 4)
    assert parse_budgets("1,1/2,0.5") == [1, Fraction(1, 2)]


# Short texts of endless numbers, long ones, and digits of other scripts.
LONG = [
    "1e999999999",
    "1e-999999999",
    "9" * 5000,
    f"1/{'9' * 5000}",
    "0." + "1" * 5000,
    "\uff11/\uff14",
]


@pytest.mark.parametrize(
    "text", ["0", "-1/4", "1.01", "2", "a quarter", "1/0", "nan", "inf", "", *LONG]
)
def test_budgets_outside_0_to_1(text):
    with pytest.raises(UserError, match="budget"):
        parse_budget(text)
