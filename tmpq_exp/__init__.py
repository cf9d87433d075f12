"""tmpq_exp: joint search of timesteps, bit widths and Winograd tiles for cheap diffusion models."""

__version__ = "0.1.0"
