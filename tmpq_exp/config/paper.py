"""Schema of what a preset reproduces: the published figures, under which protocol, and what a full run costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from tmpq_exp.config.checks import UserError

STAND_INS = ("ddpm", "ldm", "ldm_of_classes", "stable_diffusion", "resnet_cifar", "resnet_imagenet")
"""Families of small models with random weights, see ``tmpq_exp.zoo.stand_ins``."""


@dataclass
class PublishedFigure:
    """One figure of a paper, and what of ours it is compared with.

    Args:
        entry: Entry of the report (``best``, ``float_reference``, ``w8a8``, ...), or row of a classification.
        metric: Name of the metric; ``top1`` of a classification.
        figure: What was published; null where it is not known.
        tolerance: How far ours may be off to count as reproduced, in the metric's unit; null where figure is null.
        source: Who published it.
        remark: How it was measured differently from what this preset does; empty where nothing is known to differ.
    """

    entry: str = "best"
    metric: str = MISSING
    figure: float | None = None
    tolerance: float | None = None
    source: str = MISSING
    remark: str = ""

    def __post_init__(self) -> None:
        if (self.figure is None) != (self.tolerance is None):
            raise UserError(
                f"paper.figures: {self.entry}: figure and tolerance must both be given or both null, found "
                f"{self.figure} and {self.tolerance}"
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise UserError(f"paper.figures: {self.entry}: tolerance must be above 0, found {self.tolerance}")


@dataclass
class PaperConfig:
    """The row of a paper that a preset reproduces.

    Args:
        preset: Name of the preset, as in ``experiment=...``.
        title: The paper, with its number or venue.
        row: Which row of its tables.
        figures: Published figures.
        protocol: What the figures belong to: dotted key of the configuration -> its value. A run in which one of them
            is another was measured differently, and ``task=table`` says so.
        ours: What the paper does not say, as far as it is known here, and was chosen for this preset.
        expected_gpu_hours: What a full run takes on one GPU; null where nobody knows.
        hours_from: Where that number comes from.
    """

    preset: str = MISSING
    title: str = MISSING
    row: str = MISSING
    figures: list[PublishedFigure] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    ours: list[str] = field(default_factory=list)
    expected_gpu_hours: float | None = None
    hours_from: str = ""

    def __post_init__(self) -> None:
        named = [(figure.entry, figure.metric) for figure in self.figures]
        repeated = sorted({name for name in named if named.count(name) > 1})
        if repeated:
            raise UserError(f"paper.figures must not repeat an entry's metric, found {' '.join(repeated[0])} twice")
        if self.expected_gpu_hours is not None and not self.expected_gpu_hours > 0:
            raise UserError(f"paper.expected_gpu_hours must be above 0 or null, found {self.expected_gpu_hours}")
