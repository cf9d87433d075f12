"""Owns what happens when a sweep ends, well or not: the list of its jobs is written, printed, and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

_directories: list[Path] = []
"""Directory of the sweep that this process has started, if it has."""


class RememberSweep(Callback):
    """Hydra's callback that notes where the sweep of this process has its jobs."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """See ``RememberSweep``."""
        _directories[:] = [Path(str(config.hydra.sweep.dir))]


def directory() -> Path | None:
    """Directory of the sweep that this process has started; None outside a sweep."""
    return _directories[0] if _directories else None


def say_end() -> int:
    """Write ``sweep.html`` into the directory of the sweep, print its jobs, and say how to go on.

    Returns:
        Exit status: 0 if every job is done, or there is none.
    """
    place = directory()
    if place is None or not place.is_dir():
        return 0
    from tmpq_exp.sweep import conclude  # here, because a sweep that is refused needs no torch

    return conclude(place)
