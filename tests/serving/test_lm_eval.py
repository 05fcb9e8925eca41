"""The classes of lm-evaluation-harness as clients, if it is installed with its extra `api`."""

from __future__ import annotations

from types import SimpleNamespace

import openai
import pytest

from tests.serving.conftest import start
from xflow_jax.tasks import microcode

PROMPTS = [microcode.TASK.example, "Sort them."]


@pytest.fixture(scope="module")
def running():
    """A server with one rule."""
    found = start("threshold")
    found.wait_until_ready()
    yield found
    assert found.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("concurrent", [1, 4])
def test_the_classes_of_lm_evaluation_harness(running, concurrent):
    models = pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm-eval[api]")
    model = models.LocalChatCompletion(
        model="tiny",
        base_url=f"{running.url}/v1/chat/completions",
        num_concurrent=concurrent,
        max_gen_toks=48,
        eos_string="<|endoftext|>",
    )
    chats = [model.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    requests = [
        SimpleNamespace(args=(chat, {"until": ["\n\n"], "do_sample": False})) for chat in chats
    ]
    answers = model.generate_until(requests)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": prompt}], stop=["\n\n"]
            )
            assert answer == expected.choices[0].message.content
