"""Locks in object storage.

The lock is an object that its holder makes only if there is none, and rewrites every few seconds
with a higher count. The lock of a process of this machine that has ended is taken over at once.
That of another machine is taken over once its count has stood still. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from dataclasses import asdict
from pathlib import Path

from xflow_jax.checkpoints.lock_holder import Holder, PlaceLock, not_a_lock, refusal, this_process
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.input_files import create_object, delete_object, read_bytes, write_object

BEAT = 10.0  # seconds between two counts of a holder
STALE = 60.0  # seconds without a count, after which its holder is gone
POLL = 2.0  # seconds between two looks at the lock of another machine


class ObjectLock(PlaceLock):
    """The lock of a place in object storage."""

    def __init__(self, place: Path, file: Path) -> None:
        super().__init__(place, file)
        self._token = uuid.uuid4().hex
        self._holder: Holder | None = None
        self._count = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock. Waits up to STALE seconds for a lost one.

        Raises:
            UserError: if another process holds it, or if its object cannot be written.
        """
        self._holder = this_process()
        with disk_errors(self.place):
            while not create_object(self.file, self._record()):
                token = self._find_abandoned()
                self.inherited = token is not None and self._delete_abandoned(token)
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Deletes the object, if the lock is held."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        if not self.keeps_file:
            with contextlib.suppress(UserError, OSError), disk_errors(self.place):
                if self._read()[1].get("token") == self._token:
                    delete_object(self.file)

    def _record(self) -> bytes:
        assert self._holder is not None
        return json.dumps(
            {**asdict(self._holder), "token": self._token, "count": self._count}
        ).encode()

    def _beat(self) -> None:
        """Counts until the lock is released."""
        while not self._ended.wait(BEAT):
            self._count += 1
            with contextlib.suppress(Exception):  # of the network, which may come back
                if self._read()[1].get("token") == self._token:
                    write_object(self.file, self._record())

    def _delete_abandoned(self, token: str) -> bool:
        """Deletes the lock of a process that is gone, only once."""
        # Of several processes that find it, only the one that makes this object may delete.
        claim = self.file.with_name(f"{self.file.name}.{token}")
        if not create_object(claim, b"claimed"):
            raise UserError(refusal(self.place, None))
        mine = self._read()[1].get("token") == token
        if mine:
            delete_object(self.file)
        delete_object(claim)
        return mine

    def _find_abandoned(self) -> str | None:
        """Waits until the holder counts, or is certainly gone.

        Returns:
            The token of the lock if its holder is gone, None if it was released.

        Raises:
            UserError: if the holder lives.
        """
        first: object = None
        end = time.monotonic() + STALE
        while True:
            data, fields = self._read()
            if not data:
                return None
            try:
                names = ("host", "pid", "started", "since")
                holder = Holder(**{name: fields[name] for name in names})  # type: ignore[arg-type]
            except (KeyError, TypeError):
                raise UserError(not_a_lock(self.file)) from None
            token = str(fields.get("token"))
            if holder.is_gone():
                return token
            now = (token, fields.get("count"))
            first = first or now
            if now != first or holder.host == this_process().host:
                raise UserError(refusal(self.place, holder))
            if time.monotonic() > end:
                return token
            time.sleep(POLL)

    def _read(self) -> tuple[bytes, dict[str, object]]:
        """Returns the object and its fields, both empty without one."""
        try:
            data = read_bytes(self.file)
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return b"", {}
            raise
        try:
            fields = json.loads(data)
        except ValueError:
            fields = {}
        return data, fields if isinstance(fields, dict) else {}
