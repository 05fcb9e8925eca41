"""Engine of the server: a thread that fills slots and runs lanes.

Two calls are in flight: while the host reads the states of one, the device runs the next. A row
that ends is frozen on the device, and its slot is filled at the next call.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Sequence

import numpy as np

from xflow_jax.decoding import Rule, Snapshot
from xflow_jax.errors import require
from xflow_jax.lm import LM
from xflow_jax.serving.errors import ApiError
from xflow_jax.serving.lanes import DeviceLane, Lengths, make_kinds, make_lanes
from xflow_jax.serving.metrics import Metrics
from xflow_jax.serving.ticket import IDS, SETTLED, RowState, Ticket, read_state

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine.

    Attributes:
        passes: steps of a call, or None for as many as take about lanes.CALL_SECONDS.
        max_queue: most requests that wait for a slot.
        timeout: seconds after which a request is given up.
    """

    passes: int | None = None
    max_queue: int = 256
    timeout: float = 300.0


@dataclasses.dataclass
class _Runtime:
    """A lane with the requests in its slots."""

    lane: DeviceLane
    tickets: list[Ticket | None]
    live: np.ndarray

    def is_busy(self) -> bool:
        return any(ticket is not None for ticket in self.tickets)


@dataclasses.dataclass
class _Call:
    """A call in flight."""

    runtime: _Runtime
    snapshot: Snapshot
    tickets: list[Ticket | None]
    began: float


