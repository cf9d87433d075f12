"""Several processes of one run under Lightning's strategies: rank 0 drives and records, the others work for it.

Rank 0 alone runs the stages, so that ranks cannot disagree on what comes next. Candidates of a generation are shared
out in rounds of one a rank, and each round is recorded in the order in which its candidates were asked for: any number
of ranks writes the same ``trials.jsonl``. Bit widths that are calibrated apart from each other are shared out too (see
``tmpq_exp.sharing``); all else of the calibration is rank 0's. It writes the quantizers, and the others read them from
the run directory, so that all of them hold the same to the last bit, also where a GPU would not repeat it.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from tmpq_exp.config import Config, UserError
from tmpq_exp.experiment import Experiment
from tmpq_exp.learner import Learner
from tmpq_exp.overrides import is_bad_input
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.memory import is_out_of_memory
from tmpq_exp.search.objective import Measured, Objective
from tmpq_exp.search.protocol import Protocol
from tmpq_exp.trainers import group_trainer, num_ranks
from tmpq_exp.worker import Blueprint, Order, Worker

PATIENCE = timedelta(days=30)
"""How long a rank waits for the others, which may calibrate for days; a rank that dies is noticed at once."""

MAIN_PID = "TMPQ_EXP_RANK_0_PID"
"""Environment variable that tells a process which rank 0 has started it."""

BUILT: dict[str, Callable[..., Worker | Learner]] = {"build": Worker, "learner": Learner}
"""Calls that make a rank's worker, which answers all others; a new one takes the place of the one before."""

OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"
"""Logger of Lightning's observer of the processes that it started."""


@dataclass(frozen=True)
class Failure:
    """An error of a rank, as text.

    Args:
        rank: Whose.
        message: What went wrong.
        is_bad_input: Whether the user can set it right.
        is_out_of_memory: Whether less at once might do.
        details: The traceback.
    """

    rank: int
    message: str
    is_bad_input: bool
    is_out_of_memory: bool
    details: str

    @classmethod
    def of(cls, rank: int, error: Exception) -> Failure:
        """Of an error that is being handled."""
        message = str(error) if is_bad_input(error) else f"{type(error).__name__}: {error}"
        return cls(rank, message, is_bad_input(error), is_out_of_memory(error), traceback.format_exc())

    def error(self) -> Exception:
        """What rank 0 raises."""
        message = f"rank {self.rank}: {self.message}"
        kind = UserError if self.is_bad_input else MemoryError if self.is_out_of_memory else RuntimeError
        error: Exception = kind(message)
        error.add_note(self.details)
        return error


class Ranks:
    """The processes of a run, of which this is one.

    Rank 0 calls a method of the other ranks' workers, and all answer; between calls they wait for the next.

    Args:
        group: All of them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.count, self._group = dist.get_rank(group), dist.get_world_size(group), group
        self._waiting = True

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], own: Callable[[], Any]) -> list[Any]:
        """Results of a method of every rank's worker, rank 0's first.

        Args:
            method: Its name; a rank without arguments does nothing.
            arguments: For each of the ranks from 1 on.
            own: Does rank 0's part.

        Raises:
            ConnectionError: If a rank has stopped.
            UserError, MemoryError, RuntimeError: What went wrong in a rank, named.
        """
        self._waiting = False
        message = [(method, list(arguments))]
        with _talking():
            dist.broadcast_object_list(message, src=0, group=self._group)
        try:
            result: Any = own()
            raised = None
        except Exception as error:  # the others' answers are taken first, so that all ranks stay in step
            result, raised = None, error
        answers: list[Any] = [None] * self.count
        with _talking():
            dist.gather_object(None, answers, dst=0, group=self._group)
        self._waiting = True
        answers[0] = result
        if raised is not None:
            raise raised
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer.error()
        return answers

    def serve(self) -> None:
        """Answer rank 0's calls until it ends the run, or is gone."""
        worker: Worker | Learner | None = None
        while (message := self._hear()) is not None:  # ends with the run
            method, arguments = message
            answer: Any = None
            try:
                if self.rank > len(arguments):
                    pass
                elif method in BUILT:
                    worker = None  # of two there is no room
                    worker = BUILT[method](*arguments[self.rank - 1])
                else:
                    assert worker is not None
                    answer = getattr(worker, method)(*arguments[self.rank - 1])
            except Exception as error:
                answer = Failure.of(self.rank, error)
            with _talking():
                dist.gather_object(answer, None, dst=0, group=self._group)

    def _hear(self) -> Any:
        message: list[Any] = [None]
        with _talking():
            dist.broadcast_object_list(message, src=0, group=self._group)
        return message[0]

    def end(self) -> None:
        """Rank 0: let the others go, where they wait for a call."""
        if self.rank == 0 and self._waiting:
            with suppress(ConnectionError), _talking():
                dist.broadcast_object_list([None], src=0, group=self._group)


