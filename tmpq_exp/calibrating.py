"""The calibration stage: quantizers of the supernet, and of single subnets at their own bits alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.config.identity import digest
from tmpq_exp.experiment import Experiment
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.blockwise import SAMPLED, BlockwiseReconstruction
from tmpq_exp.quant.calibration import CalibrationModule, Reconstruction, UnitFiles
from tmpq_exp.quant.states import CalibrationState, cached_states
from tmpq_exp.quant.supernet import Supernet, SupernetModule
from tmpq_exp.recipe import bit_choices
from tmpq_exp.rundir import bad_input
from tmpq_exp.sharing import Team
from tmpq_exp.zoo.weights import content_hash, read_tensors, write_tensors

KIND = "quantizers of the supernet"
"""What the stage's file holds, for messages."""

RESULT_FREE = ("states", "max_cache_bytes")
"""Settings of the calibration that change nothing but where things are: states count by what they hold."""


def calibrate(experiment: Experiment, team: Team | None = None) -> None:
    """Set all quantizers, or read them back if the same calibration was done before; goes on behind a killed one.

    Args:
        experiment: The run.
        team: Who learns bit widths beside this process, where each is learned behind a network of its own.
    """
    path, config = experiment.run.supernet, experiment.config.calibration
    learning = BlockwiseReconstruction if team is None or config.method == SAMPLED else team.reconstruction
    experiment.calibration = _calibrate(experiment, experiment.module, config, path, "calibrate", learning)


def recalibrated(experiment: Experiment, candidate: Candidate) -> SupernetModule:
    """A network that holds the candidate's own bits and nothing else, calibrated for them.

    All layers learn at once, each at its own bits, behind what stands before them at theirs; both variants of the
    calibration come to that where a layer has one bit width.
    """
    config = experiment.config
    module = SupernetModule(experiment.task, experiment.layers, *bit_choices(candidate), config.quant)
    module.supernet.set_winograd(experiment.winograd)
    module.supernet.set_ranges(experiment.module.supernet.ranges)
    path = experiment.run.recalibrated / f"{candidate.key()}.safetensors"
    settings = replace(config.calibration, method="sampled")
    _calibrate(experiment, module, settings, path, f"recalibrate {candidate.key()}")
    module.to(experiment.device)
    return module


def _calibrate(
    experiment: Experiment,
    module: SupernetModule,
    settings: CalibrationConfig,
    path: Path,
    name: str,
    reconstruction: Reconstruction = BlockwiseReconstruction,
) -> list[dict[str, Any]]:
    """Quantizers by these settings, kept in a file; what an earlier run to be reused has is copied.

    Returns:
        What each unit learned.
    """
    config, supernet = experiment.config, module.supernet
    module.to(experiment.device)
    with bad_input():
        states, source = cached_states(experiment.task, settings, config.seed, Path(config.paths.cache_dir))
    choices = [[q.bit_choices for _, q in layer.quantizers()] for layer in supernet.layers]
    counted = {key: value for key, value in asdict(settings).items() if key not in RESULT_FREE}
    seen = content_hash({f"{state.timestep}": state.x for state in states})
    inputs = [experiment.task.weights_hash, seen, counted, asdict(config.quant), choices, config.seed]
    metadata = {"model": experiment.task.name, "inputs": digest(inputs), "states": str(source)}

    def compute() -> list[dict[str, Any]]:
        earlier = experiment.earlier(path, digest(inputs), KIND)
        if earlier is not None:
            supernet.load_quantizer_state(read_tensors(earlier, KIND)[0], str(earlier))
            records: list[dict[str, Any]] = []
        else:
            files = UnitFiles(experiment.run.calibration, digest(inputs))
            records = _learn(experiment, supernet, settings, states, files, name, reconstruction)
        path.parent.mkdir(exist_ok=True)
        write_tensors(path, supernet.quantizer_state(), metadata)
        return records

    records: list[dict[str, Any]] = experiment.run.stage(name, inputs, [path], compute)
    with bad_input("; remove it to calibrate again"):
        state, found = read_tensors(path, KIND)
        if found.get("inputs") != digest(inputs):
            raise ValueError(f"{path} was made by another calibration")
        supernet.load_quantizer_state(state, str(path))
    return records


def _learn(
    experiment: Experiment,
    supernet: Supernet,
    settings: CalibrationConfig,
    states: list[CalibrationState],
    files: UnitFiles,
    name: str,
    reconstruction: Reconstruction,
) -> list[dict[str, Any]]:
    """Calibrate unit by unit; what a killed calibration had finished is taken over."""
    folder = files.folder / "activations"
    with ActivationStore(settings.max_cache_bytes, folder, experiment.device) as store, bad_input():
        module = CalibrationModule(supernet, states, settings, experiment.config.seed, store, files, reconstruction)
        total = module.num_epochs
        trainer = experiment.trainer(
            name, total, count_epochs=True, max_epochs=total, reload_dataloaders_every_n_epochs=1
        )
        trainer.fit(module)
    supernet.to(experiment.device)
    files.remove()
    return [asdict(record) for record in module.records]
