"""A whole run of the smallest size, inside the test's process or beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tmpq_exp.__main__ import conf_dir, run_job
from tmpq_exp.config import register_schema

TINY = (
    "debug=tiny",
    "calibration=ranges",
    "space.num_inference_steps=2",
    "evaluation.reference_steps=3",
    "evaluation.micro_batch=8",
    "evaluation.num_images=24",
    "evaluation.num_finalists=1",
    "objective.num_images=16",
    "objective.control_images=24",
    "search.population_size=5",
    "search.num_crossovers=5",
    "winograd.report_tiles=[]",
)
"""What a run of a few seconds is told."""

TIMEOUT = 200
"""Seconds after which a run, or a moment of it, is given up."""


def run_here(directory: Path, *overrides: str) -> None:
    """A job inside this process, without the seconds of imports."""
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [*overrides, f"paths.run_dir={directory}"])
    threads = torch.get_num_threads()
    try:
        run_job(composed)
    finally:
        torch.set_num_threads(threads)


def start(directory: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """A job of the command line in a process group of its own, with these variables added to its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "tmpq_exp", *overrides, f"hydra.run.dir={directory}"],
        cwd=directory.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(moment: Callable[[], bool], otherwise: str = "a moment never came") -> None:
    """Wait for a moment; give up with these words."""
    deadline = time.monotonic() + TIMEOUT
    while not moment():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def num_trials(directory: Path) -> int:
    """Whole lines of a run's trials so far."""
    path = directory / "trials.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sorted_trials(directory: Path) -> list[dict[str, Any]]:
    """Records of a run's trials without their line numbers, in an order of their own."""
    records = [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]
    for record in records:
        del record["index"]
    return sorted(records, key=lambda record: json.dumps(record, sort_keys=True))
