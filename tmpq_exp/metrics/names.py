"""What a metric's name says: in which direction it is better, and how values of either direction are compared."""

from __future__ import annotations

import math

HIGHER_IS_BETTER = ("psnr", "ssim", "clip", "inception_score", "accuracy", "latent_sqnr")
"""How names of metrics start whose larger values are better; all others are distances or errors."""


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric means better images (false for Frechet distances)."""
    return metric.startswith(HIGHER_IS_BETTER)


def loss(metric: str, value: float | None) -> float:
    """A value as a search minimises it: negated where larger is better; infinite where there is none."""
    if value is None:
        return math.inf
    return -value if higher_is_better(metric) else value


def value_of(metric: str, loss: float) -> float | None:
    """Inverse of ``loss``; None where it is infinite."""
    if not math.isfinite(loss):
        return None
    return -loss if higher_is_better(metric) else loss
