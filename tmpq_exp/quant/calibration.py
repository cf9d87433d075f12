"""Calibration as a LightningModule: quantizer parameters from states of the float sampling trajectory.

One epoch is one calibration unit. Today's only unit is the whole network, whose ranges are estimated in one pass over
the states; block-wise reconstruction adds its units as further epochs of the same module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.diffusion.schedule import TimestepSpacing, spaced_timesteps
from tmpq_exp.quant.quantizer import ActQuantizer
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.seeding import stream, stream_seed
from tmpq_exp.zoo.task import DiffusionTask


@dataclass(frozen=True)
class CalibrationState:
    """Inputs of one call of the float U-Net: states ``(B, C, H, W)`` at one timestep, and their conditioning."""

    x: Tensor
    timestep: int
    conditioning: dict[str, Tensor]


@torch.inference_mode()
def trajectory_states(task: DiffusionTask, config: CalibrationConfig, seed: int) -> list[CalibrationState]:
    """States of float sampling trajectories, equally many at each of ``num_timesteps`` equally spaced timesteps.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: calibration data from float trajectories (20 steps, 32 states each).
        Differs from the release in that the states come from this model and seed alone, not from a file.
    """
    num_timesteps = min(config.num_timesteps, task.num_train_timesteps)
    timesteps = spaced_timesteps(task.num_train_timesteps, num_timesteps, TimestepSpacing.TRAILING)
    indices = range(config.num_images)
    conditioning = task.conditioning(indices)
    states: list[CalibrationState] = []
    task.sample(
        task.unet,
        indices,
        timesteps,
        stream_seed(seed, "calibration"),
        on_state=lambda x, timestep: states.append(CalibrationState(x, timestep, conditioning)),
    )
    return states


class CalibrationModule(L.LightningModule):
    """Estimates the ranges of all quantizers of a supernet; manual optimization, no gradient.

    Args:
        supernet: Its quantizers are set when the epoch ends.
        states: Batches of the training dataloader.
        config: Values kept a quantizer.
        seed: Which activation values are kept.

    Raises:
        ValueError: At the end of the epoch, if a layer's activations held NaN or infinity; the layer is named.
    """

    def __init__(
        self, supernet: Supernet, states: Sequence[CalibrationState], config: CalibrationConfig, seed: int
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.supernet = supernet
        self._states, self._config, self._seed = list(states), config, seed
        self._values_per_batch = max(1, config.max_values // len(self._states))
        self._generator = stream(seed, "calibration values")

    def configure_optimizers(self) -> None:
        """None: ranges are estimated, not learned."""

    def train_dataloader(self) -> range:
        """Indices of the states, one batch each."""
        return range(len(self._states))

    def on_train_epoch_start(self) -> None:
        """Begin to observe."""
        for layer in self.supernet.layers:
            for quantizer in layer.act_quantizers():
                quantizer.start_observing()

    @torch.no_grad()
    def training_step(self, batch: int, batch_idx: int) -> None:
        """One call of the float network under observation; ``batch`` is the index of a state."""
        state = self._states[batch]
        x = state.x.to(self.device)
        timestep = torch.full((len(x),), state.timestep, device=self.device)
        with self.supernet.observing(self._observe):
            self.supernet(x, timestep, **{key: value.to(self.device) for key, value in state.conditioning.items()})

    def _observe(self, quantizer: ActQuantizer, x: Tensor) -> None:
        quantizer.observe(x, self._values_per_batch, self._generator)

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Estimate activation ranges from what was seen, and weight ranges from the float weights."""
        for layer in self.supernet.layers:
            try:
                for quantizer in layer.act_quantizers():
                    quantizer.finish_observing()
            except ValueError as error:
                raise ValueError(f"layer {layer.name}: {error}") from error
            weights = layer.weight_rows()
            if weights is not None:
                weights[0].estimate(weights[1])
        self.supernet.quantizers_changed()
