"""Fields of requests, and errors in OpenAI's form."""

from __future__ import annotations

from fractions import Fraction

import pytest

from xflow_jax.serving.errors import ApiError
from xflow_jax.serving.protocol import Belief, parse_generation
from xflow_jax.tokenizer import check_messages

MESSAGES = [{"role": "user", "content": "hi"}]


def parse(chat=True, **fields):
    base = {"messages": MESSAGES} if chat else {"prompt": "hi"}
    return parse_generation({**base, **fields}, chat, check_messages)


def test_all_fields():
    request = parse(
        model="m", max_tokens=9, max_completion_tokens=7, stop=["a", "b"], n=2, seed=3,
        temperature=0, stream=True, stream_options={"include_usage": True}, logprobs=True,
        top_logprobs=3, user="u", top_p=1, frequency_penalty=0, tools=[], metadata={}, store=False,
        xflow={"rule": "flow", "budget": 0.25, "canvas": 16, "belief": {"every": 2, "top": 4}},
    )  # fmt: skip
    assert (request.model, request.max_tokens, request.stops) == ("m", 7, ("a", "b"))
    assert (request.choices, request.seed, request.temperature) == (2, 3, 0.0)
    assert request.stream and request.include_usage and request.top_logprobs == 3
    assert (request.rule, request.budget, request.canvas) == ("flow", Fraction(1, 4), 16)
    assert request.belief == Belief(2, 4)
    assert request.ignored == ("metadata", "store")
    assert request.prompts == (MESSAGES,)


@pytest.mark.parametrize("stop", [None, [], "x", ["x"]])
def test_stop_texts(stop):
    assert parse(stop=stop).stops == (("x",) if stop else ())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), ([1, 2], ([1, 2],)), (["a", "b"], ("a", "b")), ([[1], [2]], ([1], [2]))],
)
def test_prompts_of_completions(prompt, prompts):
    assert parse(chat=False, prompt=prompt).prompts == prompts


def test_content_parts_and_names_of_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(messages=[{"role": "user", "content": parts, "name": "x"}])
    assert request.prompts == ([{"role": "user", "content": "ab"}],)


def test_messages_as_other_clients_send_them():
    back = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None}
    marked = {"role": "user", "content": "b", "type": "text"}
    assert parse(messages=[*MESSAGES, {**back, "annotations": []}, marked]).prompts == (
        [*MESSAGES, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
    )


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "whole number of at least 1, not 0"),
        ({"max_tokens": True}, "max_tokens", "not True"),
        ({"max_tokens": 1.5}, "max_tokens", "not 1.5"),
        ({"n": 9}, "n", "from 1 to 8"),
        ({"seed": -1}, "seed", "seed must be a whole number from 0"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"temperature": float("inf")}, "temperature", "from 0 to 2"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 texts"),
        ({"stop": [""]}, "stop", "at most 4 texts"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "need stream"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown key 'x'"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"top_p": 0.5}, "top_p", "no effect"),
        ({"top_p": True}, "top_p", "no effect"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "no effect"),
        ({"tools": [{}]}, "tools", "no effect"),
        ({"response_format": {"type": "json_object"}}, "response_format", "no effect"),
        ({"presence_penalty": 0.1}, "presence_penalty", "no effect"),
        ({"messages": "hi"}, "messages", "must be a list of messages"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ({"model": 3}, "model", "a text, not 3"),
        ({"xflow": 3}, "xflow", "an object"),
        ({"xflow": {"rules": "a"}}, "xflow.rules", "unknown key 'rules'"),
        ({"xflow": {"steps": 3, "budget": 0.5}}, "xflow.budget", "both steps and budget"),
        ({"xflow": {"budget": "2"}}, "xflow.budget", "at most 1"),
        ({"xflow": {"budget": float("inf")}}, "xflow.budget", "no number"),
        ({"xflow": {"belief": {}}}, "xflow.belief", "needs stream"),
        ({"xflow": {"belief": {"top": 5}}, "stream": True}, "xflow.belief.top", "from 0 to 4"),
    ],
)
def test_wrong_fields(fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse(**fields)
    body = caught.value.body()["error"]
    assert caught.value.status == 400
    assert (body["type"], body["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("prompt", [None, "", [], [True], [[]], {}, [1, "a"], [-1]])
def test_wrong_prompts(prompt):
    if prompt == "":
        assert parse(chat=False, prompt="").prompts == ("",)
        return
    with pytest.raises(ApiError, match="prompt"):
        parse(chat=False, prompt=prompt)


def test_ignored_fields_are_safe_in_a_header():
    request = parse(**{"a\r\nb": 1, "ü": 2, "x" * 99: 3, "a,b": 4})
    assert request.ignored == ("a??b", "?", "x" * 60, "a?b")
