"""Metrics of the server, for Prometheus."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters, gauges and histograms, in a registry of their own.

    Names begin with `xflow:`. docs/guides/serve.md has their list.
    """

    def __init__(self) -> None:
        """Registers everything at zero."""
        self.registry = CollectorRegistry()

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"xflow:{name}", help_, labels, registry=self.registry)

        def gauge(name: str, help_: str) -> Gauge:
            return Gauge(f"xflow:{name}", help_, registry=self.registry)

        def seconds(name: str, help_: str, *labels: str) -> Histogram:
            full = f"xflow:{name}_seconds"
            return Histogram(full, help_, labels, registry=self.registry, buckets=SECONDS)

        self.running = gauge("num_requests_running", "Requests in slots.")
        self.waiting = gauge("num_requests_waiting", "Requests in the queue.")
        self.slots_busy = gauge("slots_busy", "Slots with a request.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers.")
        self.canvas_positions = counter("canvas_positions", "Positions of canvases.")
        self.forward_passes = counter("forward_passes", "Forward passes of requests.")
        self.tokens_per_forward = gauge("tokens_per_forward", "Tokens for each pass so far.")
        self.revised_tokens = counter("revised_tokens", "Re-edits of positions.")
        self.success = counter("request_success", "Answers by their end.", "finished_reason")
        self.failure = counter("request_failure", "Errors by their code.", "code")
        self.compilations = counter("compilations", "Programs compiled after the start.")
        self.frames_dropped = counter("belief_frames_dropped", "States that no frame was made of.")
        self.queue_seconds = seconds("queue", "Wait for a slot.")
        self.first_settled_seconds = seconds("first_settled_token", "Time to a first final token.")
        self.end_to_end_seconds = seconds("end_to_end", "Time from a request to its end.")
        self.step_seconds = seconds("step", "Time of a program's call.", "program")
        self.host_gap_seconds = seconds("host_gap", "Time for which no call was in flight.")
        self._tokens = self._passes = 0

    def set_load(self, running: int, waiting: int) -> None:
        """Sets the gauges of running and waiting requests."""
        self.running.set(running)
        self.slots_busy.set(running)
        self.waiting.set(waiting)

    @contextlib.contextmanager
    def time_program(self, name: str) -> Iterator[None]:
        """Measures the time of a program's call."""
        began = time.perf_counter()
        yield
        self.step_seconds.labels(name).observe(time.perf_counter() - began)

    def count_call(self, seconds: float, passes: int) -> None:
        """Counts a call of the step program."""
        self.step_seconds.labels("step").observe(seconds)

    def count_row(self, passes: int, edits: int) -> None:
        """Counts the passes and re-edits of a request since its last state."""
        self._passes += passes
        self.forward_passes.inc(max(passes, 0))
        self.revised_tokens.inc(edits)

    def count_failure(self, code: str) -> None:
        """Counts an error by its code."""
        self.failure.labels(code).inc()

    def count_answer(self, reason: str, prompt: int, tokens: int, canvas: int) -> None:
        """Counts an answer at its end."""
        self._tokens += tokens
        self.success.labels(reason).inc()
        self.prompt_tokens.inc(prompt)
        self.generation_tokens.inc(tokens)
        self.canvas_positions.inc(canvas)
        self.tokens_per_forward.set(self._tokens / max(self._passes, 1))

    def mean_decode_seconds(self) -> float:
        """Returns the mean time of a request, 1 before the first."""
        total = count = 0.0
        for metric in self.end_to_end_seconds.collect():
            for sample in metric.samples:
                total += sample.value if sample.name.endswith("_sum") else 0
                count += sample.value if sample.name.endswith("_count") else 0
        return total / count if count else 1.0

    def text(self) -> bytes:
        """Returns all values in Prometheus's format."""
        return generate_latest(self.registry)


def count_compilations(counter: Callable[[], None]) -> None:
    """Calls a function at every compilation of this process from now on.

    Args:
        counter: the function.
    """

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            counter()

    jax.monitoring.register_event_duration_secs_listener(listen)
