"""Open-loop load on a server: requests at random times.

    xflow serve --model tiny --rules threshold
    python -m xflow_jax.serving.load --url http://127.0.0.1:8000 --rate 5 --requests 100

It prints throughput, the time to the first final text, and the time to the end. It needs the
package openai.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import time
from collections.abc import Sequence

import numpy as np

from xflow_jax.errors import UserError, require
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


async def run_load(load: Load) -> list[Outcome]:
    """Sends all requests, and waits for the answers.

    Args:
        load: the requests.

    Returns:
        An outcome for each.
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

        name = (await client.models.list()).data[0].id
        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(one(prompt, rng.random() < load.disconnects)))
            await asyncio.sleep(rng.expovariate(load.rate))
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the load, and prints its figures.

    Args:
        argv: the arguments, or None for those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="Sends requests at random times to a server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second, on average")
    parser.add_argument("--requests", type=int, default=50, help="number of requests")
    parser.add_argument("--disconnects", type=float, default=0.0, help="share that leaves early")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer")
    parser.add_argument("--rule", help="rule of each request")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--api-key", default="none", help="key of the server")
    args = parser.parse_args(argv)
    try:
        require(args.rate > 0, f"--rate must be above 0, not {args.rate}")
        require(args.requests > 0, f"--requests must be at least 1, not {args.requests}")
        began = time.perf_counter()
        outcomes = asyncio.run(run_load(Load(**vars(args))))
        print(json.dumps(summarize(outcomes, time.perf_counter() - began), indent=1))
    except ModuleNotFoundError as error:
        print(f"error: the load needs the package {error.name}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
