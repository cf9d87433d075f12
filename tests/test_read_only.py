"""Directories that cannot be written: one clear message, one exit status, and nothing that was recorded is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.running import TIMEOUT, TINY, num_trials, run_here, start, wait_until

BIND = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
"""Makes a folder read-only for one command, in a name space that ends with it."""

CHEAP = ("task=cost", "logger=none")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("read_only") / "alone"
    run_here(directory, *TINY, "num_threads=1")
    return directory


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


def tmpq(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tmpq_exp", *arguments]


def read_only(place: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A command for which a folder lies on a file system that is mounted read-only."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux) to mount a folder read-only for one command")
    bind = ["unshare", "--mount", "--map-root-user", "sh", "-c", BIND, str(place)]
    if run([*bind, "true"]).returncode != 0:
        pytest.skip("this account may not make a name space of its own to mount a folder read-only")
    return run([*bind, *command])


def without_rights(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A command that may write what its owner may write, and no more."""
    if os.geteuid() != 0:
        return run(command)
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv (util-linux) to run without root's rights")
    return run(["setpriv", "--bounding-set", "-dac_override", *command])


def assert_said(done: subprocess.CompletedProcess[str], place: Path, why: str) -> None:
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tmpq-exp: ")]
    assert str(place) in line
    assert why in line
    assert "Make it writable and start again with the same hydra." in line
    assert "Traceback" not in done.stderr


def content_of(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


@pytest.mark.slow
def test_a_killed_run_on_a_file_system_that_is_mounted_read_only_goes_on_when_it_is_not(
    alone: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    process = start(directory, *TINY, "num_threads=1")
    wait_until(lambda: num_trials(directory) >= 4 or process.poll() is not None)
    process.kill()
    process.communicate(timeout=TIMEOUT)
    before = content_of(directory)
    command = tmpq(*TINY, "num_threads=1", f"hydra.run.dir={directory}")
    assert_said(read_only(directory, command), directory, "Read-only file system")
    assert content_of(directory) == before
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert (directory / "trials.jsonl").read_bytes() == (alone / "trials.jsonl").read_bytes()
    reports = [json.loads((place / "report.json").read_text()) for place in (directory, alone)]
    assert reports[0]["best"] == reports[1]["best"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("hydra.run.dir=PLACE/run",), "run"),
        (("hydra.run.dir=PLACE",), ".lock"),
        (("--multirun", "hydra.sweep.dir=PLACE/sweep"), "sweep"),
        (("--multirun", "hydra.sweep.dir=PLACE"), "multirun.yaml"),
    ],
)
def test_a_directory_on_a_file_system_that_is_mounted_read_only_is_said(
    arguments: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    command = tmpq(*(argument.replace("PLACE", str(tmp_path)) for argument in arguments), *CHEAP)
    assert_said(read_only(tmp_path, command), tmp_path / named, "Read-only file system")


@pytest.mark.slow
@pytest.mark.parametrize("is_started", [False, True])
def test_a_directory_that_cannot_be_written_is_said(is_started: bool, alone: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if is_started:
        shutil.copytree(alone, place)
    else:
        place.mkdir()
    before = content_of(place)
    for path in (*place.iterdir(), place):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        done = without_rights(tmpq(*TINY, "num_threads=1", f"hydra.run.dir={place}"))
    finally:
        place.chmod(0o700)
    assert_said(done, place, "Permission denied")
    assert content_of(place) == before
