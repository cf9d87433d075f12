"""task=states: make the calibration states of a model, for all runs that share the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from tmpq_exp.config import Config, UserError
from tmpq_exp.quant.states import cached_states
from tmpq_exp.rundir import bad_input, writing
from tmpq_exp.zoo.task import DiffusionModel


def make_states(config: Config, resolved: dict[str, Any]) -> None:
    """Write the calibration states of a model into ``paths.cache_dir``, unless they are there, and say where.

    Args:
        config: Checked configuration.
        resolved: The same as plain data; not needed, every task takes it.

    Raises:
        ValueError: If a checkpoint, or the file that ``calibration.states`` names, is bad.
    """
    model = instantiate(config.model)
    if not isinstance(model, DiffusionModel):
        raise UserError(f"model: {type(model).__name__} makes no images, so it has no states")
    cache = Path(config.paths.cache_dir)
    with bad_input(), writing(cache):
        task = model.task()
        task.unet.to(instantiate(config.trainer)().strategy.root_device)
        states, path = cached_states(task, config.calibration, config.seed, cache)
    print(f"states  {path}\n        {len(states)} timesteps, {len(states[0].x)} images each")
