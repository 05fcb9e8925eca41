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
        UserError, match="batch_size must be auto or a whole number of at least 1, not 'most'"
    ):
        make("random", batch_size="most")
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        make("random", budget=2)


@pytest.mark.parametrize(("given", "size"), [("auto", 8), ("auto:4", 8), (3, 3), ("16", 16)])
def test_batch_sizes(harness, given, size):
    assert harness.models["xflow"]("random", batch_size=given).batch_size == size


def test_contexts_that_are_too_long_are_cut_on_the_left(harness, caplog):
    lm = tiny_lm()
    most = lm.config.max_length
    model = harness.models["xflow"]("random", budget="1/4", samples=2, batch_size=2)
    model.check_greedy = False
    text = "return sum(xs) " * most
    ids = model._encode(text)
    options = {"max_gen_toks": 8, "until": []}
    answers = model.generate_until([request(text, options)], True)
    end = [ids[-(most - 8) :]]
    assert answers[0] == generate(lm, end, MaskPrediction(), gen_length=8, steps=2).texts[0]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "1 of 1 contexts do not fit into the model's 128 positions beside the response. "
        "They are cut on the left."
    )
    caplog.clear()
    context = lm.tokenizer.decode(ids)
    (pair,) = [model._pair(context, "return xs")]
    found = model.loglikelihood([request(context, "return xs")], True)
    alone = log_likelihoods(lm, [(pair[0][len(pair[1]) - most :], pair[1])], 2, batch_size=2)
    assert found[0][0] == pytest.approx(alone[0], rel=1e-5)
    assert "1 of 1 contexts" in caplog.text
    with pytest.raises(UserError, match="a response of 128 tokens leaves no room for a context"):
        model.generate_until([request("sum", options | {"max_gen_toks": 128})], True)


def test_texts_that_are_too_long_are_scored_in_pieces(harness, caplog):
    lm = tiny_lm()
    most = lm.config.max_length
    model = harness.models["xflow"]("random", samples=2, batch_size=2)
    texts = ["return sum(xs) " * most, "return"]
    ids = model._encode(texts[0])
    pieces = [((), ids[i : i + most]) for i in range(0, len(ids), most)]
    found = model.loglikelihood_rolling([request(text) for text in texts], True)
    assert len(pieces) > 1 and len(found) == 2
    assert found[0] == pytest.approx(log_likelihoods(lm, pieces, 2, batch_size=2).sum(), rel=1e-5)
    assert "1 of 2 texts are longer than the model's 128 positions" in caplog.text


def test_a_package_that_a_task_lacks_is_named(harness, monkeypatch):
    def cli_evaluate():
        raise ModuleNotFoundError("No module named 'requests.adapters'", name="requests.adapters")

    command = types.ModuleType("lm_eval.__main__")
    command.cli_evaluate = cli_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", command)
    with pytest.raises(SystemExit, match="needs the package requests, which is not installed"):
        harness.main()


def test_a_package_that_lm_eval_lacks_is_named(monkeypatch, tmp_path):
    (tmp_path / "lm_eval/api").mkdir(parents=True)
    (tmp_path / "lm_eval/__init__.py").write_text("")
    (tmp_path / "lm_eval/api/__init__.py").write_text("import requests")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "requests", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(SystemExit, match="needs the package requests, which is not installed"):
        importlib.import_module(NAME)


def test_a_missing_lm_eval_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(SystemExit, match=r"not installed: pip install xflow-jax\[lm-eval\]"):
        importlib.import_module(NAME)
