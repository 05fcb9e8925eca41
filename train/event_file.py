"""Event file of metrics for TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from xflow_jax.errors import disk_errors

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter


class EventFile:
    """An event file, which stays empty without tensorboardX.

    tensorboardX's own writer has a thread that dies without a word if the disk is full, and blocks
    the run. Here each line is on the disk when `add` returns.

    Args:
        folder: its folder, which is made.
        first: events of this and later steps in earlier files no longer count.

    Raises:
        UserError: for errors of the disk.
    """

    def __init__(self, folder: Path, first: int):
        self.folder = folder
        self._writer: EventsWriter | None = None
        with contextlib.suppress(ImportError):  # metrics.jsonl has the same metrics
            from tensorboardX.event_file_writer import EventsWriter

            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(folder / "events"))
                proto = _proto()
                start = proto.SessionLog(status=proto.SessionLog.START)
                self._write([proto.Event(session_log=start, step=first)])

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step.

        Args:
            step: number of the step.
            values: scalars by name.

        Raises:
            UserError: for errors of the disk.
        """
        if self._writer is not None:
            from tensorboardX.summary import scalar

            proto = _proto()
            events = [
                proto.Event(summary=scalar(name, value), step=step)
                for name, value in values.items()
            ]
            with disk_errors(self.folder):
                self._write(events)

    def close(self) -> None:
        """Closes the file. All its events are on the disk already."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None

    def _write(self, events: list[object]) -> None:
        assert self._writer is not None
        try:
            for event in events:
                self._writer.write_event(event)
            self._writer.flush()
        except OSError:
            self.close()
            raise


def _proto() -> ModuleType:
    from tensorboardX.proto import event_pb2

    return event_pb2
