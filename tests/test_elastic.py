"""Workers of a Ray cluster: calls are done once whatever is killed, and a run ends as one without them."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

from tests.running import TINY, num_trials, run_here, sorted_trials  # noqa: E402
from tmpq_exp.config import ExecutorConfig, UserError  # noqa: E402
from tmpq_exp.elastic import Actors  # noqa: E402
from tmpq_exp.elastic import cluster as connected  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two processors of this host; no dashboard, no telemetry."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def toys(**settings: Any) -> Actors:
    """Actors that add what they were built from; told to, they end themselves."""

    class Toy:
        def build(self, term: int) -> None:
            self.term = term

        def add(self, number: int) -> int:
            time.sleep(0.02)
            return self.term + number

        def pid(self) -> int:
            return os.getpid()

        def end(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def fail(self, error: Exception) -> None:
            raise error

    actor = ray.remote(Toy).options(num_cpus=1)
    return Actors(actor, 1000, ExecutorConfig(name="ray", **settings), "CPU", 1)


def worker_processes(name: str) -> list[int]:
    """Processes of actors of a class."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"ray::{name}".encode()):
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@contextmanager
def killing(name: str, seconds: float, run: Path | None = None, seed: int = 0) -> Iterator[list[int]]:
    """Kill an actor of a class at random moments, on average every so many seconds, while inside.

    Of a run, a trial is recorded between two kills, or a slow machine would never have a worker that is up; the first
    comes right behind the first trial, or a fast machine would be done before.
    """
    rng, over, killed = random.Random(seed), threading.Event(), list[int]()

    def kill() -> None:
        seen = 0
        while not over.wait(rng.uniform(0, 2 * seconds) if killed or run is None else 0.1):
            processes, before = worker_processes(name), seen
            if run is not None:
                seen = num_trials(run)
            if processes and (run is None or seen > before):
                killed.append(rng.choice(processes))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_calls_are_done_once_while_actors_are_killed() -> None:
    actors, done = toys(), list[tuple[int, int]]()
    assert actors.count == 2
    with killing("Toy", 0.7) as killed:
        for _ in range(10):
            done += actors.run("add", [(number,) for number in range(30)])
    assert sorted(done) == sorted(10 * [(number, 1000 + number) for number in range(30)])
    assert len(killed) >= 1


def test_workers_without_room_are_waited_for_by_nobody() -> None:
    actors = toys(num_workers=3)
    assert sorted(actors.run("add", [(number,) for number in range(20)])) == [(n, 1000 + n) for n in range(20)]


def test_work_that_ends_every_worker_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmpq_exp.elastic.MAX_LOSSES", 2)
    with pytest.raises(RuntimeError, match="2 workers were lost over the same work"):
        list(toys(num_workers=1).run("end", [()]))


def test_an_error_of_a_worker_is_one_of_the_run() -> None:
    actors = toys(num_workers=1)
    with pytest.raises(UserError, match=r"^a worker: no such folder$"):
        list(actors.run("fail", [(UserError("no such folder"),)]))
    with pytest.raises(RuntimeError, match=r"^a worker: KeyError: 'x'$"):
        list(actors.run("fail", [(KeyError("x"),)]))


def test_memory_that_does_not_suffice_is_said_as_such_and_costs_no_worker() -> None:
    actors = toys(num_workers=1)
    before = {pid for _, pid in actors.run("pid", [()] * 4)}
    for error in (MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(MemoryError, match=r"^a worker: "):
            list(actors.run("fail", [(error,)] * 4))
    assert {pid for _, pid in actors.run("pid", [()] * 4)} == before
    assert sorted(actors.run("add", [(1,), (2,)])) == [(0, 1001), (1, 1002)]


def test_a_cluster_without_room_is_said() -> None:
    class Never:
        def build(self, _: None) -> None:
            pass

    actor = ray.remote(Never).options(resources={"TPU": 1})
    settings = ExecutorConfig(name="ray", num_workers=1, start_timeout_seconds=0.2)
    with pytest.raises(UserError, match=r"no worker could be started in 0\.2 s .* takes 1 TPU, the cluster has 0"):
        list(Actors(actor, None, settings, "TPU", 1).run("build", [()]))


def test_no_cluster_at_an_address_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(UserError, match=r"^executor\.address: no Ray cluster at 127\.0\.0\.1:1 \(.*refused\)$"),
        connected(ExecutorConfig(name="ray", address="127.0.0.1:1")),
    ):
        pass


@pytest.mark.slow
def test_a_run_on_workers_that_are_killed_ends_as_one_without_them(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_here(alone, *TINY)
    with killing("RayWorker", 4, shared) as killed:
        run_here(shared, *TINY, "executor=ray")
    assert sorted_trials(shared) == sorted_trials(alone)
    reports = [json.loads((directory / "report.json").read_text()) for directory in (alone, shared)]
    assert reports[0]["best"] == reports[1]["best"]
    assert len(killed) >= 1


@pytest.mark.slow
def test_killing_workers_for_a_minute_loses_nothing(tmp_path: Path) -> None:
    many = [setting for setting in TINY if not setting.startswith("search.")]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_here(alone, *many, "search.num_generations=10")
    with killing("RayWorker", 4, shared, seed=1) as killed:
        run_here(shared, *many, "search.num_generations=10", "executor=ray")
    assert sorted_trials(shared) == sorted_trials(alone)
    indices = [json.loads(line)["index"] for line in (shared / "trials.jsonl").read_text().splitlines()]
    assert indices == list(range(len(indices)))
    reports = [json.loads((directory / "report.json").read_text()) for directory in (alone, shared)]
    assert reports[0]["best"] == reports[1]["best"]
    assert len(killed) >= 4
