"""Several processes of one run: they share candidates, write what one writes, and end together."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.disturbances import Measurements, injected
from tests.running import TIMEOUT, TINY, num_trials, run_here, start, wait_until
from tmpq_exp.__main__ import conf_dir
from tmpq_exp.calibrating import calibrate
from tmpq_exp.config import UserError, from_plain, register_schema
from tmpq_exp.experiment import Experiment, prepare
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.ranks import Failure
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.search.trials import TrialLog
from tmpq_exp.worker import Blueprint, Order, Worker
from tmpq_exp.zoo.weights import read_tensors

TWO = ("trainer.devices=2",)
NUM_SEARCHED = 13
"""Trials of the search and of its baselines."""

LEARNED = (
    *(override for override in TINY if override != "calibration=ranges"),
    *("calibration=uniform_prefix", "calibration.num_images=4", "calibration.num_timesteps=2"),
    *("calibration.weight_iterations=2", "calibration.act_iterations=2", "calibration.batch_size=4", "num_threads=1"),
)
"""As ``TINY``, with bit widths that are learned."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    directory = tmp_path_factory.mktemp("ranks") / "alone"
    run_here(directory, *TINY)
    return directory


@pytest.fixture(scope="module")
def learned_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that learns bit widths."""
    directory = tmp_path_factory.mktemp("learned") / "alone"
    run_here(directory, *LEARNED)
    return directory


def finish(process: subprocess.Popen[str], *statuses: int) -> str:
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode in (statuses or (0,)), output
    return output


def children(process: subprocess.Popen[str]) -> list[int]:
    """Processes that a process has started."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in listed]


def same_end(directory: Path, alone: Path) -> None:
    assert (directory / "trials.jsonl").read_bytes() == (alone / "trials.jsonl").read_bytes()
    recipes = [json.loads((place / "recipe.json").read_text()) for place in (directory, alone)]
    assert recipes[0]["candidate"] == recipes[1]["candidate"]
    reports = [json.loads((place / "report.json").read_text()) for place in (directory, alone)]
    for key in ("best", "baselines", "front", "evidence"):
        assert reports[0][key] == reports[1][key]


def same_calibration(directory: Path, alone: Path) -> None:
    states = [read_tensors(place / "supernet.safetensors", "quantizers") for place in (directory, alone)]
    assert states[0][1]["inputs"] == states[1][1]["inputs"]
    assert states[0][0].keys() == states[1][0].keys()
    assert all(torch.equal(states[0][0][key], states[1][0][key]) for key in states[0][0])
    records = [json.loads((place / "stages.json").read_text())["calibrate"]["result"] for place in (directory, alone)]
    assert records[0] == records[1]
    assert not (directory / "calibration").exists()


def lose_rank_1(directory: Path, count: int) -> bytes:
    """Start two ranks, kill the second when so many trials are recorded, and give what they left behind."""
    lose_rank_1_when(lambda: num_trials(directory) >= count, directory, TINY)
    return (directory / "trials.jsonl").read_bytes()


def lose_rank_1_when(moment: Callable[[], bool], directory: Path, overrides: tuple[str, ...]) -> None:
    """Start two ranks, kill the second at a moment, and look at what the run says and has measured."""
    measurements = Measurements(directory)
    process = start(directory, *overrides, *TWO, **injected(measurements.prepare))
    wait_until(lambda: moment() or process.poll() is not None)
    os.kill(children(process)[0], signal.SIGKILL)
    output = finish(process, 1, -signal.SIGKILL)  # rank 0 sees it, or Lightning's observer where rank 0 is at work
    (said,) = [line for line in output.splitlines() if line.startswith("tmpq-exp: ")]
    assert "rank of this run has stopped" in said
    assert "start again with the same hydra.run.dir" in said
    assert "Traceback" not in output
    measurements.check(2)


