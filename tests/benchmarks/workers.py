"""Candidates of the default job in an hour: two single-threaded workers against one."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.benchmarks.timing import Measurement, at_least, measurement
from tmpq_exp.__main__ import conf_dir
from tmpq_exp.calibrating import calibrate
from tmpq_exp.config import from_plain, register_schema
from tmpq_exp.elastic import RayExecutor
from tmpq_exp.experiment import Experiment, prepare, random_candidates
from tmpq_exp.progress import quiet_lightning
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.search.executor import Executor
from tmpq_exp.search.objective import Objective
from tmpq_exp.search.trials import TrialLog

SCALING_GOAL = 1.7
"""Fewest times as many candidates an hour that two workers on two cores measure."""


def two_workers(rounds: int, candidates_a_round: int = 6, *settings: str) -> Measurement:
    """Candidates an hour of two workers on Ray over those of one, each with one thread.

    Workers are up and hold what candidates are compared with before the time is taken, as in a search but for its
    first generation. In a round one side measures after the other; which goes first alternates.

    Args:
        rounds: Rounds, at least 1.
        candidates_a_round: Candidates that each side measures in a round.
        settings: Overrides of the default job, to make it smaller.
    """
    ratios = []
    with _driver(settings) as (experiment, config), _room_for(3):
        objective = experiment.objective("search", experiment.config.objective.num_images)
        one, two = (_executor(experiment, config, count) for count in (1, 2))
        for executor in (one, two):  # several times over, so that every worker has had one
            _seconds(executor, objective, random_candidates(experiment, 4))
        candidates = random_candidates(experiment, candidates_a_round)
        for index in range(rounds):
            taken = {e: _seconds(e, objective, candidates) for e in ((one, two) if index % 2 else (two, one))}
            ratios.append(taken[one] / taken[two])
    name = "candidates an hour, two workers / one worker, ddpm_digits"
    line = at_least(SCALING_GOAL, measurement(name, ratios, "x", None))
    return replace(line, device=line.device.rpartition(",")[0] + ", 1 thread a worker")


def _executor(experiment: Experiment, config: dict[str, Any], num_workers: int) -> RayExecutor:
    settings = replace(experiment.config.executor, num_workers=num_workers)
    return RayExecutor(replace(experiment, config=replace(experiment.config, executor=settings)), config)


def _seconds(executor: Executor, objective: Objective, candidates: Sequence[Any]) -> float:
    start = time.perf_counter()
    assert len(list(executor.measure(objective, candidates))) == len(candidates)
    return time.perf_counter() - start


@contextmanager
def _room_for(num_workers: int) -> Iterator[None]:
    """A cluster of this host that takes so many single-threaded workers, of which idle ones cost nothing."""
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=num_workers, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _driver(settings: Sequence[str]) -> Iterator[tuple[Experiment, dict[str, Any]]]:
    """The default job after a rough calibration, in a directory that is thrown away, and its configuration."""
    quiet_lightning()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    register_schema()
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["executor=ray", "calibration=ranges", "logger=none", *settings]
        places = [f"paths.run_dir={folder}/run", f"paths.cache_dir={folder}/cache"]
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            composed = compose("config", [*overrides, *places])
        config: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        run = RunDirectory.claim(Path(folder) / "run", config)
        experiment = prepare(from_plain(config), run, TrialLog(run.trials), on_trial=lambda trial: None)
        try:
            experiment.ready_metrics()
            calibrate(experiment)
            yield experiment, config
        finally:
            torch.set_num_threads(threads)