@contextmanager
def started(config: Config) -> Iterator[Ranks | None]:
    """The ranks that the trainer group asks for, while inside; None where it asks for one.

    On one host Lightning starts the others by the same command; under SLURM, or torchrun, they are there.

    Raises:
        UserError: If the trainer group has several devices in a way that gives no ranks.
    """
    trainer = group_trainer(config)
    if num_ranks(trainer) == 1:
        yield None
        return
    if not isinstance(trainer.strategy, DDPStrategy):
        raise UserError(
            f"trainer.strategy must be ddp where there are several devices, found {type(trainer.strategy).__name__}"
        )
    if config.executor.name != "local":
        raise UserError(
            f"executor={config.executor.name} brings workers of its own, found {num_ranks(trainer)} devices beside "
            "it; set trainer.devices=1"
        )
    ranks = _join(config)
    try:
        yield ranks
    finally:
        ranks.end()


def _join(config: Config) -> Ranks:
    """Start the other ranks unless they are there, and wait for them."""
    strategy = DDPStrategy(process_group_backend="gloo")  # what ranks tell each other is small, and on the CPU
    group_trainer(config, strategy=strategy)
    launcher, environment = strategy.launcher, strategy.cluster_environment
    assert launcher is not None
    assert environment is not None
    if environment.local_rank() > 0 and MAIN_PID in os.environ:
        Thread(target=_end_with, args=(int(os.environ[MAIN_PID]),), daemon=True, name="main-process-observer").start()
    elif not environment.creates_processes_externally:
        _refuse_sweep()
        _say_when_a_rank_dies()
        os.environ[MAIN_PID] = str(os.getpid())  # which the processes to be started find
    launcher.launch(strategy.setup_environment)
    if config.num_threads is not None:  # Lightning shares the processor out
        torch.set_num_threads(config.num_threads)
    with _talking():
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return Ranks(group)


def _refuse_sweep() -> None:
    """Ranks are started once a process, by its command line: not for every job of a sweep."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(
            "trainer: jobs of a sweep cannot start ranks of their own in one process; set trainer.devices=1, or give "
            "each job processes of its own by hydra/launcher=submitit_slurm"
        )


def _end_with(main_pid: int) -> None:
    """End this process within a second of the one that started it.

    A rank that waits for rank 0 to open the group would do so for half an hour where rank 0 was killed before.
    """
    while os.getppid() == main_pid:
        time.sleep(1)
    os._exit(1)


ADVICE = "what was recorded is safe, start again with the same hydra.run.dir"


@contextmanager
def _talking() -> Iterator[None]:
    """Turn a lost connection into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionResetError(errno.ECONNRESET, "another rank of this run has stopped", "trainer") from error


def _say_when_a_rank_dies() -> None:
    """Have Lightning's observer, which then kills the other ranks at once, say how to go on."""
    logger = logging.getLogger(OBSERVER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"tmpq-exp: trainer: a rank of this run has stopped; {ADVICE} (%(message)s)")
    )
    logger.addHandler(handler)


class RankExecutor:
    """Measures candidates on all ranks of a run, one a rank in every round.

    Args:
        ranks: They.
        experiment: The run.
        config: Its resolved configuration.
    """

    is_local = False

    def __init__(self, ranks: Ranks, experiment: Experiment, config: dict[str, Any]) -> None:
        self._ranks, self._experiment = ranks, experiment
        self._blueprint: Blueprint | None = Blueprint.here(config)
        self._begun: set[tuple[str, str]] = set()

    @property
    def num_workers(self) -> int:
        """Number of ranks."""
        return self._ranks.count

    def measure(self, objective: Objective, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measured]]:
        """See ``Executor``: in the order of ``candidates``."""
        self._build()
        order = Order.of(objective)
        if order.key not in self._begun:
            self._ranks.call("begin", [(order, objective.beside())] * (self._ranks.count - 1), lambda: None)
            self._begun.add(order.key)
        for start in range(0, len(candidates), self._ranks.count):
            own, *others = candidates[start : start + self._ranks.count]
            found = self._ranks.call(
                "measure",
                [(order, candidate) for candidate in others],
                partial(objective.measure_here, own),
            )
            yield from zip([own, *others], found, strict=False)  # ranks without a candidate answer None

    def images(self, candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        """See ``Executor``; micro-batches in rounds of one a rank."""
        self._build()
        batches, module = protocol.micro_batches(), self._experiment.module
        for start in range(0, len(batches), self._ranks.count):
            own, *others = batches[start : start + self._ranks.count]
            found = self._ranks.call(
                "images",
                [(candidate, indices, protocol.seed) for indices in others],
                partial(module.images, candidate, own, protocol.seed),
            )
            yield from found[: 1 + len(others)]

    def _build(self) -> None:
        """Have the other ranks build their workers, once the run directory holds what they need."""
        if self._blueprint is not None:
            blueprint, self._blueprint = self._blueprint, None
            self._ranks.call("build", [(blueprint,)] * (self._ranks.count - 1), lambda: None)
