"""One candidate's images on their way through the metrics: taken batch by batch, compared, and forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from numpy.linalg import LinAlgError
from torch import Tensor

from tmpq_exp.metrics.metric import Batch, Measurement
from tmpq_exp.metrics.names import higher_is_better

Result = TypeVar("Result")


@dataclass(frozen=True)
class Made:
    """Images in [0, 1] with their latents, where a metric reads them; none of either where empty."""

    images: Tensor
    latents: Tensor | None = None

    def __getitem__(self, part: slice) -> Made:
        return Made(self.images[part], None if self.latents is None else self.latents[part])

    def to(self, device: torch.device) -> Made:
        """The same on a device."""
        return Made(self.images.to(device), None if self.latents is None else self.latents.to(device))

    def joined(self, other: Made) -> Made:
        """These and others behind them."""
        if not len(self.images):
            return other
        if self.latents is None or other.latents is None:
            return Made(torch.cat([self.images, other.images]))
        return Made(torch.cat([self.images, other.images]), torch.cat([self.latents, other.latents]))


NOTHING_MADE = Made(torch.empty(0))


class Evaluation:
    """Measures the images of one candidate.

    Args:
        started: Metric name -> its measurement.
        num_images: Images to measure; what is taken beyond them is left out.
        num_paired: Images, the first of them, that are compared with the reference's.
        reference: The float reference's; None where the candidate is the reference itself.
        prompts: Numbers of images -> what they should show; None for models without text.
        memos: (First image, number of images) -> features of the reference's; shared by evaluations with one reference.

    Attributes:
        own: The first ``num_paired`` images where the candidate is the reference, else nothing.
    """

    def __init__(
        self,
        started: Mapping[str, Measurement],
        num_images: int,
        num_paired: int,
        reference: Made | None,
        prompts: Callable[[range], tuple[str, ...]] | None,
        memos: dict[tuple[int, int], dict[int, Tensor]],
    ) -> None:
        self._started, self._num_images, self._num_paired = started, num_images, num_paired
        self._reference, self._prompts, self._memos = reference, prompts, memos
        self._done, self._problems = 0, dict[str, str]()
        self.own = NOTHING_MADE

    def take(self, made: Made) -> None:
        """Measure the next images; once there were NaN or infinity among them, none any more."""
        made = made[: self._num_images - self._done]
        if not made.images.isfinite().all():
            self._problems = dict.fromkeys(self._started, "images held NaN or infinity")
        if not len(made.images) or self._problems.keys() >= self._started.keys():
            return
        batch = self._batch(made)
        for name, measurement in self._started.items():
            self._attempt(name, partial(measurement.update, batch))
        self._done += len(made.images)

    def _batch(self, made: Made) -> Batch:
        first, count = self._done, len(made.images)
        if self._reference is None:
            self.own = self.own.joined(made[: max(0, self._num_paired - first)])
        paired = (self.own if self._reference is None else self._reference)[first : first + count]
        return Batch(
            made.images,
            paired.images,
            None if self._prompts is None else self._prompts(range(first, first + count)),
            made.latents,
            paired.latents,
            self._memos.setdefault((first, count), {}),
        )

    def values(self) -> tuple[dict[str, float], dict[str, str]]:
        """Figures, NaN where one could not be had, and why it could not."""
        metrics = {}
        for name, measurement in self._started.items():
            found = self._attempt(name, measurement.value)
            metrics[name] = math.nan if found is None else found
            perfect = math.inf if higher_is_better(name) else None  # a ratio to an error of zero
            if not math.isfinite(metrics[name]) and metrics[name] != perfect:
                self._problems.setdefault(name, f"{name} was {metrics[name]}")
        return metrics, self._problems

    def _attempt(self, name: str, action: Callable[[], Result]) -> Result | None:
        """Result of an action; None and a note why where features are too degenerate: that is the candidate's fault."""
        if name not in self._problems:
            try:
                return action()
            except (ValueError, LinAlgError) as error:
                self._problems[name] = f"{name}: {error}"
        return None
