"""The adapter to lm-evaluation-harness, with a stub of the part that it uses."""

from __future__ import annotations

import importlib
import sys
import types
from types import SimpleNamespace

import pytest

from tests.helpers import tiny_lm
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.errors import UserError
from xflow_jax.evaluation.likelihood import log_likelihoods
from xflow_jax.tokenizer import chat_ids

NAME = "xflow_jax.evaluation.lm_eval_harness"


@pytest.fixture
def harness(monkeypatch):
    """Imports the module with a stub of lm_eval. `models` has the registered models."""
    models = {}

    class LM:
        def __init__(self):
            self.cache_hook = SimpleNamespace(add_partial=lambda *result: self.kept.append(result))
            self.kept = []

    package = {
        name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    }
    package["lm_eval.api.registry"] = types.ModuleType("lm_eval.api.registry")
    package["lm_eval.api.model"].LM = LM
    package["lm_eval.api.registry"].register_model = lambda name: (
        lambda cls: models.setdefault(name, cls)
    )
    for name, part in package.items():
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    monkeypatch.setattr(module, "load", lambda *_: tiny_lm())
    module.models = models
    yield module
    sys.modules.pop(NAME, None)


def request(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.mark.slow
def test_generate_until(harness):
    model = harness.models["xflow"](
        "random", rule="flow:power=4;commit=false", budget="1/2", batch_size="2"
    )
    assert model.rule == Flow(power=4.0, commit=False)
    texts = [
        "Sort the numbers and return the last.",
        "Square each number.",
        "Square them and return the sum.",
    ]
    chats = [model.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    lengths = [8, 8, 12]
    requests = [
        request(c, {"max_gen_toks": n, "until": []}) for c, n in zip(chats, lengths, strict=True)
    ]
    answers = model.generate_until(requests, disable_tqdm=True)
    lm = tiny_lm()
    for text, answer, n in zip(texts, answers, lengths, strict=True):
        alone = generate(lm, [chat_ids(lm.tokenizer, text)], model.rule, gen_length=n, steps=n // 2)
        assert alone.texts == [answer]
    assert [result[2] for result in model.kept] == answers
    long = max(answers, key=len)
    stop = long[2:4]
    context, options = requests[answers.index(long)].args
    again = model.generate_until([request(context, options | {"until": stop})])
    assert again == [long.partition(stop)[0]] and len(again[0]) < len(long)


@pytest.mark.slow
def test_loglikelihood(harness):
    model = harness.models["xflow"]("random", samples=4, batch_size=3)
    lm = tiny_lm()
    encode = lambda text: lm.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    pairs = [("def f(xs): ", "return sum(xs)"), ("def f(xs):", " return xs"), ("", "return")]
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    ids = [(encode("def f(xs):"), encode("def f(xs): return sum(xs)")[len(encode("def f(xs):")) :])]
    assert found[0][0] == pytest.approx(log_likelihoods(lm, ids, 4, 4)[0], rel=1e-5)
    assert all(bound < 0 and type(same) is bool for bound, same in found) and not found[2][1]
    # The model's own greedy continuation, one token a step.
    prompt = encode("def f(xs):")
    own = generate(lm, [prompt], MaskPrediction(), gen_length=3, steps=3).tokens[0].tolist()
    assert model._greedy([(prompt, own), (prompt, own[::-1])], True) == [True, own == own[::-1]]
    assert model.loglikelihood_rolling([request("return xs")])[0] < 0


def test_mistakes(harness):
    make = harness.models["xflow"]
    with pytest.raises(UserError, match="did you mean flow"):
        make("random", rule="flwo")
    with pytest.raises(
        UserError, match="batch_size must be a whole number of at least 1, not 'auto'"
    ):
        make("random", batch_size="auto")
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        make("random", budget=2)


def test_a_missing_lm_eval_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(SystemExit, match=r"not installed: pip install xflow-jax\[lm-eval\]"):
        importlib.import_module(NAME)
