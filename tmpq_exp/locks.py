"""Owns the lock files that keep processes out of each other's directories, and who holds one."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE_SECONDS = 0.5
"""How long a lock is waited for: somebody may just be looking whether it is held."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Args:
        host: Name of the machine.
        pid: Process there.
        since: Time of day at which it took the lock, as ISO 8601; for people, nothing is decided by it.
    """

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class LockedError(Exception):
    """Another process holds the lock.

    Args:
        owner: Who; None if the lock file does not say.
    """

    def __init__(self, owner: Owner | None) -> None:
        super().__init__("another process" if owner is None else f"another process ({owner})")
        self.owner = owner


_held: dict[Path, FileLock] = {}
"""Locks of this process, by the real path of their files."""


def hold(path: Path) -> None:
    """Take a lock until ``release`` or the end of this process, however it ends; nothing happens if it has it already.

    The operating system holds the lock and lets go of it when a process dies, so that a file left by a kill is no
    obstacle. On file systems without such locks the file itself is the lock (see filelock's ``SoftFileLock``): one that
    a dead process of the same host left is taken over, one of another host has to be removed by hand.

    Args:
        path: The lock file, in a directory that exists; it is made, says who holds the lock, and stays.

    Raises:
        LockedError: If another process has it.
        OSError: If the file cannot be written.
    """
    real = path.resolve()
    if real in _held:
        return
    lock = FileLock(real, thread_local=False)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise LockedError(_read_owner(path)) from None
    _held[real] = lock
    if isinstance(lock, FileLock):  # where the file itself is the lock, its content is filelock's
        owner = Owner(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
        path.write_text(json.dumps(asdict(owner)), encoding="utf-8")


def release(path: Path) -> None:
    """Let go of a lock; nothing happens if this process has it not."""
    lock = _held.pop(path.resolve(), None)
    if lock is not None:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process, this one included, holds a lock."""
    if path.resolve() in _held:
        return True
    if not path.exists():
        return False
    lock = FileLock(path.resolve(), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a directory that can only be read: nobody works there
        return False
    lock.release()
    return False


def _read_owner(path: Path) -> Owner | None:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        owner = Owner(**json.loads(path.read_text(encoding="utf-8")))
        if isinstance(owner.host, str) and isinstance(owner.pid, int) and isinstance(owner.since, str):
            return owner
    return None
