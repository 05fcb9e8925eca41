"""Orbax is silent about errors that it raises, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Coroutine
from types import SimpleNamespace

import pytest

from xflow_jax.checkpoints.orbax_logging import quiet_orbax, release_tasks

# Raises in a module of a package, as a write to a full disk does.
SOURCE = """
async def write():
    raise ValueError("No space left on device")

def fail(*kept):
    raise OSError("No space left on device")
"""


def functions_of(package: str) -> dict[str, Callable[..., Coroutine]]:
    names: dict = {}
    exec(compile(SOURCE, f"/lib/python3/site-packages/{package}/save.py", "exec"), names)
    return names


def run_unawaited(write: Callable[[], Coroutine], gathered: bool) -> None:
    """Runs coroutines to their error, which nobody awaits."""

    async def begin() -> None:
        futures = [asyncio.ensure_future(write()) for _ in range(2)]
        if gathered:
            futures = [asyncio.gather(*futures)]
        for _ in range(5):
            await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    gc.collect()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("package", "reports"), [("orbax", 0), ("tensorstore", 0), ("aiohttp", 1)])
def test_errors_that_nobody_awaits_are_reported_unless_they_are_of_orbax(
    caplog, package, reports, gathered
):
    with quiet_orbax():
        pass
    run_unawaited(functions_of(package)["write"], gathered)  # after the block, when it is deleted
    assert len(caplog.records) == reports * (1 if gathered else 2)
    assert all("never retrieved" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("message", "reports"),
    [
        ("OUT_OF_RANGE: Error opening \"zarr\" driver [tensorstore_spec='{}']", 0),
        ('Error writing "1/.zarray" in OCDBT database at local file "/run/"', 0),
        ("File too large", 1),
    ],
)
def test_futures_of_tensorstore_that_nobody_awaits_are_silent(caplog, message, reports):
    """Threads of tensorstore set these errors, so no traceback names a file of it."""
    with quiet_orbax():
        pass
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(ValueError(message))
    loop.close()
    gc.collect()
    assert len(caplog.records) == reports


def test_tasks_that_never_began_are_deleted_with_the_error():
    """The error is kept, its tasks are not. Later they would warn in the middle of other output."""
    names = functions_of("orbax")
    with pytest.raises(OSError) as error, quiet_orbax():
        names["fail"](names["write"]())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error.value.__traceback__ = None
        gc.collect()
    assert not caught


def test_tasks_of_a_cause_are_deleted_too():
    names = functions_of("orbax")
    error = None
    try:
        try:
            names["fail"](names["write"]())
        except OSError as cause:
            raise KeyError("a sentence") from cause
    except KeyError as sentence:
        error = sentence
    assert error is not None
    release_tasks(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del error
        gc.collect()
    assert not caught


def test_closed_loops_are_dropped_after_the_block_and_other_errors_are_not(monkeypatch):
    passed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", passed.append)
    for _ in range(2):  # the hook is added once
        with contextlib.suppress(OSError), quiet_orbax():
            raise OSError
    late = SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed"))
    others = [
        SimpleNamespace(object=print, exc_value=RuntimeError("Event loop is closed")),
        SimpleNamespace(object=None, exc_value=RuntimeError("another error")),
    ]
    for unraisable in (late, *others):
        sys.unraisablehook(unraisable)
    assert passed == others
