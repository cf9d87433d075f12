"""One line of the table, and how two sides are timed against each other."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Args:
        name: What was measured.
        ratio: Median over rounds, in ``unit``.
        unit: ``x float`` for a ratio of times, else what it says.
        goal: Largest ratio, or lowest rate a second, that is acceptable; None where none was set.
        met: Whether the median keeps the goal.
        spread: Interquartile range over rounds, in ``unit``.
        device: Processor and threads.
    """

    name: str
    ratio: float
    unit: str
    goal: float | None
    met: bool | None
    spread: float
    device: str


def measurement(
    name: str, values: Sequence[float], unit: str, goal: float | None, device: str | None = None
) -> Measurement:
    """Median and spread of one value a round; measured on this processor if no other device is named."""
    median = statistics.median(values)
    low, high = np.quantile(values, [0.25, 0.75]).tolist()
    met = None if goal is None else median <= goal
    device = device or f"{processor()}, {torch.get_num_threads()} threads"
    return Measurement(name, round(median, 4), unit, goal, met, round(high - low, 4), device)


def rate(name: str, rates: Sequence[float], goal: float | None) -> Measurement:
    """Candidates a second: the goal is a lowest one."""
    return at_least(goal, measurement(name, rates, "1/s", None))


def at_least(goal: float | None, line: Measurement) -> Measurement:
    """A line whose goal is the lowest value that is acceptable."""
    return replace(line, goal=goal, met=None if goal is None else line.ratio >= goal)


def device_name(device: torch.device | str) -> str | None:
    """Name of a GPU; None for the CPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Mean wall time of a call, until a GPU that was used has done its work."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


@torch.inference_mode()
def time_ratios(
    function: Callable[[], object], reference: Callable[[], object], rounds: int, round_seconds: float = 0.2
) -> list[float]:
    """Time of a function over that of its reference, once a round; which of them goes first alternates."""
    for warm in (function, reference):
        warm()
    repeats = max(1, round(round_seconds / seconds(reference))) if rounds > 1 else 1
    ratios = []
    for index in range(rounds):
        order = (function, reference) if index % 2 else (reference, function)
        times = {side: seconds(side, repeats) for side in order}
        ratios.append(times[function] / times[reference])
    return ratios
