"""Workers of a Ray cluster that may come and go: one actor a device, each with a supernet from the run directory.

Ray starts the actors where a device is free, notices when one or its node is gone, and carries candidates and figures.
What is left to say here: an actor that is gone is asked for anew, and its candidate goes to the next one that is free.
"""

from __future__ import annotations

import logging
import os
import socket
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
from tmpq_exp.search.memory import is_out_of_memory
from tmpq_exp.search.objective import Measured, Objective
from tmpq_exp.search.protocol import Beside, Protocol
from tmpq_exp.worker import Blueprint, Order, Worker

MAX_LOSSES = 10
"""Workers that one candidate may lose before the run stops: it may be what ends them."""

ANSWER_SECONDS = 10
"""How long a cluster's address may take to answer."""

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


class Actors:
    """Actors of one class, as many as the cluster has room for, that do calls.

    Args:
        actor: The class, as an actor; its method ``build`` makes an instance ready.
        built_from: Argument of ``build``.
        settings: How many, and how long to wait for the first.
        resource: What each takes of the cluster: ``CPU`` or ``GPU``.
        each: How much of it.
    """

    def __init__(self, actor: Any, built_from: Any, settings: ExecutorConfig, resource: str, each: int) -> None:
        self._actor, self._built_from, self._settings = actor, built_from, settings
        self._resource, self._each = resource, each
        self._starting: dict[ray.ObjectRef[None], Any] = {}
        self._idle: list[Any] = []
        self._num_lost = 0

    @property
    def count(self) -> int:
        """As many as are asked for, or as the cluster has devices for now; at least one."""
        if self._settings.num_workers is not None:
            return self._settings.num_workers
        return max(1, int(ray.cluster_resources().get(self._resource, 0)) // self._each)

    def run(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Number and result of every call of a method, in the order in which they are done.

        A call whose actor was lost is made again, by another one; its result is given once.

        Args:
            method: Name of the method.
            calls: Arguments of each call.

        Raises:
            UserError: If no actor is there and none could be started in time, or a call found bad input.
            MemoryError: If memory did not suffice for a call.
            RuntimeError: If a call went wrong otherwise, or actors were lost too often.
        """
        running: dict[ray.ObjectRef[Any], tuple[Any, int]] = {}
        try:
            yield from self._done(method, calls, running)
        finally:  # after an error too those at work are there for the next call, which waits behind the present one
            self._idle += [actor for actor, _ in running.values()]

    def _done(
        self, method: str, calls: Sequence[tuple[Any, ...]], running: dict[ray.ObjectRef[Any], tuple[Any, int]]
    ) -> Iterator[tuple[int, Any]]:
        """``run``, with what is under way at the moment: actor and number by call."""
        missing, losses = list(reversed(range(len(calls)))), [0] * len(calls)
        while missing or running:  # every turn takes one result, or counts one loss, which is capped
            self._ask_for_more(len(running))
            while missing and self._idle:
                actor, index = self._idle.pop(), missing.pop()
                running[getattr(actor, method).remote(*calls[index])] = actor, index
            done = self._next([*running, *self._starting], is_working=bool(running))
            if done not in running:
                self._take(done)
                continue
            actor, index = running[done]
            try:
                result = _result(done)
            except RayActorError as error:
                del running[done]
                missing.append(index)
                losses[index] += 1
                if losses[index] == MAX_LOSSES:
                    raise RuntimeError(f"{MAX_LOSSES} workers were lost over the same work ({error})") from error
                continue
            del running[done]
            self._idle.append(actor)
            self._num_lost = 0
            yield index, result

    def _ask_for_more(self, num_busy: int) -> None:
        """Ask Ray for as many as there should be; those without room wait until there is some."""
        for _ in range(self.count - len(self._starting) - len(self._idle) - num_busy):
            actor = self._actor.remote()
            self._starting[actor.build.remote(self._built_from)] = actor

    def _next(self, waiting: list[ray.ObjectRef[Any]], *, is_working: bool) -> ray.ObjectRef[Any]:
        """The first of these that is done."""
        seconds = None if is_working else self._settings.start_timeout_seconds
        done, _ = ray.wait(waiting, timeout=seconds)
        if not done:
            raise UserError(
                f"executor: no worker could be started in {seconds:g} s (executor.start_timeout_seconds); each takes "
                f"{self._each} {self._resource}, the cluster has {ray.cluster_resources().get(self._resource, 0):g}"
            )
        return done[0]

    def _take(self, built: ray.ObjectRef[None]) -> None:
        """One that is ready, or was lost before it was."""
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
        UserError, MemoryError, RuntimeError: What went wrong in it.
    """
    try:
        return ray.get(done)
    except RayTaskError as error:
        cause = error.cause
        if is_bad_input(cause):
            raise UserError(f"a worker: {cause}") from error
        kind = MemoryError if is_out_of_memory(cause) else RuntimeError
        raise kind(f"a worker: {type(cause).__name__}: {cause}") from error


class RayExecutor:
    """Measures candidates on the workers that a Ray cluster has at the moment.

    Args:
        experiment: The run.
        config: Its resolved configuration.
    """

    is_local = False

    def __init__(self, experiment: Experiment, config: dict[str, Any]) -> None:
        blueprint = Blueprint.here(config)
        resource, each = ("GPU", 1) if experiment.device.type == "cuda" else ("CPU", blueprint.num_threads)
        taken = {"num_cpus": 1, "num_gpus": 1} if resource == "GPU" else {"num_cpus": each}
        actor = ray.remote(RayWorker).options(**taken)
        self._actors = Actors(actor, blueprint, experiment.config.executor, resource, each)
        self._beside: dict[tuple[str, str], ray.ObjectRef[Beside]] = {}

    @property
    def num_workers(self) -> int:
        """Workers that there are or should be."""
        return self._actors.count

    def measure(self, objective: Objective, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measured]]:
        """See ``Executor``."""
        order = Order.of(objective)
        if order.key not in self._beside:
            self._beside[order.key] = ray.put(objective.beside())
        beside = [self._beside[order.key]]  # in a list: fetched by those that have not seen it
        for index, measured in self._actors.run("measure", [(order, beside, candidate) for candidate in candidates]):
            yield candidates[index], measured

    def images(self, candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        """See ``Executor``; micro-batches are shared out."""
        calls = [(candidate, indices, protocol.seed) for indices in protocol.micro_batches()]
        made: dict[int, Tensor] = {}
        wanted = 0
        for index, images in self._actors.run("images", calls):
            made[index] = images
            while wanted in made:
                yield made.pop(wanted)
                wanted += 1


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
            host, _, port = settings.address.rpartition(":")
            if host:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
            ray.init(address=settings.address, **quiet)
        except (OSError, RuntimeError) as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"executor.address: no Ray cluster at {settings.address} ({first_line})") from error
    try:
        yield
    finally:
        ray.shutdown()
