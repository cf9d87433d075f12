"""What a candidate is worth: the protocol of an evaluation, its fingerprint, and the evaluation itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from numpy.linalg import LinAlgError
from torch import Tensor

from tmpq_exp.cost import CostModel
from tmpq_exp.metrics.fidelity import mean_psnr_db
from tmpq_exp.metrics.frechet import FrechetMetric
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.rundir import digest
from tmpq_exp.search.trials import Trial, TrialLog, finite_metrics
from tmpq_exp.zoo.weights import content_hash

MicroBatches = Callable[[Candidate], Iterable[Tensor]]
"""Images of a candidate under a protocol, one micro-batch after the other."""


@dataclass(frozen=True)
class Protocol:
    """Which images an evaluation makes.

    Args:
        num_images: Number of images.
        seed: Seed of the image stream; search, selection and final evaluation have different ones.
        micro_batch: Images a forward.
    """

    num_images: int
    seed: int
    micro_batch: int

    def micro_batches(self) -> list[range]:
        """Image indices of every forward; the last one is whole too, so that an image never depends on their number."""
        return [range(i, i + self.micro_batch) for i in range(0, self.num_images, self.micro_batch)]

    def wanted(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """These micro-batches without the images beyond ``num_images``."""
        missing = self.num_images
        for images in batches:
            yield images[:missing]
            missing -= len(images)


class Objective:
    """Scores candidates under one protocol, each at most once.

    Args:
        module: Supernet.
        metric: Quality metric, lower is better.
        protocol: Which images.
        cost: Prices candidates.
        trials: Where evaluations are kept and looked up.
        reference_candidate: Float schedule whose images, at the same seeds, are the reference of ``psnr_db``.
        supernet_state: Hash of what the supernet computes with, part of the fingerprint.
        on_trial: Called with every new trial.
    """

    def __init__(
        self,
        module: SupernetModule,
        metric: FrechetMetric,
        protocol: Protocol,
        cost: CostModel,
        trials: TrialLog,
        *,
        reference_candidate: Candidate,
        supernet_state: str,
        on_trial: Callable[[Trial], None],
    ) -> None:
        self.module, self.metric, self.protocol, self.cost, self.trials = module, metric, protocol, cost, trials
        self.reference_candidate, self._on_trial = reference_candidate, on_trial
        self._reference: Tensor | None = None
        task = module.task
        self.fingerprint_parts = {
            **metric.fingerprint(),
            **asdict(protocol),
            "model": task.weights_hash,
            "supernet": supernet_state,
            "schedule": content_hash({"alphas_cumprod": task.alphas_cumprod}),
            "sample_shape": list(task.sample_shape),
            "num_classes": task.num_classes,
            "torch": torch.__version__,
            "sampler": f"ddim, eta 0, clip_sample {task.clip_sample}",
            "psnr_reference": reference_candidate.key(),
            "dtype": "float32",
            "resize": "none",
            "device": module.device.type,
            "num_threads": torch.get_num_threads() if module.device.type == "cpu" else None,
        }
        self.fingerprint = digest(self.fingerprint_parts)

    def images(self, candidate: Candidate) -> Iterator[Tensor]:
        """Images of a candidate on the CPU, one micro-batch after the other."""
        for indices in self.protocol.micro_batches():
            yield self.module.images(candidate, indices, self.protocol.seed).cpu()

    def evaluate(
        self,
        candidate: Candidate,
        phase: str,
        *,
        name: str | None = None,
        generation: int | None = None,
        images: MicroBatches | None = None,
    ) -> Trial:
        """Trial of a candidate: the recorded one if there is one, else a new one, recorded before it is returned.

        Args:
            candidate: What to score.
            phase, name, generation: See ``Trial``.
            images: Makes the images instead of ``self.images``; must make the same ones.
        """
        known = self.trials.find(candidate, self.fingerprint)
        if known is not None:
            return known
        metrics, error = self._measure(candidate, images or self.images)
        trial = Trial(
            index=self.trials.num_lines,
            phase=phase,
            name=name,
            generation=generation,
            key=candidate.key(),
            candidate=candidate.to_json(),
            bitops=self.cost.bitops(candidate),
            macs=self.cost.macs(candidate),
            weight_bytes=self.cost.weight_bytes(candidate),
            metrics=finite_metrics(metrics),
            num_images=self.protocol.num_images,
            seed=self.protocol.seed,
            fingerprint=self.fingerprint,
            error=error,
        )
        self.trials.append(trial)
        self._on_trial(trial)
        return trial

    def _measure(self, candidate: Candidate, images: MicroBatches) -> tuple[dict[str, float], str | None]:
        batches = list(self.protocol.wanted(images(candidate)))
        made = torch.cat(batches)
        if not made.isfinite().all():
            return {self.metric.name: math.nan, "psnr_db": math.nan}, "images held NaN or infinity"
        if candidate == self.reference_candidate:
            self._reference = made
        elif self._reference is None:
            self._reference = torch.cat(list(self.protocol.wanted(self.images(self.reference_candidate))))
        psnr_db = mean_psnr_db(made, self._reference)
        try:
            quality = self.metric(batches)
        except (ValueError, LinAlgError) as error:  # features too degenerate for the metric: this candidate's fault
            return {self.metric.name: math.nan, "psnr_db": psnr_db}, f"{self.metric.name}: {error}"
        cause = None if math.isfinite(quality) else f"{self.metric.name} was {quality}"
        return {self.metric.name: quality, "psnr_db": psnr_db}, cause


def label(candidate: Candidate, weighted: Sequence[bool]) -> dict[str, float | str]:
    """Summary of a candidate's bits: means over layers, and a name such as ``W6A6`` where they are uniform."""
    weight_bits = [b for a in candidate.allocations for b, has in zip(a.weight_bits, weighted, strict=True) if has]
    act_bits = [b for a in candidate.allocations for b in a.act_bits]
    uniform = len(set(weight_bits)) == len(set(act_bits)) == 1
    means = sum(weight_bits) / len(weight_bits), sum(act_bits) / len(act_bits)
    if uniform:
        name = "float" if means == (32, 32) else f"W{weight_bits[0]}A{act_bits[0]}"
    else:
        name = f"W{means[0]:.1f}A{means[1]:.1f} mixed"
    return {"weight_bits_mean": means[0], "act_bits_mean": means[1], "label": name}
