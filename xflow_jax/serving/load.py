"""Open-loop load on a server: requests at random times."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Sequence

import numpy as np

from xflow_jax.errors import UserError
from xflow_jax.tasks import microcode


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests of one run.

    Attributes:
        url: address of the server, without /v1.
        rate: requests a second, on average.
        requests: number of requests.
        disconnects: share of the clients that leave after the first final text.
        max_tokens: of each request, or None for the server's default.
        rule: rule of each request, or None.
        seed: of prompts, times and clients that leave.
        api_key: the server's key.
    """

    url: str
    rate: float
    requests: int
    disconnects: float = 0.0
    max_tokens: int | None = None
    rule: str | None = None
    seed: int = 0
    api_key: str = "none"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One answer.

    Attributes:
        seconds: from the request to its end.
        first: from the request to the first final text, or None.
        tokens: tokens of the answer.
        passes: its forward passes.
        status: "ok", "left", or the error's code.
    """

    seconds: float
    first: float | None
    tokens: int
    passes: int
    status: str


def make_prompts(count: int, seed: int = 0) -> list[str]:
    """Returns requests of the microcode task, with repetitions."""
    task, rng = microcode.TASK, random.Random(seed)
    prompts = [str(task.prompt(problem)) for problem in task.problems(None, None)]
    return [rng.choice(prompts) for _ in range(count)]


def arrival_times(count: int, rate: float, seed: int = 0) -> list[float]:
    """Draws the times of a Poisson process.

    Args:
        count: number of requests.
        rate: requests a second, on average. Infinity puts all at 0.
        seed: of the draws.

    Returns:
        Seconds from the start, ascending. The first is 0.
    """
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return (np.cumsum(gaps) - gaps[0]).tolist()


async def run_load(load: Load) -> list[Outcome]:
    """Sends all requests, and waits for the answers. Needs the package openai.

    Args:
        load: the requests.

    Returns:
        An outcome for each.

    Raises:
        UserError: if there is no server at the address, or it refuses the key.
    """
    import openai

    rng = random.Random(load.seed)
    prompts = make_prompts(load.requests, load.seed)
    async with openai.AsyncOpenAI(
        base_url=f"{load.url}/v1", api_key=load.api_key, max_retries=0, timeout=600
    ) as client:

        async def one(prompt: str, leaves: bool) -> Outcome:
            began, first, tokens, passes, status = time.perf_counter(), None, 0, 0, "ok"
            own = {} if load.rule is None else {"xflow": {"rule": load.rule}}
            limit = {} if load.max_tokens is None else {"max_tokens": load.max_tokens}
            try:
                stream = await client.chat.completions.create(
                    model=name,
                    messages=[{"role": "user", "content": prompt}],
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body=own,
                    **limit,
                )
                async for chunk in stream:
                    if chunk.usage is not None:
                        tokens = chunk.usage.completion_tokens
                    about = (chunk.model_extra or {}).get("xflow") or {}
                    passes = about.get("forward_passes", passes)
                    if first is None and chunk.choices and chunk.choices[0].delta.content:
                        first = time.perf_counter() - began
                        if leaves:
                            status = "left"
                            await stream.close()
                            break
            except openai.APIStatusError as error:
                status = str(error.code or error.status_code)
            except openai.APIError as error:
                status = type(error).__name__
            return Outcome(time.perf_counter() - began, first, tokens, passes, status)

        try:
            name = (await client.models.list()).data[0].id
        except openai.APIConnectionError:
            raise UserError(f"there is no server at {load.url}") from None
        except openai.APIStatusError as error:
            raise UserError(f"the server at {load.url} refuses: {error.message}") from None
        tasks, began = [], time.perf_counter()
        times = arrival_times(load.requests, load.rate, load.seed)
        for prompt, arrival in zip(prompts, times, strict=True):
            await asyncio.sleep(max(began + arrival - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(one(prompt, rng.random() < load.disconnects)))
        return list(await asyncio.gather(*tasks))


def summarize(outcomes: Sequence[Outcome], seconds: float) -> dict[str, object]:
    """Returns the figures of a run.

    Args:
        outcomes: the answers.
        seconds: duration of the run.
    """
    done = [o for o in outcomes if o.status == "ok"]
    states: dict[str, int] = {}
    for outcome in outcomes:
        states[outcome.status] = states.get(outcome.status, 0) + 1
    times = [o.seconds for o in done] or [float("nan")]
    firsts = [o.first for o in done if o.first is not None] or [float("nan")]
    p50, p95 = np.percentile(times, [50, 95])
    f50, f95 = np.percentile(firsts, [50, 95])
    return {
        "requests": states,
        "seconds": round(seconds, 2),
        "requests_per_second": round(len(done) / seconds, 3),
        "tokens_per_second": round(sum(o.tokens for o in done) / seconds, 1),
        "passes_per_answer": round(sum(o.passes for o in done) / max(len(done), 1), 2),
        "first_text_p50": round(float(f50), 3),
        "first_text_p95": round(float(f95), 3),
        "end_to_end_p50": round(float(p50), 3),
        "end_to_end_p95": round(float(p95), 3),
    }
