"""Every rule over HTTP, and an answer among 63 neighbours. Slow: run with -m slow."""

from __future__ import annotations

import threading

import openai
import pytest

from tests.serving.conftest import start
from xflow_jax.decoding import generate, parse_rule
from xflow_jax.decoding.rules.parsing import RULES
from xflow_jax.serving import make_prompts
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import chat_ids

pytestmark = pytest.mark.slow
PROMPT = microcode.TASK.example
OPTIONS = {"flow": "flow:early_exit=true"}  # the others without options


@pytest.fixture(scope="module")
def running():
    """A server with every built-in rule."""
    found = start(",".join(OPTIONS.get(name, name) for name in RULES))
    found.wait_until_ready()
    yield found
    assert found.end() == 0


def ask(client, rule, prompt=PROMPT, **fields):
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": prompt}],
        extra_body={"xflow": {"rule": rule}},
        **fields,
    )


@pytest.mark.parametrize("name", RULES)
def test_deltas_join_to_the_text_of_generate(running, name):
    rule, lm = OPTIONS.get(name, name), running.engine.lm
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        whole = ask(client, rule).choices[0].message.content
        chunks = list(ask(client, rule, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    ids = chat_ids(lm.tokenizer, PROMPT)
    expected = generate(lm, [ids], parse_rule(rule)[1], 48, 48, block_length=16)
    assert whole == expected.texts[0]


def test_an_answer_among_63_neighbours_is_that_of_an_idle_server():
    running = start("threshold", slots=64)
    running.wait_until_ready()
    answers: dict[int, object] = {}
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:

        def record(number: int, prompt: str) -> None:
            choice = ask(client, "threshold", prompt, logprobs=True, top_logprobs=4).choices[0]
            answers[number] = choice.message.content, choice.logprobs

        record(-1, PROMPT)
        others = [prompt for prompt in make_prompts(100, 3) if prompt != PROMPT][:63]
        threads = [
            threading.Thread(target=record, args=(i, prompt))
            for i, prompt in enumerate([*others, PROMPT])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert running.end() == 0
    assert len(answers) == 65 and answers[63] == answers[-1]


def test_seeds_and_temperatures_of_a_rule_that_draws():
    rule = "mask:order=random,temperature=0.9"
    running = start(rule)
    running.wait_until_ready()
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:

        def texts(**fields: object) -> list[str]:
            made = ask(client, rule, "Hello.", **fields)
            return [choice.message.content for choice in made.choices]

        several = texts(seed=1, n=6, temperature=0.9)
        assert several == texts(seed=1, n=6) and len(set(several)) > 1
        assert several != texts(seed=2, n=6) and several[:1] == texts(seed=1)
        with pytest.raises(openai.BadRequestError, match="has the temperature 0.9"):
            texts(temperature=0.5)
    assert running.end() == 0
