"""tmpq_exp: joint search of timesteps, bit widths and Winograd tiles for cheap diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmpq_exp.quantized_pipeline import load, save
    from tmpq_exp.recipe import CompressedModel, apply_recipe

__version__ = "0.1.0"
__all__ = ["CompressedModel", "__version__", "apply_recipe", "load", "save"]


def __getattr__(name: str) -> Any:
    """Import torch only when something needs it, so that a mistyped command line fails at once."""
    if name in ("CompressedModel", "apply_recipe"):
        from tmpq_exp import recipe

        return getattr(recipe, name)
    if name in ("load", "save"):
        from tmpq_exp import quantized_pipeline

        return getattr(quantized_pipeline, name)
    raise AttributeError(f"module 'tmpq_exp' has no attribute {name!r}")
