"""The stage that finds static ranges of Winograd layers on the states of the calibration."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tmpq_exp.choices import has_static_ranges
from tmpq_exp.config.identity import digest
from tmpq_exp.experiment import Experiment
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.states import cached_states
from tmpq_exp.quant.static_ranges import load_ranges, measuring_ranges_for_all_bits, ranges_state
from tmpq_exp.rundir import bad_input
from tmpq_exp.zoo.weights import content_hash, read_tensors, write_tensors

KIND = "static ranges of Winograd layers"
"""What the stage's file holds, for messages."""


def static_ranges(experiment: Experiment) -> None:
    """Give the supernet static ranges at every tile in use, or read them back if they were found before.

    What an earlier run to be reused has, of the same states, tiles and scales, is copied.

    The float model runs over the states of the calibration; see ``quant.static_ranges.measuring_ranges_for_all_bits``.
    Nothing is done where ``winograd.act_scales`` is dynamic. The data-free rule for tiles came before, with dynamic
    scales.

    Raises:
        UserError: If the states or a file of an earlier run cannot be used.
    """
    config, path, supernet = experiment.config, experiment.run.winograd_ranges, experiment.module.supernet
    if not has_static_ranges(config):
        return
    experiment.module.to(experiment.device)
    with bad_input():
        states, source = cached_states(experiment.task, config.calibration, config.seed, Path(config.paths.cache_dir))
    tiles = {m: (asdict(spec), scales.to_json()) for m, (spec, scales) in experiment.winograd.items()}
    seen = content_hash({f"{state.timestep}": state.x for state in states})
    inputs = [experiment.task.weights_hash, seen, tiles]
    metadata = {"model": experiment.task.name, "inputs": digest(inputs), "states": str(source)}

    @torch.no_grad()
    def measured() -> dict[str, Tensor]:
        with measuring_ranges_for_all_bits(supernet) as found, StageBar("winograd ranges", len(states)) as bar:
            for state in states:
                state.run(supernet, experiment.device)
                bar.advance()
        return ranges_state(found)

    def compute() -> int:
        earlier = experiment.earlier(path, digest(inputs), KIND)
        tensors = measured() if earlier is None else read_tensors(earlier, KIND)[0]
        write_tensors(path, tensors, metadata)
        return sum(len(state.x) for state in states)

    experiment.run.stage("winograd ranges", inputs, [path], compute)
    with bad_input("; remove it to measure again"):
        state, found = read_tensors(path, KIND)
        if found.get("inputs") != digest(inputs):
            raise ValueError(f"{path} was made from other states or scales")
        load_ranges(supernet, state, str(path))
