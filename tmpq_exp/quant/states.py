"""Owns calibration states: inputs of the float U-Net along its own trajectories, and the files that keep them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.diffusion.schedule import TimestepSpacing, spaced_timesteps
from tmpq_exp.seeding import stream_seed
from tmpq_exp.zoo.task import DiffusionTask
from tmpq_exp.zoo.weights import content_hash, read_tensors, write_tensors

FORMAT = "calibration states 2"


@dataclass(frozen=True)
class CalibrationState:
    """Inputs of one call of the float U-Net: states ``(B, C, H, W)`` at one timestep, and their conditioning.

    With guidance B is twice the number of images, as in the call itself.
    """

    x: Tensor
    timestep: int
    conditioning: dict[str, Tensor]

    def first_image(self) -> CalibrationState:
        """The same with one image, for a look at the network."""
        return CalibrationState(self.x[:1], self.timestep, {key: v[:1] for key, v in self.conditioning.items()})

    def run(self, network: nn.Module, device: torch.device) -> Any:
        """What the network returns for it."""
        x = self.x.to(device)
        timestep = torch.full((len(x),), self.timestep, device=device)
        return network(x, timestep, **{key: value.to(device) for key, value in self.conditioning.items()})


@torch.no_grad()
def trajectory_states(task: DiffusionTask, num_images: int, num_timesteps: int, seed: int) -> list[CalibrationState]:
    """States of float sampling trajectories, equally many at each of ``num_timesteps`` equally spaced timesteps.

    Args:
        task: Float task; its U-Net's device does the sampling.
        num_images: Trajectories.
        num_timesteps: States a trajectory; at most as many as there are training timesteps.
        seed: Which trajectories.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: calibration data from float trajectories (20 steps, 32 states each).
        Differs from the release in that the states come from this model and seed alone, not from a file.
    """
    timesteps = spaced_timesteps(
        task.num_train_timesteps, min(num_timesteps, task.num_train_timesteps), TimestepSpacing.TRAILING
    )
    states: list[CalibrationState] = []
    task.latents(
        task.unet,
        range(num_images),
        timesteps,
        stream_seed(seed, "calibration"),
        on_call=lambda x, timestep, conditioning: states.append(CalibrationState(x, timestep, conditioning)),
    )
    return states


def _identity(task: DiffusionTask) -> dict[str, str]:
    """What states belong to: the model, its weights, schedule, sampler and conditions, and the shape of a state."""
    facts = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in task.state_fingerprint.items()
    }
    return {"model": task.name, **facts}


def states_path(task: DiffusionTask, config: CalibrationConfig, seed: int, cache_dir: Path) -> Path:
    """File in the cache that is named by everything its states depend on."""
    counts = {"images": str(config.num_images), "timesteps": str(config.num_timesteps), "seed": str(seed)}
    named = {**_identity(task), **counts, "format": FORMAT, "device": next(task.unet.parameters()).device.type}
    text = ";".join(f"{key}={value}" for key, value in named.items())
    key = content_hash({"name": torch.tensor(list(text.encode()), dtype=torch.uint8)})
    return cache_dir / f"states_{task.name}_{key}.safetensors"


def cached_states(
    task: DiffusionTask, config: CalibrationConfig, seed: int, cache_dir: Path
) -> tuple[list[CalibrationState], Path]:
    """States of a given file, of the cache, or freshly made ones that are then in the cache; and their file.

    Raises:
        ValueError: If a file is missing, damaged, or of another model, schedule, sampler, conditions or shape.
    """
    path = Path(config.states) if config.states else states_path(task, config, seed, cache_dir)
    if not config.states and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_states(path, task, trajectory_states(task, config.num_images, config.num_timesteps, seed))
    return read_states(path, task), path


def write_states(path: Path, task: DiffusionTask, states: list[CalibrationState]) -> None:
    """Write states of a task, atomically."""
    tensors = {
        "x": torch.stack([state.x for state in states]),
        "timesteps": torch.tensor([state.timestep for state in states]),
        **{f"conditioning.{key}": value for key, value in states[0].conditioning.items()},
    }
    write_tensors(path, tensors, {"format": FORMAT, **_identity(task)})


def read_states(path: Path, task: DiffusionTask) -> list[CalibrationState]:
    """States that were made for this task.

    Raises:
        ValueError: If the file is missing, damaged, or of another model, schedule, sampler, conditions or shape.
    """
    tensors, metadata = read_tensors(path, "calibration states")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"calibration states: {path} holds something else; a file of task=states was expected")
    for key, expected in _identity(task).items():
        if metadata.get(key) != expected:
            raise ValueError(
                f"calibration states: {path} was made for another {key}, found {metadata.get(key)}, expected {expected}"
            )
    conditioning = {
        key.removeprefix("conditioning."): value for key, value in tensors.items() if key.startswith("conditioning.")
    }
    x, timesteps = tensors.get("x"), tensors.get("timesteps")
    if x is None or timesteps is None or len(x) != len(timesteps) or x.shape[2:] != task.sample_shape:
        raise ValueError(f"calibration states: {path} is damaged; remove it and make it again with task=states")
    return [
        CalibrationState(batch.contiguous(memory_format=torch.channels_last), int(timestep), conditioning)
        for batch, timestep in zip(x, timesteps, strict=True)
    ]
