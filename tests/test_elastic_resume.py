"""The process that drives a run on Ray is killed: its cluster ends with it, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")

from tests.disturbances import Measurements, injected
from tests.running import TIMEOUT, TINY, num_trials, run_here, sorted_trials, start, wait_until

WORKERS = 2
ON_RAY = (*TINY, "executor=ray", f"executor.num_workers={WORKERS}", "num_threads=1")


def processes_with(variable: str) -> set[int]:
    """Processes whose environment holds this, as ``NAME=value``."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """A variable in the environment of all processes of a test, which are gone when it ends."""
    variable = f"TMPQ_EXP_TEST={tmp_path}"
    yield variable
    for pid in processes_with(variable):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes_with(variable), "processes of Ray cannot be killed")


def has_come_to(directory: Path, count: int, process: subprocess.Popen[str]) -> bool:
    """Whether so many trials are recorded, or nobody will."""
    return num_trials(directory) >= count or process.poll() is not None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_run_on_ray_goes_on_behind_the_kill_of_the_process_that_drives_it(mark: str, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_here(alone, *TINY, "num_threads=1")
    measurements = Measurements(shared)
    environment = {**injected(measurements.prepare), **dict([mark.split("=")])}

    def go() -> subprocess.Popen[str]:
        return start(shared, *ON_RAY, **environment)

    for count in (3, 9):
        process = go()
        wait_until(partial(has_come_to, shared, count, process))
        assert len(processes_with(mark)) > 1 + WORKERS, "there are processes of Ray to be left behind"
        process.kill()
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGKILL
        wait_until(lambda: not processes_with(mark), "processes of Ray were left behind")
        before = (shared / "trials.jsonl").read_bytes()
        measurements.check(WORKERS)
    process = go()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert (shared / "trials.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    measurements.check(0)
    assert sorted_trials(shared) == sorted_trials(alone)
    indices = [json.loads(line)["index"] for line in (shared / "trials.jsonl").read_text().splitlines()]
    assert indices == list(range(len(indices)))
    reports = [json.loads((directory / "report.json").read_text()) for directory in (alone, shared)]
    assert reports[0]["best"] == reports[1]["best"]
