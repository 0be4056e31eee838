"""The append-only log spool of one gateway process: what was acknowledged survives `kill -9`.

A process has a directory of its own, `<spool>/<id>/`, with a `lock` file it holds for life (so that the shipper sees a
death at once) and numbered segments. Appends are plain writes from the event loop: they reach the page cache, which
outlives the process. A thread syncs them every 50 ms, or at once for whoever waits in `durable`.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Literal

import structlog

from services.errors import Unavailable
from services.gateway.spool_format import Admitted, Final, frame, segment_path
from services.store.base import uuid7
from services.store.failpoints import reach

LOCK_NAME = "lock"
QUARANTINE = "quarantine"
SEGMENT_BYTES = 16 << 20
SYNC_SECONDS = 0.05
SCAN_SECONDS = 0.5
# How long those who waited have to hear of a failure before the process ends.
LAST_ANSWERS_SECONDS = 0.2

log = structlog.get_logger()


class LogSpool:
    """Appends from one event loop. `admit` refuses when the disk budget is spent; `finish` may exceed it, because what
    was admitted must be able to end."""

    def __init__(
        self,
        root: Path,
        *,
        budget_bytes: int,
        durability: Literal["process", "power"] = "process",
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.durability = durability
        self.directory = root / uuid7().hex
        self._root = root
        self._budget = budget_bytes
        # Shipped records leave the disk a segment at a time, so a segment must be small beside the budget.
        self._segment_bytes = min(segment_bytes, budget_bytes // 8)
        self._used_at_scan = scan_bytes(root)
        self._since_scan = 0
        self._lock_file = _make_directory(self.directory)
        self._number = 1
        self._descriptor = self._open(self._number)
        self._size = 0
        self._torn = False
        self._full_segments: list[int] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._mutex = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._dirty = False
        self._thread = threading.Thread(target=self._sync_or_die, name="spool-sync", daemon=True)
        self._thread.start()

    @property
    def used_bytes(self) -> int:
        """Bytes of the spool waiting to be shipped, all gateway processes together; at most half a second old."""
        return self._used_at_scan + self._since_scan

    @property
    def full(self) -> bool:
        """Whether new requests are refused."""
        return self.used_bytes >= self._budget

    def admit(self, record: Admitted) -> None:
        """Log that a request is about to run. Raises Unavailable when it could not be logged."""
        if self.full:
            raise Unavailable("the log spool is full, so this request could not be logged", code="log_spool_full")
        self._append(frame(record))
        reach("gateway.admitted")

    def finish(self, record: Final) -> None:
        """Log the ending, before the client can see it. Raises Unavailable when the disk refuses."""
        self._append(frame(record))
        reach("gateway.finished")

    async def durable(self) -> None:
        """Under `power`, return once everything appended so far is on disk. Raises Unavailable when that failed."""
        if self.durability == "process":
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._mutex:
            self._waiters.append(waiter)
        self._wake.set()
        await waiter

    def close(self) -> None:
        """Sync what is written and let go of the directory, which the shipper then empties."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=30)
        os.close(self._descriptor)
        os.close(self._lock_file)

    def _append(self, data: bytes) -> None:
        if self._size >= self._segment_bytes or self._torn:
            self._rotate()
        try:
            written = os.write(self._descriptor, data)
        except OSError as error:
            raise self._refusal(error) from error
        self._size += written
        self._since_scan += written
        self._dirty = True
        if written < len(data):
            raise self._refusal(OSError(f"only {written} of {len(data)} bytes were written"))

    def _refusal(self, error: OSError) -> Unavailable:
        """Nothing may ever be appended behind a record that may be torn, so the next one opens a new segment. A full
        disk tears nothing: it takes the bytes or says no, and a short write says how many it took."""
        self._torn = self._torn or error.errno not in (errno.ENOSPC, errno.EDQUOT)
        log.error("log_spool_cannot_write", error=str(error), segment=self._number)
        return Unavailable("this request could not be logged: the disk refuses", code="log_spool_failed")

    def _rotate(self) -> None:
        try:
            fresh = self._open(self._number + 1)
        except OSError as error:
            raise self._refusal(error) from error
        with self._mutex:
            self._full_segments.append(self._descriptor)
            self._descriptor = fresh
            self._torn = False
        self._number += 1
        self._size = 0

    def _open(self, number: int) -> int:
        path = segment_path(self.directory, number)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        _sync_directory(self.directory)
        return descriptor

    def _sync_or_die(self) -> None:
        """Without this thread nothing is durable and the budget is blind: the process must not outlive it."""
        try:
            self._sync_forever()
        except Exception as error:
            log.critical("log_spool_thread_failed", alarm=True, exc_info=True)
            with self._mutex:
                waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                _answer(waiter, error)
            time.sleep(LAST_ANSWERS_SECONDS)
            _end_process()

    def _sync_forever(self) -> None:
        scanned = time.monotonic()
        while not self._closing:
            self._wake.wait(SYNC_SECONDS)
            self._wake.clear()
            self._sync()
            if time.monotonic() - scanned >= SCAN_SECONDS:
                self._since_scan, self._used_at_scan = 0, scan_bytes(self._root)
                scanned = time.monotonic()
        self._sync()

    def _sync(self) -> None:
        with self._mutex:
            waiters, self._waiters = self._waiters, []
            full, self._full_segments = self._full_segments, []
            dirty, self._dirty = self._dirty, False
            current = self._descriptor
        failure: OSError | None = None
        try:
            for descriptor in [*full, current] if dirty or full else []:
                os.fdatasync(descriptor)
        except OSError as error:
            # After a failed sync the kernel forgets the dirty pages: this segment proves nothing any more.
            log.error("log_spool_cannot_sync", error=str(error))
            failure, self._torn = error, True
        finally:
            for descriptor in full:
                os.close(descriptor)
        for waiter in waiters:
            _answer(waiter, failure)


def _answer(waiter: asyncio.Future[None], failure: Exception | None) -> None:
    def settle() -> None:
        if waiter.done():
            return
        if failure is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(Unavailable("the answer could not be logged durably", code="log_spool_failed"))

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        waiter.get_loop().call_soon_threadsafe(settle)


def _end_process() -> None:
    """The supervisor starts another one."""
    os._exit(1)


def _make_directory(directory: Path) -> int:
    """Appears under its final name only once it is locked: a shipper never mistakes a birth for a death."""
    draft = directory.with_name(f".{directory.name}")
    draft.mkdir(mode=0o700, parents=True)
    descriptor = os.open(draft / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    draft.rename(directory)
    _sync_directory(directory.parent)
    return descriptor


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scan_bytes(root: Path) -> int:
    """Bytes in the spool's segments. What is quarantined waits for a person and must not stop the service."""
    return sum(
        _size(entry)
        for directory in _entries(root)
        if directory.name != QUARANTINE and directory.is_dir(follow_symlinks=False)
        for entry in _entries(directory.path)
    )


def _entries(directory: str | Path) -> list[os.DirEntry[str]]:
    """What a directory holds; nothing when the shipper removes it meanwhile."""
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        return list(entries)
    return []


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # the shipper has just unlinked it
        return 0
