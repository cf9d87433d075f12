"""Lock files: one owner at a time, who is named, and nothing that a kill leaves stands in the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tmpq_exp import locks

HOLD = "import sys, time; from pathlib import Path; from tmpq_exp import locks\n"


def holder(path: Path) -> subprocess.Popen[bytes]:
    """Another process that holds a lock."""
    code = f"{HOLD}locks.hold(Path({str(path)!r})); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_owner_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path) as other:
        with pytest.raises(locks.LockedError, match=f"process {other.pid} on {socket.gethostname()} since ") as caught:
            locks.hold(path)
        assert caught.value.owner is not None
        assert caught.value.owner.pid == other.pid
        assert locks.is_held(path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert path.exists(), "a kill leaves the file"
    assert not locks.is_held(path)
    locks.hold(path)
    assert locks.is_held(path)
    locks.release(path)


def test_a_process_may_take_its_lock_again_and_gives_it_back_once(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not locks.is_held(path)
    locks.hold(path)
    locks.hold(tmp_path / "." / ".lock")
    locks.release(path)
    assert not locks.is_held(path)
    locks.release(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1, "pid": 2, "since": "x"}', b"\xff"])
def test_an_owner_that_cannot_be_read_still_holds(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path) as other:
        path.write_bytes(content)
        with pytest.raises(locks.LockedError, match=r"^another process$") as caught:
            locks.hold(path)
        assert caught.value.owner is None
        other.kill()


def test_of_several_that_start_at_once_one_wins(tmp_path: Path) -> None:
    path, start = tmp_path / ".lock", tmp_path / "start"
    code = (
        f"{HOLD}path, start = Path({str(path)!r}), Path({str(start)!r})\n"
        "print('ready', flush=True)\n"
        "while not start.exists(): time.sleep(0.001)\n"
        "try: locks.hold(path)\n"
        "except locks.LockedError: print('lost', flush=True)\n"
        "else: print('won', flush=True); time.sleep(1)\n"
    )
    several = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in several:
        assert process.stdout is not None
        process.stdout.readline()
    start.touch()
    answers = [process.communicate(timeout=60)[0].strip() for process in several]
    assert sorted(answers) == ["lost", "lost", "lost", "won"]


@pytest.mark.skipif(os.name != "posix", reason="looks at the file system's own locks")
def test_without_locks_of_the_file_system_the_file_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    path = tmp_path / ".lock"
    code = (
        f"{HOLD}import errno, fcntl, os, warnings; warnings.simplefilter('ignore')\n"
        "def missing(*_): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\n"
        f"fcntl.flock = missing; locks.hold(Path({str(path)!r})); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr(fcntl, "flock", missing)
        with pytest.warns(UserWarning, match="flock not supported"), pytest.raises(locks.LockedError):
            locks.hold(path)
        other.kill()
        other.wait()
        with pytest.warns(UserWarning, match="flock not supported"):
            locks.hold(path)
        locks.release(path)
