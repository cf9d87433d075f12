"""Clocks that jump back and file systems that take their time: nothing is decided by the one or lost by the other."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.running import TIMEOUT, TINY, num_trials, run_here, start, wait_until
from tmpq_exp.job_record import JobState, read_record

SOURCE = Path(__file__).with_name("disturbed_libc.c")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands before the C library of processes that are told so: of all that they use, Python or not."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler to stand before the C library")
    path = tmp_path_factory.mktemp("library") / "disturbed_libc.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(SOURCE), "-ldl"], check=True)
    return path


@pytest.fixture
def backwards(library: Path) -> dict[str, str]:
    """Environment of a process whose clock jumps back ten minutes whenever anybody looks at it."""
    environment = {"LD_PRELOAD": str(library), "TMPQ_EXP_TEST_SECONDS_BACK": "600"}
    code = "import time; from datetime import datetime as d; print(time.time() > time.time() and d.now() > d.now())"
    command = [sys.executable, "-c", f"{code}; a = time.monotonic(); assert a <= time.monotonic() < a + 60"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n", "all of Python's clocks jump, but for the one that measures"
    return environment


def seconds_of(directory: Path) -> list[float]:
    """All durations that a run has recorded."""
    report = json.loads((directory / "report.json").read_text())
    stages = json.loads((directory / "stages.json").read_text())
    return [*(stage["seconds"] for stage in stages.values()), report["search"]["seconds"], *report["stages"].values()]


@pytest.mark.slow
def test_a_clock_that_jumps_back_changes_nothing(backwards: dict[str, str], tmp_path: Path) -> None:
    alone, directory = tmp_path / "alone", tmp_path / "run"
    run_here(alone, *TINY, "num_threads=1")
    begin = time.monotonic()
    process = start(directory, *TINY, "num_threads=1", **backwards)
    wait_until(lambda: num_trials(directory) >= 5 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)
    for file in directory.rglob("*"):
        os.utime(file, (2**32, 2**32))  # from the future, as the clock has it
    process = start(directory, *TINY, "num_threads=1", **backwards)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    most = time.monotonic() - begin
    assert (directory / "trials.jsonl").read_bytes() == (alone / "trials.jsonl").read_bytes()
    reports = [json.loads((place / "report.json").read_text()) for place in (directory, alone)]
    assert all(reports[0][key] == reports[1][key] for key in ("best", "baselines", "front"))
    assert all(0 <= seconds < most for seconds in seconds_of(directory))
    timed = re.findall(r"\d+/\d+  (?:in|eta) (\S+)", output)
    assert len(timed) >= 5
    assert all(re.fullmatch(r"0:\d\d:\d\d", shown) for shown in timed)
    began = [start["started"] for start in json.loads((directory / "environment.json").read_text())["starts"]]
    assert len(began) == 2, "starts stand in their order, whatever time it is"


@pytest.mark.slow
def test_a_sweep_under_a_clock_that_jumps_back_does_nothing_twice(backwards: dict[str, str], tmp_path: Path) -> None:
    sweep = ("--multirun", "task=cost", "logger=none", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    begin = time.monotonic()
    for said in (0, 2):
        process = start(tmp_path / "sweep", *sweep, **backwards)
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, output
        assert output.count("finished before, skipped") == said
    records = [read_record(path.parent) for path in (tmp_path / "sweep").glob("*/job.json")]
    assert len(records) == 2
    for record in records:
        assert record is not None
        assert record.state is JobState.FINISHED
        assert record.seconds is not None
        assert 0 <= record.seconds < time.monotonic() - begin


NO_FLOCK = (
    "import errno, fcntl, os, warnings; warnings.simplefilter('ignore')\n"
    "def missing(*_): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\n"
    "fcntl.flock = missing\n"
)
"""A file system without locks, where the file is the lock."""


@pytest.mark.parametrize("without", ["", NO_FLOCK])
def test_a_lock_is_held_as_long_as_its_process_lives_whatever_time_it_is(
    without: str, backwards: dict[str, str], tmp_path: Path
) -> None:
    path, environment = tmp_path / ".lock", {**os.environ, **backwards}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    begin = f"{without}import time; from pathlib import Path; from tmpq_exp import locks; path = Path({str(path)!r})\n"
    hold = f"{begin}locks.hold(path); print('held', flush=True); time.sleep(600)"
    look = (
        f"{begin}print(locks.is_held(path))\n"
        "try: locks.hold(path)\n"
        "except locks.LockedError: print('left to it')\n"
        "else: print('taken over')"
    )

    def looked() -> list[str]:
        done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    with subprocess.Popen([sys.executable, "-c", hold], env=environment, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        os.utime(path, (0, 0))  # as old as can be
        found = looked()
        holder.kill()
        holder.wait()
    assert found == ["True", "left to it"]
    assert looked()[-1] == "taken over"


@pytest.fixture
def slow(library: Path, tmp_path: Path) -> dict[str, str]:
    """Environment of a process that waits 0.2 s for every opening, renaming and flushing of a file below ``run``."""
    environment = {
        "LD_PRELOAD": str(library),
        "TMPQ_EXP_TEST_SLOW_FOLDER": str(tmp_path / "run"),
        "TMPQ_EXP_TEST_SLOW_MILLISECONDS": "200",
    }
    code = (
        "import os, time, pathlib; begin = time.monotonic(); path = pathlib.Path('run_of_others')\n"
        "with path.open('w') as file: os.fsync(file.fileno())\n"
        "path.replace('run_too'); pathlib.Path('other').touch(); print(time.monotonic() - begin >= 0.6)"
    )
    code = code.replace("'run", f"'{tmp_path}/run")
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n", "three waits at least"
    return environment


@pytest.mark.slow
def test_a_slow_file_system_changes_nothing(slow: dict[str, str], tmp_path: Path) -> None:
    alone, directory = tmp_path / "alone", tmp_path / "run"
    run_here(alone, *TINY, "num_threads=1")
    process = start(directory, *TINY, "num_threads=1", **slow)
    wait_until(lambda: num_trials(directory) >= 8 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)
    recorded = (directory / "trials.jsonl").read_bytes()
    process = start(directory, *TINY, "num_threads=1", **slow)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert (directory / "trials.jsonl").read_bytes() == (alone / "trials.jsonl").read_bytes()
    assert (alone / "trials.jsonl").read_bytes().startswith(recorded[: recorded.rfind(b"\n") + 1])
    reports = [json.loads((place / "report.json").read_text()) for place in (directory, alone)]
    assert all(reports[0][key] == reports[1][key] for key in ("best", "baselines", "front"))