def test_two_ranks_write_what_one_writes_until_one_is_lost(alone: Path, tmp_path: Path) -> None:
    whole, found = (alone / "trials.jsonl").read_bytes(), lose_rank_1(tmp_path / "run", NUM_SEARCHED)
    assert whole.startswith(found)
    assert NUM_SEARCHED <= found.count(b"\n") < whole.count(b"\n")
    run_here(tmp_path / "run", *TINY)
    same_end(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_ranks_go_on_behind_a_lost_one(alone: Path, tmp_path: Path) -> None:
    before = lose_rank_1(tmp_path / "run", 4)
    measurements = Measurements(tmp_path / "run")
    measurements.go_on()
    finish(start(tmp_path / "run", *TINY, *TWO, **injected(measurements.prepare)))
    measurements.check(0)
    assert (tmp_path / "run" / "trials.jsonl").read_bytes().startswith(before)
    same_end(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(learned_alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    finish(start(directory, *LEARNED, *TWO))
    same_calibration(directory, learned_alone)
    same_end(directory, learned_alone)


def units(directory: Path) -> dict[Path, int]:
    """Finished units of a calibration, with the time each was written at."""
    return {path: path.stat().st_mtime_ns for path in (directory / "calibration").glob("unit_*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_calibration_goes_on_behind_a_lost_rank(ranks: int, learned_alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    lose_rank_1_when(lambda: len(units(directory)) >= 5, directory, LEARNED)
    before = units(directory)
    assert len(before) >= 5
    process = start(directory, *LEARNED, f"trainer.devices={ranks}")
    wait_until(lambda: len(units(directory)) > len(before) or process.poll() is not None)
    kept = units(directory)
    assert not kept or before.items() <= kept.items()
    finish(process)
    same_calibration(directory, learned_alone)
    same_end(directory, learned_alone)


@pytest.mark.slow
def test_units_of_a_killed_calibration_that_are_damaged_are_learned_again(learned_alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = start(directory, *LEARNED)
    wait_until(lambda: len(units(directory)) >= 5 or process.poll() is not None)
    process.kill()
    process.communicate(timeout=TIMEOUT)
    whole, short, empty, changed, *_ = sorted(units(directory))
    short.write_bytes(short.read_bytes()[:-100])
    empty.write_bytes(b"")
    changed.write_bytes(changed.read_bytes()[:-8] + b"\1\2\3\4\5\6\7\0")
    said = [line for line in finish(start(directory, *LEARNED)).splitlines() if "what it held is found again" in line]
    assert [path.name in line for path, line in zip((short, empty, changed), said, strict=True)] == [True] * 3
    assert not whole.exists()
    same_calibration(directory, learned_alone)
    same_end(directory, learned_alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 8])
def test_ranks_end_with_rank_0_and_one_process_takes_over(count: int, alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = start(directory, *TINY, *TWO)
    wait_until(lambda: num_trials(directory) >= count)
    process.kill()
    process.communicate(timeout=60)  # comes back when the pipe is closed: the other rank has ended too
    run_here(directory, *TINY)
    same_end(directory, alone)


@pytest.mark.slow
def test_ranks_end_with_rank_0_before_they_have_met(tmp_path: Path) -> None:
    process = start(tmp_path / "run", *TINY, *TWO)
    wait_until(lambda: any(b"tmpq_exp" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(process)))
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ranks_killed_at_random_moments_change_nothing(seed: int, alone: Path, tmp_path: Path) -> None:
    directory, rng, num_killed = tmp_path / "run", random.Random(seed), 0
    measurements = Measurements(directory)
    for _ in range(9):
        process = start(directory, *TINY, *TWO, **injected(measurements.prepare))
        time.sleep(rng.uniform(1, 20))
        is_killed = process.poll() is None
        if is_killed:
            os.kill(rng.choice([process.pid, *children(process)]), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in ((1, -signal.SIGKILL) if is_killed else (0,)), output
        assert "Traceback" not in output
        num_killed += is_killed
        measurements.check(2 * is_killed)
        if num_killed == 3:
            break
        if not is_killed:  # it has ended, in spite of the kills before: from the beginning
            same_end(directory, alone)
            shutil.rmtree(directory)
            measurements.go_on()
    assert num_killed == 3
    finish(start(directory, *TINY, *TWO, **injected(measurements.prepare)))
    measurements.check(0)
    same_end(directory, alone)


@pytest.mark.slow
def test_three_ranks_that_a_cluster_has_started(alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    job = {
        "SLURM_JOB_ID": "31415",
        "SLURM_JOB_NAME": "search",
        "SLURM_NTASKS": "3",
        "SLURM_NTASKS_PER_NODE": "3",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
    }
    ranks = {str(rank): {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(3)}
    overrides = (*TINY, "trainer=slurm", "trainer.accelerator=cpu")
    tasks = [start(directory, *overrides, **job, **own) for own in ranks.values()]
    outputs = [finish(task) for task in tasks]
    assert ["Best found" in output for output in outputs] == [True, False, False]
    same_end(directory, alone)


def test_memory_that_does_not_suffice_in_a_rank_is_said_as_such() -> None:
    for raised, expected in (
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryError),
        (KeyError("x"), RuntimeError),
    ):
        error = Failure.of(1, raised).error()
        assert type(error) is expected
        assert str(error).startswith(f"rank 1: {type(raised).__name__}: ")


def test_several_devices_need_a_strategy_of_ranks(tmp_path: Path) -> None:
    sharded = "+trainer.strategy._target_=lightning.pytorch.strategies.ModelParallelStrategy"
    with pytest.raises(UserError, match=r"trainer\.strategy must be ddp .* found ModelParallelStrategy"):
        run_here(tmp_path / "run", *TINY, *TWO, sharded)


def test_a_cluster_and_ranks_are_not_combined(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"executor=ray brings workers .* found 2 devices .* trainer\.devices=1"):
        run_here(tmp_path / "run", *TINY, *TWO, "executor=ray")


@pytest.fixture(scope="module")
def driver(alone: Path) -> tuple[Experiment, Worker]:
    """The run as the process that drives it has it after the calibration, and a worker of its run directory."""
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [*TINY, f"paths.run_dir={alone}"])
    resolved: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    run = RunDirectory(alone)
    with threads(1):
        experiment = prepare(from_plain(resolved), run, TrialLog(run.trials), on_trial=lambda trial: None)
        experiment.ready_metrics()
        calibrate(experiment)
        return experiment, Worker(Blueprint.here(resolved))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_worker_measures_what_the_run_recorded(driver: tuple[Experiment, Worker]) -> None:
    experiment, worker = driver
    with threads(1):
        objective = experiment.objective("search", experiment.config.objective.num_images)
        searched = [trial for trial in experiment.trials.of_phase("search") if objective.covers(trial)]
        order = Order.of(objective)
        assert not worker.knows(order)
        worker.begin(order, objective.beside())
        assert worker.knows(order)
        for trial in searched[:2]:
            assert worker.measure(order, Candidate.from_json(trial.candidate)).metrics == trial.metrics
        candidate = Candidate.from_json(searched[0].candidate)
        expected = experiment.module.images(candidate, range(8, 16), 5)
        assert worker.images(candidate, range(8, 16), 5).equal(expected)


def test_a_worker_that_would_measure_something_else_says_what(driver: tuple[Experiment, Worker]) -> None:
    experiment, worker = driver
    with threads(1):
        objective = experiment.objective("search", 8)
        order, beside = Order.of(objective), objective.beside()
        other = replace(order, parts=order.parts | {"torch": "0.1"}, key=("other", objective.state))
        with pytest.raises(UserError, match=r"would measure something else .*\(torch: '.*' there, '0\.1' here\)"):
            worker.begin(other, beside)
        with pytest.raises(UserError, match="its quantizers differ"):
            worker.begin(replace(order, key=(objective.fingerprint, "other")), beside)


def test_a_worker_without_the_run_directory_says_so(tmp_path: Path) -> None:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [*TINY, f"paths.run_dir={tmp_path}/nowhere"])
    resolved: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    with pytest.raises(UserError, match=r"nowhere holds no supernet\.safetensors on .* file system that all"):
        Worker(Blueprint.here(resolved))


@pytest.mark.slow
def test_static_ranges_are_found_once_shipped_and_read_by_workers(tmp_path: Path) -> None:
    static = (*TINY, "winograd=f4", "winograd.act_scales=static", "search.num_generations=1")
    directory = tmp_path / "run"
    run_here(directory, *static)
    report = json.loads((directory / "report.json").read_text())
    assert report["winograd_choice"] == "f4, with static activation scales"
    assert not any("recipe.json" in warning or "activation scales" in warning for warning in report["warnings"])
    found, _ = read_tensors(directory / "winograd_ranges.safetensors", "ranges")
    shipped, _ = read_tensors(directory / "recipe.safetensors", "state")
    assert {key for key in shipped if key.startswith("winograd.")} == found.keys()
    assert all(torch.equal(shipped[key], value) for key, value in found.items())
    trials = (directory / "trials.jsonl").read_text()
    run_here(directory, *static)
    assert (directory / "trials.jsonl").read_text() == trials

    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [*static, f"paths.run_dir={directory}"])
    resolved: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    with threads(1):
        ranges = Worker(Blueprint.here(resolved))._experiment.module.supernet.ranges
        assert {f"winograd.f{m}.{name}.v" for name, m in ranges} == {key for key in found if key.endswith(".v")}
        (directory / "winograd_ranges.safetensors").unlink()
        with pytest.raises(UserError, match=r"static ranges of Winograd layers: no file at .*winograd_ranges\."):
            Worker(Blueprint.here(resolved))