class Engine:
    """Runs requests in lanes.

    `submit` and `cancel` may be called by any thread.

    Attributes:
        lm: the model.
        kinds: kinds of rules, the default first.
        lengths: lengths of the lanes.
        options: limits.
        metrics: counters and times.
        is_ready: True once everything is compiled.
        is_draining: True if no further request is accepted.
        failure: the exception that ended the engine, or None.
    """

    def __init__(
        self,
        lm: LM,
        rules: dict[str, Rule],
        lengths: Lengths,
        options: EngineOptions = EngineOptions(),
        metrics: Metrics | None = None,
    ) -> None:
        """Makes the lanes. `start` compiles them."""
        require(bool(rules), "the server needs at least one rule")
        rows = lm.config.vocab_rows
        require(rows <= IDS, f"the model has {rows} tokens, but the server takes at most {IDS}")
        self.lm, self.lengths, self.options = lm, lengths, options
        self.metrics = metrics or Metrics()
        self.kinds = make_kinds(rules, lm)
        self._runtimes = [
            _Runtime(lane, [None] * lengths.slots, np.zeros(lengths.slots, bool))
            for lane in make_lanes(lm, self.kinds, lengths)
        ]
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._calls: collections.deque[_Call] = collections.deque()
        self._changed = threading.Condition()
        self._stop = False
        self._last_fetch: float | None = None
        self.is_ready = self.is_draining = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="xflow-engine", daemon=True)

    def describe(self) -> str:
        """Returns the programs in words, for the start of a server."""
        n, p = self.lengths.gen_lengths, self.lengths.prompt_lengths
        lanes = f"{len(self._runtimes)} lane{'s' if len(self._runtimes) > 1 else ''}"
        rules = ", ".join(kind.label for kind in self.kinds)
        return (
            f"{lanes} of {self.lengths.slots} slots: canvases {', '.join(map(str, n))}, "
            f"prompts {', '.join(map(str, p))}, rules {rules}, "
            f"cache {self.lengths.cache.resolve(self.lm.config)}"
        )

    # --- other threads

    def start(self) -> None:
        """Compiles all programs, and starts the thread."""
        for runtime in self._runtimes:
            runtime.lane.warm_up(self.options.passes)
        self.is_ready = True
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Puts requests into the queue, all or none.

        Args:
            tickets: the requests.

        Raises:
            ApiError: if the queue is full, or the server is draining or dead.
        """
        for ticket in tickets:
            ticket.place = self._runtime_of(ticket)
        with self._changed:
            if self.is_draining or self._stop or self.failure is not None:
                raise self.refusal()
            waiting = len(self._waiting)
            if waiting + len(tickets) > self.options.max_queue:
                seconds = str(max(1, round(self._seconds_per_request() * waiting)))
                raise ApiError(
                    f"{waiting} requests are waiting, which is all that the queue holds: try again "
                    f"in {seconds} s",
                    429,
                    code="queue_full",
                    headers={"Retry-After": seconds},
                )
            self._waiting.extend(tickets)
            self._changed.notify()

    def cancel(self, ticket: Ticket, reason: str = "cancelled") -> None:
        """Ends a request. Its slot is free at the next call.

        Args:
            ticket: the request.
            reason: its finish_reason.
        """
        with self._changed:
            if not ticket.is_over:
                ticket.finish_reason, ticket.ended = reason, time.monotonic()
            ticket.is_given_up = True
            self._changed.notify()

    def refusal(self) -> ApiError:
        """Returns the error of requests that are not answered any more."""
        if self.failure is not None:
            return ApiError("the engine has failed", 503, code="engine_failed")
        return ApiError("the server is shutting down", 503, code="draining")

    def drain(self, seconds: float) -> bool:
        """Refuses new requests, and waits for the others.

        Args:
            seconds: the longest time.

        Returns:
            True if all have ended.
        """
        self.is_draining = True
        until = time.monotonic() + seconds
        while self.count_running() + self.count_waiting() and time.monotonic() < until:
            time.sleep(0.02)
        return not self.count_running() + self.count_waiting()

    def stop(self) -> None:
        """Ends the thread. Requests that are left fail."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """True if the thread runs."""
        return self._thread.is_alive() and self.failure is None

    def count_running(self) -> int:
        """Returns the number of requests in slots."""
        return sum(t is not None for runtime in self._runtimes for t in runtime.tickets)

    def count_waiting(self) -> int:
        """Returns the number of requests in the queue."""
        return len(self._waiting)

    def _seconds_per_request(self) -> float:
        slots = sum(len(runtime.tickets) for runtime in self._runtimes)
        return self.metrics.mean_decode_seconds() / max(slots, 1)

    def _runtime_of(self, ticket: Ticket) -> _Runtime:
        """Returns the smallest lane for a request."""
        for runtime in self._runtimes:
            if runtime.lane.fits(ticket.kind, len(ticket.prompt), ticket.config):
                return runtime
        most = [max(values) for values in (self.lengths.prompt_lengths, self.lengths.gen_lengths)]
        if ticket.config.gen_length <= most[1] and len(ticket.prompt) <= most[0]:
            raise ApiError("the canvas takes more steps than positions", param="xflow.steps")
        raise ApiError(
            f"the prompt has {len(ticket.prompt)} tokens and the canvas {ticket.config.gen_length} "
            f"positions, but the server has room for {most[0]} and {most[1]}",
            code="context_length_exceeded",
        )

    # --- the engine's thread

    def _main(self) -> None:
        try:
            while self._wait_for_work():
                self._tick()
        except BaseException as error:
            _LOG.exception("the engine has failed")
            self.failure = error
        with self._changed:
            left = [*self._waiting, *(t for r in self._runtimes for t in r.tickets if t)]
            self._waiting.clear()
        for ticket in left:
            self._fail(ticket, self.refusal())

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do. Returns False at the end."""
        with self._changed:
            while not (self._stop or self._waiting or self._calls or self._any_busy()):
                self._last_fetch = None
                self._changed.wait()
            return not self._stop

    def _any_busy(self) -> bool:
        return any(runtime.is_busy() for runtime in self._runtimes)

    def _tick(self) -> None:
        """Fills slots, dispatches a call of each lane, reads older ones."""
        self._drop_late()
        dispatched = 0
        for runtime in self._runtimes:
            try:
                self._fill(runtime)
                if runtime.is_busy():
                    self._dispatch(runtime)
                    dispatched += 1
            except Exception as error:
                self._recover(runtime, error)
        while len(self._calls) > dispatched:
            self._read(self._calls.popleft())
        self.metrics.set_load(self.count_running(), self.count_waiting())

    def _drop_late(self) -> None:
        """Ends requests that were given up, or that took too long."""
        now, seconds = time.monotonic(), self.options.timeout
        running = [t for r in self._runtimes for t in r.tickets if t is not None]
        with self._changed:
            for ticket in [*self._waiting, *running]:
                if not ticket.is_over and now - ticket.created > seconds:
                    ticket.error = ApiError(
                        f"the request took more than {seconds:g} s", 504, code="timeout"
                    )
                    ticket.notify()
            if any(t.is_over for t in self._waiting):
                kept = [t for t in self._waiting if not t.is_over]
                self._waiting.clear()
                self._waiting.extend(kept)
        for runtime in self._runtimes:
            for slot, held in enumerate(runtime.tickets):
                if held is not None and (held.is_over or held.is_given_up):
                    self._free(runtime, slot)

    def _fill(self, runtime: _Runtime) -> None:
        """Puts waiting requests of a lane into its free slots."""
        for slot, ticket in enumerate(runtime.tickets):
            if ticket is not None:
                continue
            with self._changed:
                fitting = (t for t in self._waiting if t.place is runtime)
                found = next(fitting, None)
                if found is None:
                    return
                self._waiting.remove(found)
                runtime.tickets[slot] = found
            found.started = time.monotonic()
            self.metrics.queue_seconds.observe(found.started - found.created)
            salts = (found.seed, found.repeat)
            with self.metrics.time_program("admit"):
                runtime.lane.admit(
                    slot, runtime.lane.row(found.prompt, found.rule, found.config, salts)
                )
            runtime.live[slot] = True

    def _dispatch(self, runtime: _Runtime) -> None:
        now = time.monotonic()
        if not self._calls and self._last_fetch is not None:
            self.metrics.host_gap_seconds.observe(now - self._last_fetch)
        snapshot = runtime.lane.run(runtime.live.copy())
        self._calls.append(_Call(runtime, snapshot, list(runtime.tickets), now))

    def _recover(self, runtime: _Runtime, error: Exception) -> None:
        """Fails the rows of a lane, and makes its state anew."""
        _LOG.error("a call on the device has failed: %s", error)
        self._calls = collections.deque(c for c in self._calls if c.runtime is not runtime)
        failed = [ticket for ticket in runtime.tickets if ticket is not None]
        for slot in range(len(runtime.tickets)):
            self._free(runtime, slot)
        for ticket in failed:  # a client that reads its failure finds the slots free
            failure = ApiError("the decode has failed on the device", 500, code="device_error")
            self._fail(ticket, failure)
        runtime.lane.reset()

    def _fail(self, ticket: Ticket, error: ApiError) -> None:
        if not ticket.is_over:
            ticket.error, ticket.ended = error, time.monotonic()
        ticket.notify()

    def _free(self, runtime: _Runtime, slot: int) -> None:
        runtime.tickets[slot], runtime.live[slot] = None, False

    def _read(self, call: _Call) -> None:
        """Fetches the states of a call, and gives each request its own."""
        try:
            arrays = [call.snapshot.tokens, call.snapshot.levels, call.snapshot.rows]
            if any(t is not None and t.needs_top for t in call.tickets):
                arrays += [call.snapshot.top, call.snapshot.top_tokens]
            parts = [np.asarray(array) for array in arrays]
        except Exception as error:
            self._recover(call.runtime, error)
            return
        now = time.monotonic()
        began = max(call.began, self._last_fetch or 0)
        self._last_fetch = now
        self.metrics.count_call(now - began, call.runtime.lane.passes)
        for slot, ticket in enumerate(call.tickets):
            if ticket is None or ticket is not call.runtime.tickets[slot] or ticket.is_over:
                continue
            if self._publish(ticket, [part[slot] for part in parts]):
                self._free(call.runtime, slot)

    def _publish(self, ticket: Ticket, parts: list[np.ndarray]) -> bool:
        """Gives a request its new state. Returns True if it has ended."""
        old, n = ticket.state, ticket.config.gen_length
        state, active, finite = read_state(ticket, parts)
        self._count(ticket, old, state)
        ticket.state = state
        now = time.monotonic()
        if ticket.settled is None and (state.final or (state.t == SETTLED).any()):
            ticket.settled = now
            self.metrics.first_settled_seconds.observe(now - ticket.created)
        if not finite:
            message = "the model's logits are NaN or infinite"
            self._fail(ticket, ApiError(message, 500, code="not_finite"))
            return True
        final = state.final
        eos = np.flatnonzero(np.isin(state.tokens[:final], self.lm.config.stop_ids))
        end = min(int(eos[0]) if eos.size else n, ticket.max_tokens)
        is_over = bool(eos.size) or final >= ticket.max_tokens or not active
        with self._changed:  # a reader may give it up at the same time
            if is_over and not ticket.is_over:
                stopped = eos.size and int(eos[0]) < ticket.max_tokens
                ticket.end, ticket.ended = end, now
                ticket.finish_reason = "stop" if stopped else "length"
                self.metrics.end_to_end_seconds.observe(now - ticket.created)
        ticket.notify()
        return is_over

    def _count(self, ticket: Ticket, old: RowState | None, new: RowState) -> None:
        """Counts passes and re-edits."""
        edits = int(new.edits.sum()) if old is None else int((new.edits - old.edits).sum())
        self.metrics.count_row(new.passes - (0 if old is None else old.passes), edits)
