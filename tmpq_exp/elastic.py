"""Workers of a Ray cluster that may come and go: one actor a device, each with a supernet from the run directory.

Ray starts the actors where a device is free, notices when one or its node is gone, and carries candidates and figures.
What is left to say here: an actor that is gone is asked for anew, and its candidate goes to the next one that is free.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

from tmpq_exp.config import ExecutorConfig, UserError
from tmpq_exp.experiment import Experiment
from tmpq_exp.overrides import is_bad_input
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.objective import Measured, Objective
from tmpq_exp.search.protocol import Beside, Protocol
from tmpq_exp.worker import Blueprint, Order, Worker

MAX_LOSSES = 10
"""Workers that one candidate may lose before the run stops: it may be what ends them."""

MAX_STARTS = 100
"""Workers in a row that may be lost before they measured anything."""


class RayWorker:
    """An actor: a worker that is built at the first call, so that what goes wrong then comes back as an error."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def build(self, blueprint: Blueprint) -> None:
        """Make the supernet."""
        self._worker = Worker(blueprint)

    def measure(self, order: Order, beside: Sequence[ray.ObjectRef[Beside]], candidate: Candidate) -> Measured:
        """Figures of a candidate; ``beside`` is fetched where this worker has not seen it."""
        assert self._worker is not None
        if not self._worker.knows(order):
            self._worker.begin(order, ray.get(beside[0]))
        return self._worker.measure(order, candidate)

    def images(self, candidate: Candidate, indices: range, seed: int) -> Tensor:
        """See ``Worker.images``."""
        assert self._worker is not None
        return self._worker.images(candidate, indices, seed)


class RayExecutor:
    """Measures candidates on the workers that a Ray cluster has at the moment.

    Args:
        experiment: The run.
        config: Its resolved configuration.
    """

    is_local = False

    def __init__(self, experiment: Experiment, config: dict[str, Any]) -> None:
        self._settings: ExecutorConfig = experiment.config.executor
        self._blueprint = Blueprint.here(config)
        threads, on_gpu = self._blueprint.num_threads, experiment.device.type == "cuda"
        self._resource, self._each = ("GPU", 1) if on_gpu else ("CPU", threads)
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": threads}
        self._actor: Any = ray.remote(RayWorker).options(**options)
        self._starting: dict[ray.ObjectRef[None], Any] = {}
        self._idle: list[Any] = []
        self._num_lost = 0
        self._beside: dict[tuple[str, str], ray.ObjectRef[Beside]] = {}

    @property
    def num_workers(self) -> int:
        """As many as are asked for, or as the cluster has devices for now; at least one."""
        if self._settings.num_workers is not None:
            return self._settings.num_workers
        return max(1, int(ray.cluster_resources().get(self._resource, 0)) // self._each)

    def measure(self, objective: Objective, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measured]]:
        """See ``Executor``."""
        order = Order.of(objective)
        if order.key not in self._beside:
            self._beside[order.key] = ray.put(objective.beside())
        beside = [self._beside[order.key]]  # in a list: fetched by those that have not seen it
        for index, measured in self._run("measure", [(order, beside, candidate) for candidate in candidates]):
            yield candidates[index], measured

    def images(self, candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        """See ``Executor``."""
        calls = [(candidate, indices, protocol.seed) for indices in protocol.micro_batches()]
        made: dict[int, Tensor] = {}
        wanted = 0
        for index, images in self._run("images", calls):
            made[index] = images
            while wanted in made:
                yield made.pop(wanted)
                wanted += 1

    def _run(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Number and result of every call of a worker's method, as they come."""
        missing, losses = list(reversed(range(len(calls)))), [0] * len(calls)
        running: dict[ray.ObjectRef[Any], tuple[Any, int]] = {}
        while missing or running:
            self._ask_for_workers(len(running))
            while missing and self._idle:
                actor, index = self._idle.pop(), missing.pop()
                running[getattr(actor, method).remote(*calls[index])] = actor, index
            done = self._next([*running, *self._starting], is_working=bool(running))
            if done not in running:
                self._take(done)
                continue
            actor, index = running.pop(done)
            try:
                result = _result(done)
            except RayActorError as error:
                missing.append(index)
                losses[index] += 1
                if losses[index] == MAX_LOSSES:
                    raise RuntimeError(f"{MAX_LOSSES} workers were lost over the same work ({error})") from error
                continue
            self._idle.append(actor)
            self._num_lost = 0
            yield index, result

    def _ask_for_workers(self, num_busy: int) -> None:
        """Ask Ray for as many actors as there should be; those without room wait until there is some."""
        for _ in range(self.num_workers - len(self._starting) - len(self._idle) - num_busy):
            actor = self._actor.remote()
            self._starting[actor.build.remote(self._blueprint)] = actor

    def _next(self, waiting: list[ray.ObjectRef[Any]], *, is_working: bool) -> ray.ObjectRef[Any]:
        """The first of these that is done.

        Raises:
            UserError: If no worker is there, and none could be started in time.
        """
        seconds = None if is_working else self._settings.start_timeout_seconds
        done, _ = ray.wait(waiting, timeout=seconds)
        if not done:
            raise UserError(
                f"executor: no worker could be started in {seconds:g} s (executor.start_timeout_seconds); each takes "
                f"{self._each} {self._resource}, the cluster has {ray.cluster_resources().get(self._resource, 0):g}"
            )
        return done[0]

    def _take(self, built: ray.ObjectRef[None]) -> None:
        """A worker that is ready, or was lost before it was."""
        actor = self._starting.pop(built)
        try:
            _result(built)
        except RayActorError as error:
            self._num_lost += 1
            if self._num_lost == MAX_STARTS:
                raise RuntimeError(f"{MAX_STARTS} workers in a row were lost at their start ({error})") from error
            return
        self._idle.append(actor)


def _result(done: ray.ObjectRef[Any]) -> Any:
    """Result of a call.

    Raises:
        RayActorError: If the actor was lost.
        UserError, RuntimeError: What went wrong in it.
    """
    try:
        return ray.get(done)
    except RayTaskError as error:
        cause = error.cause
        if is_bad_input(cause):
            raise UserError(f"a worker: {cause}") from error
        raise RuntimeError(f"a worker: {type(cause).__name__}: {cause}") from error


@contextmanager
def cluster(settings: ExecutorConfig) -> Iterator[None]:
    """A connection to the cluster that is named, or one of this host's own, while inside; nothing leaves the host.

    Raises:
        UserError: If there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if settings.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", include_dashboard=False, **quiet)
    else:
        try:
            ray.init(address=settings.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"executor.address: no Ray cluster at {settings.address} ({first_line})") from error
    try:
        yield
    finally:
        ray.shutdown()
