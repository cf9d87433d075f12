"""Runs of the command line that tests kill: cheap, forked from one process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  what a run imports late
import pytest
import torch

import tmpq_exp.pipeline  # noqa: F401
from tmpq_exp import __main__ as command_line

TINY = (
    *("debug=tiny", "quant=minmax", "calibration=ranges"),
    *("space.num_inference_steps=2", "evaluation.reference_steps=2"),
    *("evaluation.num_images=8", "evaluation.num_finalists=1", "evaluation.micro_batch=8", "objective.num_images=8"),
    *("objective.control_images=8", "objective.proxy_images=8", "search.population_size=4", "search.num_crossovers=4"),
    *("winograd.report_tiles=[]", "winograd.learning.num_steps=1"),
)
"""The whole line, as small as it gets: 17 trials."""

TIMEOUT = 240

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.killing"])

Prepare = Callable[[], None]


def warm_up() -> None:
    """Let the process be there from which all others are forked; it finds these tests, whatever else is called so."""
    path = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        process = _FORKS.Process(target=os.getpid)
        process.start()
    process.join(TIMEOUT)


def start(directory: Path, *overrides: str, prepare: Prepare | None = None) -> BaseProcess:
    """A run in a process of its own; what it prints goes to ``<directory>.log``.

    Args:
        directory: Run directory.
        overrides: Behind those of ``TINY``.
        prepare: Called in that process first; a function of a module.
    """
    process = _FORKS.Process(target=_run, args=(directory, (*TINY, *overrides), prepare))
    process.start()
    return process


def finish(process: BaseProcess, directory: Path, status: int = 0) -> str:
    """What it printed, once it has ended with this status."""
    process.join(TIMEOUT)
    output = log_of(directory)
    assert process.exitcode == status, output
    assert "Traceback" not in output
    return output


def log_of(directory: Path) -> str:
    """What all runs of a directory printed since the last ``finish``."""
    path = directory.with_suffix(".log")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.unlink(missing_ok=True)
    return text


def kill_at_random(directory: Path, rng: random.Random, longest_seconds: float, prepare: Prepare | None = None) -> bool:
    """Start a run and kill it, without a warning, within this time; False if it ended before."""
    process = start(directory, prepare=prepare)
    process.join(rng.uniform(0, longest_seconds))
    process.kill()
    process.join(TIMEOUT)
    assert process.exitcode in (0, -9), log_of(directory)
    return process.exitcode != 0


def _run(directory: Path, overrides: tuple[str, ...], prepare: Prepare | None) -> None:
    with directory.with_suffix(".log").open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["tmpq-exp", *overrides, f"hydra.run.dir={directory}"]
    if prepare is not None:
        prepare()
    status = 0
    try:
        command_line.main()
    except SystemExit as end:
        status = int(str(end.code))
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)  # the end of this process is not under test
