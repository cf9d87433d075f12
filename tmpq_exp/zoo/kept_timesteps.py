"""A scheduler for diffusers pipelines that walks the kept timesteps of a recipe, whatever number of steps is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from tmpq_exp.diffusion.sampler import Sampler


class KeptTimestepsScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The steps of a sampler at kept timesteps.

    Args:
        sampler: Schedule and steps.
        kept: Kept timesteps, strictly descending.
    """

    config_name = "scheduler_config.json"
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, sampler: Sampler, kept: Sequence[int]) -> None:
        self.sampler, self.kept = sampler, tuple(kept)
        self.register_to_config(kept=list(self.kept), sampler=sampler.description)
        self.set_timesteps()

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Begin anew; ``num_inference_steps`` is what pipelines pass and changes nothing, the recipe has its own."""
        self.num_inference_steps = len(self.kept)
        self._told = [self.sampler.network_timestep(timestep) for timestep in self.kept]
        self.timesteps = torch.tensor(self._told, device=device)
        self._step = self.sampler.start(self.kept)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        eta: float = 0.0,
        return_dict: bool = True,
        **unused: Any,
    ) -> SchedulerOutput | tuple[Tensor]:
        """State at the next kept timestep.

        Args:
            model_output: The network's prediction.
            timestep: One of ``timesteps``; they are to be taken in order.
            sample: State.
            eta: 0, since the sampler is deterministic.
            return_dict: Whether to return an object with ``prev_sample`` or a tuple.
            unused: What pipelines pass to schedulers that draw noise.

        Raises:
            ValueError: If ``eta`` is not 0.
        """
        if eta != 0:
            raise ValueError(f"eta must be 0, found {eta}: the recipe's sampler is deterministic")
        state = self._step(sample, model_output, self._told.index(int(timestep)))
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    def __len__(self) -> int:
        return len(self.kept)
