"""What measures candidates for another process: a supernet of its own, built from the run directory."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.choices import has_static_ranges, used_tiles, winograd_spec
from tmpq_exp.config import UserError, from_plain
from tmpq_exp.experiment import Experiment, make_ready, prepare
from tmpq_exp.metrics.control import ControlledFrechet
from tmpq_exp.progress import quiet_lightning
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.static_ranges import load_ranges
from tmpq_exp.rundir import RunDirectory, bad_input
from tmpq_exp.search.objective import Measured, Objective
from tmpq_exp.search.protocol import Beside, Protocol
from tmpq_exp.search.trials import TrialLog
from tmpq_exp.winograd.scales import read_scales
from tmpq_exp.zoo.weights import read_tensors


@dataclass(frozen=True)
class Blueprint:
    """What a worker is built from.

    Args:
        config: The driving process's resolved configuration.
        directory: Its working directory, to which paths in the configuration are relative.
        num_threads: Its CPU threads, on which figures depend in the last bit.
    """

    config: dict[str, Any]
    directory: str
    num_threads: int

    @classmethod
    def here(cls, config: dict[str, Any]) -> Blueprint:
        """For workers that compute as this process does."""
        return cls(config, os.getcwd(), torch.get_num_threads())


def lay_out(blueprint: Blueprint, needed: str) -> Experiment:
    """The driving process's run, laid out in this one, which computes as that does.

    Args:
        blueprint: What it is built from.
        needed: What the run directory must hold, as ``RunDirectory`` calls it.

    Raises:
        UserError: If the run directory is not there.
    """
    quiet_lightning()
    os.chdir(blueprint.directory)
    torch.set_num_threads(blueprint.num_threads)
    config = from_plain(blueprint.config)
    run = RunDirectory(Path(config.paths.run_dir))
    file: Path = getattr(run, needed)
    if not file.exists():
        raise UserError(
            f"hydra.run.dir: {run.path.absolute()} holds no {file.name} on {socket.gethostname()}; a run "
            "directory must lie on a file system that all of its workers share"
        )
    return prepare(config, run, TrialLog(Path(os.devnull)), on_trial=lambda trial: None)


@dataclass(frozen=True)
class Order:
    """What candidates are to be measured by.

    Args:
        protocol: Which images.
        measures_quality: See ``Objective``.
        controlled: Whether the control stands beside them.
        parts: What the figures depend on, as the driving process has it.
        key: Content hash of those and of the quantizers.
    """

    protocol: Protocol
    measures_quality: bool
    controlled: bool
    parts: dict[str, Any]
    key: tuple[str, str]

    @classmethod
    def of(cls, objective: Objective) -> Order:
        """Order to measure by an objective of the supernet, one without further metrics and intervals."""
        assert not objective.further, "workers measure what a search goes by"
        assert not objective.bootstrap, "workers give no intervals"
        controlled = isinstance(objective.score, ControlledFrechet)
        parts, key = objective.fingerprint_parts, (objective.fingerprint, objective.state)
        return cls(objective.protocol, objective.measures_quality, controlled, parts, key)


class Worker:
    """A supernet that measures candidates; it writes nothing into the run directory.

    Args:
        blueprint: What it is built from; quantizers, transform scales and static ranges come from the run directory.

    Raises:
        UserError: If the run directory is not there.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self._experiment = lay_out(blueprint, "supernet")
        _load(self._experiment)
        make_ready(self._experiment.config, self._experiment.device, [self._experiment.metric])
        self._objectives: dict[tuple[str, str], Objective] = {}

    def knows(self, order: Order) -> bool:
        """Whether it measures by this order already."""
        return order.key in self._objectives

    def begin(self, order: Order, beside: Beside) -> None:
        """Measure by this order from now on.

        Args:
            order: What to measure by.
            beside: What the driving process has made to compare candidates with.

        Raises:
            UserError: If figures measured here would not be those that the driving process measures.
        """
        objective = self._experiment.objective_under(
            order.protocol, controlled=order.controlled, measures_quality=order.measures_quality
        )
        own, theirs = objective.fingerprint_parts, order.parts
        differing = [key for key in sorted(own.keys() | theirs.keys()) if own.get(key) != theirs.get(key)]
        if (objective.fingerprint, objective.state) != order.key:
            named = [f"{key}: {own.get(key)!r} there, {theirs.get(key)!r} here" for key in differing]
            raise UserError(
                f"a worker on {socket.gethostname()} would measure something else than this process "
                f"({'; '.join(named) or 'its quantizers differ'}); give all of them the same software and devices"
            )
        objective.adopt(beside)
        self._objectives[order.key] = objective

    def measure(self, order: Order, candidate: Candidate) -> Measured:
        """Figures of a candidate, by an order that it knows."""
        return self._objectives[order.key].measure(candidate)

    def images(self, candidate: Candidate, indices: range, seed: int) -> Tensor:
        """One micro-batch of images on the CPU; see ``SupernetModule.images``.

        Where memory does not suffice it is not halved here: the driving process makes all again in smaller ones.
        """
        return self._experiment.module.images(candidate, indices, seed).cpu()


def _load(experiment: Experiment) -> None:
    """Quantizers, transform scales and static ranges that the run has found."""
    run, config, supernet = experiment.run, experiment.config, experiment.module.supernet
    with bad_input():
        state, _ = read_tensors(run.supernet, "quantizers of the supernet")
        supernet.load_quantizer_state(state, str(run.supernet))
        for m in used_tiles(config):
            spec = winograd_spec(config, m)
            experiment.winograd[m] = spec, read_scales(run.winograd_scales, spec)
        supernet.set_winograd(experiment.winograd)
        if has_static_ranges(config):
            ranges, _ = read_tensors(run.winograd_ranges, "static ranges of Winograd layers")
            load_ranges(supernet, ranges, str(run.winograd_ranges))
    experiment.module.to(experiment.device)
