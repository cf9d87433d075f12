"""Kills, full disks, clocks, damaged files, too little memory: nothing recorded is lost, and the end is the same."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tests import killing
from tests.disturbances import Measurements, break_candidates
from tmpq_exp.config import UserError, register_schema
from tmpq_exp.jobs import conf_dir, run_job
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.zoo.weights import read_tensors

COUNTS = (10, pytest.param(20, marks=pytest.mark.slow), pytest.param(21, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody disturbs, and its seconds."""
    directory = tmp_path_factory.mktemp("faults") / "whole"
    killing.warm_up()
    begin = time.monotonic()
    killing.finish(killing.start(directory), directory)
    return directory, time.monotonic() - begin


def trials_of(directory: Path) -> bytes:
    path = directory / "trials.jsonl"
    return path.read_bytes() if path.exists() else b""


def result_of(directory: Path) -> dict[str, Any]:
    """What a reader takes from a report, without times and machine."""
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    return {key: report[key] for key in ("best", "baselines", "front", "fingerprint", "calibration", "warnings")}


def assert_same_end(directory: Path, whole: Path) -> None:
    assert trials_of(directory) == trials_of(whole)
    assert result_of(directory) == result_of(whole)
    names = [sorted(path.name for path in place.iterdir()) for place in (directory, whole)]
    assert names[0] == names[1], "nothing is left over, nothing is missing"
    states = [read_tensors(place / "recipe.safetensors", "recipe")[0] for place in (directory, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def run_here(directory: Path, *overrides: str) -> None:
    """A job inside this process."""
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [*killing.TINY, *overrides, f"paths.run_dir={directory}"])
    threads = torch.get_num_threads()
    try:
        run_job(composed)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def copy(whole: tuple[Path, float], tmp_path: Path) -> Path:
    """The whole run as a kill left it in the middle of the search, to be disturbed."""
    directory = shutil.copytree(whole[0], tmp_path / "copy")
    lines = trials_of(directory).splitlines(keepends=True)
    (directory / "trials.jsonl").write_bytes(b"".join(lines[:6]))
    for name in ("report.json", "report.html", "recipe.json", "recipe.safetensors"):
        (directory / name).unlink()
    return directory


@pytest.mark.parametrize("count", COUNTS)
def test_kills_at_random_moments_lose_nothing(count: int, whole: tuple[Path, float], tmp_path: Path) -> None:
    directory, rng = tmp_path / "killed", random.Random(count)
    undisturbed, num_killed, seen, measurements = trials_of(whole[0]), 0, b"", Measurements(directory)
    for _ in range(3 * count):
        is_killed = killing.kill_at_random(directory, rng, 0.5 * whole[1], measurements.prepare)
        measurements.check(num_in_flight=is_killed)
        found = trials_of(directory)
        recorded = found[: found.rfind(b"\n") + 1]
        assert undisturbed.startswith(recorded), "none twice, none wrong, none out of turn"
        assert recorded.startswith(seen), "nothing that was recorded is lost"
        num_killed, seen = num_killed + is_killed, recorded
        if num_killed == count:
            break
        if not is_killed:  # it has ended, in spite of the kills before: from the beginning
            assert_same_end(directory, whole[0])
            shutil.rmtree(directory)
            measurements.go_on()
            seen = b""
    assert num_killed == count
    killing.finish(killing.start(directory, prepare=measurements.prepare), directory)
    measurements.check(num_in_flight=0)
    assert_same_end(directory, whole[0])


def limit_files_to(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_disk_that_is_full_again_and_again_loses_nothing(whole: tuple[Path, float], tmp_path: Path) -> None:
    directory = tmp_path / "full"
    undisturbed = trials_of(whole[0])
    stops = ("config.yaml", "trials.jsonl", "recipe.json", "supernet.safetensors", "report.html")
    for size in sorted((whole[0] / name).stat().st_size for name in stops):
        process = killing.start(directory, prepare=partial(limit_files_to, size - 100))
        output = killing.finish(process, directory, status=2)
        assert "File too large" in output
        assert "Make room and start again with the same hydra.run.dir" in output
        assert undisturbed.startswith(trials_of(directory))
    killing.finish(killing.start(directory), directory)
    assert_same_end(directory, whole[0])


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of its own at an empty directory, of this size."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this account may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount here")
def test_a_file_system_without_room_loses_nothing(whole: tuple[Path, float], tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    with small_disk(place, "400k"):
        directory = place / "run"
        process = killing.start(directory, "paths.cache_dir=" + str(tmp_path / "cache"))
        process.join(killing.TIMEOUT)
        assert process.exitcode == 2
        recorded = trials_of(directory)
        assert trials_of(whole[0]).startswith(recorded)
        subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
        process = killing.start(directory, "paths.cache_dir=" + str(tmp_path / "cache"))
        process.join(killing.TIMEOUT)
        assert process.exitcode == 0
        assert_same_end(directory, whole[0])


DAMAGED = ("config.yaml", "environment.json", "stages.json", "supernet.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\0" * 500])
def test_damaged_results_are_made_again(content: bytes, whole: tuple[Path, float], tmp_path: Path) -> None:
    directory = shutil.copytree(whole[0], tmp_path / "copy")
    for name in ("recipe.json", "recipe.safetensors", "report.json", "report.html", "model_card.md", "pareto.png"):
        (directory / name).write_bytes(content)
    run_here(directory)
    assert_same_end(directory, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("content", [b"", b"\0" * 500, None])
def test_a_damaged_file_that_a_run_reads_is_named(name: str, content: bytes | None, copy: Path) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    before = trials_of(copy)
    with pytest.raises(UserError, match=re.escape(str(copy))):
        run_here(copy)
    assert trials_of(copy) == before


@pytest.mark.slow
def test_a_changed_bit_of_the_quantizers_is_noticed(copy: Path) -> None:
    path, before = copy / "supernet.safetensors", trials_of(copy)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"supernet\.safetensors is damaged .*; remove it to calibrate again$"):
        run_here(copy)
    assert trials_of(copy) == before


def test_one_candidate_too_large_and_one_that_breaks_down_are_said_and_the_search_goes_on(
    whole: tuple[Path, float], copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Out of memory: the same figures within the tolerance between micro-batches. NaN: recorded with its cause."""
    lines = [json.loads(line) for line in trials_of(whole[0]).splitlines()]
    large, broken = (line for line in lines[-3:-1])
    assert large["phase"] == broken["phase"] == "final"
    monkeypatch.setattr(SupernetModule, "images", SupernetModule.images)  # as it shall be again
    break_candidates(large["key"], broken["key"], large["seed"], room=4)
    run_here(copy)
    found = [json.loads(line) for line in trials_of(copy).splitlines()]
    assert "out of memory at 8 images a forward" in capfd.readouterr().err
    assert found[:-3] == lines[:-3]
    figures = {name: found[-3][name] for name in ("metrics", "intervals")}
    assert found[-3] == lines[-3] | {"micro_batch": 4} | figures
    assert found[-3]["metrics"] == pytest.approx(lines[-3]["metrics"], rel=1e-3)
    assert found[-2]["error"] == "images held NaN or infinity"
    assert found[-2]["key"] == broken["key"]
    assert found[-1] == lines[-1]
    report = json.loads((copy / "report.json").read_text())
    assert any(re.match("1 evaluations ran at fewer images a forward", warning) for warning in report["warnings"])
